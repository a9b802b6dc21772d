"""Patchbay: many tenants' adapters on one base. `from gateway import LLM, SamplingParams` for scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway.engine.sampling_params import SamplingParams
    from gateway.llm import LLM

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: the engine brings PyTorch along, which a client does without."""
    if name == "LLM":
        from gateway.llm import LLM

        return LLM
    if name == "SamplingParams":
        from gateway.engine.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
