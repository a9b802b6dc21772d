"""Every family, layout and quantization against transformers' own model of the same folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adapters_store.blobs import BlobStore
from gateway.config import EngineConfig
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.errors import BaseModelUnsupported
from gateway.models.loader import load_model
from lora_kernels.nf4 import dequantize_nf4, quantize_nf4
from tests.tiny import load_oracle, make_base

PROMPT = list(range(30, 60))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
}
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama attention bias": ("llama", {"attention_bias": True}),
    "llama sharded": ("llama", {"shard": "200KB"}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "yarn rope": ("llama", {"rope_parameters": YARN}),
    "mistral window": ("mistral", {"sliding_window": 12}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
}


def logprobs(folder: Path, store: Path, **settings: Any) -> dict[int, float]:
    """Our log probabilities of the prompt's next token, over the 50 most likely."""
    blobs = BlobStore(f"file://{store}")
    config = EngineConfig(**({"base": str(folder), "quantization": "none", "kv_cache_tokens": 512} | settings))
    engine = LLMEngine(config, blobs, lambda: None)
    request = GenerateRequest("r", SamplingParams(temperature=0, max_tokens=1, logprobs=50), prompt=PROMPT)
    engine.add(request, engine.encode(request))
    (delta,) = engine.step().deltas
    engine.close()
    return {token_id: value for token_id, _, value in delta.logprobs[0].top}


def assert_equal(ours: dict[int, float], model: torch.nn.Module) -> None:
    with torch.no_grad():
        theirs = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    for token_id, value in ours.items():
        assert value == pytest.approx(float(theirs[token_id]), abs=2e-4)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(tmp_path: Path, case: str) -> None:
    family, overrides = CASES[case]
    base = make_base(tmp_path / "base", family, **overrides)
    assert_equal(logprobs(base, tmp_path / "blobs"), load_oracle(base))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_base_is_of_the_type_that_its_config_says(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family)
    assert load_model(EngineConfig(base=str(base), device="cpu")).spec.model_type == family


def test_abridged_a_decoder_has_one_layer_of_each_kind(tmp_path: Path) -> None:
    mixed = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2, "num_hidden_layers": 4}
    for family, overrides, windows in (("mistral", {"sliding_window": 12}, [12]), ("qwen2", mixed, [None, 8])):
        base = make_base(tmp_path / family, family, **overrides)
        decoder = load_model(EngineConfig(base=str(base), device="cpu")).decoder
        assert [layer.attention.sliding_window for layer in decoder.abridged().layers] == windows
        assert len(decoder.layers) > len(windows)


def test_nf4_is_quantized_at_load(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    oracle = load_oracle(base)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name.endswith("proj.weight"):
                parameter.copy_(dequantize_nf4(quantize_nf4(parameter), torch.float32))
    assert_equal(logprobs(base, tmp_path / "blobs", quantization="nf4"), oracle)


def test_a_bitsandbytes_checkpoint_is_read_bit_for_bit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    packed = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bit, dtype=torch.float32)
    packed.save_pretrained(tmp_path / "packed")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "packed" / file).write_bytes((base / file).read_bytes())
    ours, stored = (load_model(EngineConfig(base=str(tmp_path / name), device="cpu")) for name in ("base", "packed"))
    assert stored.spec.fingerprint == ours.spec.fingerprint
    assert logprobs(tmp_path / "packed", tmp_path / "b1", quantization="nf4") == pytest.approx(
        logprobs(base, tmp_path / "b2", quantization="nf4"), abs=1e-5
    )
    with pytest.raises(BaseModelUnsupported, match="--quantization nf4"):
        load_model(EngineConfig(base=str(tmp_path / "packed"), quantization="none", device="cpu"))


def test_the_fingerprint_tells_bases_and_quantizations_apart(tmp_path: Path) -> None:
    one, two = make_base(tmp_path / "one"), make_base(tmp_path / "two", seed=1)
    prints = {
        load_model(EngineConfig(base=str(folder), quantization=quantization, device="cpu")).spec.fingerprint
        for folder in (one, two)
        for quantization in ("nf4", "none")
    }
    assert len(prints) == 4


def test_a_missing_tensor_and_a_pickle_checkpoint_are_refused_by_name(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    (base / "config.json").write_text(
        (base / "config.json").read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    with pytest.raises(BaseModelUnsupported, match=r"lm_head\.weight"):
        load_model(EngineConfig(base=str(base), quantization="none", device="cpu"))
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(BaseModelUnsupported, match="safetensors"):
        load_model(EngineConfig(base=str(base), device="cpu"))
