"""A step that the device may still be running."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

import numpy as np

from gateway.engine.pending import PendingTokens
from gateway.engine.sampler import Sampled
from gateway.engine.scheduler_output import SchedulerOutput
from gateway.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """What was scheduled, and the tokens that it samples."""

    scheduled: SchedulerOutput
    sampled: Sampled

    def pending(self, sequences: list[Sequence]) -> PendingTokens | None:
        """Where the next step's rows find their last tokens; None when this step samples for none of them."""
        if sequences == self.scheduled.sampled:
            return PendingTokens(self.sampled.token_ids, np.arange(len(sequences)))
        sampled = self.scheduled.sampled
        places = dict(zip(sampled, range(len(sampled)), strict=True))
        sources = np.fromiter(map(places.get, sequences, repeat(-1)), np.int64, len(sequences))
        return PendingTokens(self.sampled.token_ids, sources) if (sources >= 0).any() else None
