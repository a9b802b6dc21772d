"""The closed schemas of peft's PROMPT_TUNING, P_TUNING and PREFIX_TUNING.

All three save one tensor, a row for each virtual token: peft encodes or projects before it saves, so that what says how
is inert. No tokenizer or text that the file names is opened.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from pydantic import Field, StrictInt

from adapters_store.adapter_config import AdapterConfig
from adapters_store.adapter_contents import AdapterContents, TensorRule
from adapters_store.base_spec import BaseSpec
from adapters_store.manifest import PROMPT_TENSOR, VirtualTokens
from adapters_store.module_matching import refuse

_Count = Annotated[StrictInt, Field(ge=1, le=1 << 31)]
_INERT: Final = frozenset({"num_attention_heads"})  # into how many heads token_dim is cut: follows from the base


class _PromptConfig(AdapterConfig):
    """The fields that are served; those that may be absent follow from the base, which they must fit."""

    refused: ClassVar = {"modules_to_save": "is not served beside virtual tokens; set modules_to_save=null"}

    num_virtual_tokens: _Count
    token_dim: _Count | None = None
    num_layers: _Count | None = None
    num_transformer_submodules: Annotated[StrictInt, Field(ge=1, le=1)] = 1  # the base has a decoder alone

    def _contents(self, base: BaseSpec, token_dim: int, width: int, num_layers: int | None) -> AdapterContents:
        """Rows of this width, of this many layers' keys and values or none."""
        _check("num_layers", self.num_layers, base.num_layers)
        _check("token_dim", self.token_dim, token_dim)
        return AdapterContents(
            tensors={PROMPT_TENSOR: TensorRule((self.num_virtual_tokens, width))},
            virtual_tokens=VirtualTokens(num_tokens=self.num_virtual_tokens, num_layers=num_layers),
        )


class _EmbeddingsConfig(_PromptConfig):
    """Of kinds whose rows are input embeddings."""

    def contents(self, base: BaseSpec) -> AdapterContents:
        return self._contents(base, base.hidden_size, base.hidden_size, None)


class PromptTuningConfig(_EmbeddingsConfig):
    """Prompt tuning (arXiv 2104.08691)."""

    kind = "PROMPT_TUNING"
    inert: ClassVar = _INERT | {
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
    }


class PTuningConfig(_EmbeddingsConfig):
    """P-tuning (arXiv 2103.10385)."""

    kind = "P_TUNING"
    inert: ClassVar = _INERT | {
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
    }


class PrefixTuningConfig(_PromptConfig):
    """Prefix tuning (arXiv 2101.00190): rows are keys and values of all layers side by side."""

    kind = "PREFIX_TUNING"
    inert: ClassVar = _INERT | {"prefix_projection", "encoder_hidden_size", "init_weights"}

    def contents(self, base: BaseSpec) -> AdapterContents:
        kv_width = base.linears["k_proj"][0]
        return self._contents(base, kv_width, 2 * base.num_layers * kv_width, base.num_layers)


def _check(field: str, value: int | None, needed: int) -> None:
    if value not in (None, needed):
        raise refuse(field, f"is {value}; the served base needs {needed}")
