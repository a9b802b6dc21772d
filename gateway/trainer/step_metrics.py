"""What one optimizer step did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. tokens_per_second counts all tokens but padding; the valid_* are set at an epoch's end."""

    step: int
    total_steps: int
    train_loss: float
    train_mean_token_accuracy: float
    learning_rate: float
    tokens_per_second: float
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None

    def data(self) -> dict[str, float | int]:
        """The event's `data`, without absent values."""
        return {name: value for name, value in vars(self).items() if value is not None}
