"""Tokens that the device has sampled, or will have in stream order, and the host does not know yet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """Where the last tokens of a step's rows are, when they come from a step in flight.

    token_ids: int64 [n], what that step sampled. sources: int64 [num_rows], the place of each row's last token in
    token_ids; -1 where the host knows it.
    """

    token_ids: Tensor
    sources: IntArray

    @property
    def is_pending(self) -> npt.NDArray[np.bool_]:
        """Which rows' last tokens the host does not know: bool [num_rows]."""
        return self.sources >= 0

    @property
    def marks(self) -> IntArray:
        """What stands for the pending token ids until `resolve`: -1 - source. int64 [num_rows]."""
        return -1 - self.sources


def resolve(ids: Tensor, token_ids: Tensor) -> Tensor:
    """Token ids [n], of which those below zero are `PendingTokens.marks`, made whole on the device."""
    return torch.where(ids < 0, token_ids[(-1 - ids).clamp_(min=0)], ids)
