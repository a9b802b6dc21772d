"""Specs inside blobs: those of before are read, and an adapter as before has the digest that it had."""

from __future__ import annotations

from adapters_store.manifest import AdapterSpec, LoRADelta, VectorSite

BEFORE = (
    '{"base_fingerprint":"f00","deltas":[{"layers":[0,1],"linear":"q_proj","rank":4,"scale":2.0}],'
    '"format":1,"kind":"LORA"}'
)


def test_a_spec_of_before_there_were_vectors_is_read_and_written_as_it_was() -> None:
    spec = AdapterSpec.model_validate_json(BEFORE)
    assert (spec.rank, spec.vectors, spec.target_modules) == (4, (), ("q_proj",))
    assert spec.canonical_json() == BEFORE


def test_what_has_vectors_alone_has_no_rank_and_names_its_modules() -> None:
    sites = [
        VectorSite(module=module, role="norm", tensor="weight", layers=(0,)) for module in ("norm", "input_layernorm")
    ]
    spec = AdapterSpec(kind="LN_TUNING", base_fingerprint="f00", vectors=tuple(sites))
    assert (spec.rank, spec.target_modules) == (0, ("input_layernorm", "norm"))
    assert AdapterSpec.model_validate_json(spec.canonical_json()) == spec


def test_the_width_of_vera_s_linears_is_kept() -> None:
    delta = LoRADelta(linear="q_proj", rank=4, scale=1.0, layers=(0,), in_features=32)
    spec = AdapterSpec(kind="VERA", base_fingerprint="f00", deltas=(delta,))
    assert AdapterSpec.model_validate_json(spec.canonical_json()) == spec
