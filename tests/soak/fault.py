"""A device that fails."""

from __future__ import annotations

from typing import Any

import torch

from gateway.engine.llm_engine import LLMEngine


class Fault(Exception):
    """A device that has failed."""


def fail_next_step(engine: LLMEngine) -> None:
    """Let the device fail in the next step."""

    def fail(*_: Any) -> torch.Tensor:
        raise Fault

    engine.runner.execute = fail  # type: ignore[method-assign, assignment]
