"""Rows of embed_tokens and lm_head that adapters have of their own, on the serving device."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters_store.weights import TokenTable

_NO_KEY: Final = torch.iinfo(torch.int64).max


class HeadRows(NamedTuple):
    """A slot's rows of lm_head, [n, hidden], and of which tokens, int64 [n]."""

    ids: Tensor
    rows: Tensor


@dataclass(frozen=True)
class _Run:
    """The rows [start, stop) of one adapter. embedded: its tokens' ids on the host and where their rows begin."""

    start: int
    stop: int
    embedded: tuple[Tensor, int] | None
    head: HeadRows | None


class TokenPool:
    """Who holds which of `rows` [num_rows, hidden]: each adapter one run, its tables one after the other.

    One thread only. A token's row of embed_tokens is found by slot * vocab_size + id among the sorted `_keys`, whose
    number is fixed: a step looks up all its tokens at once, whoever's they are.
    """

    def __init__(
        self, num_rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.rows = torch.zeros(num_rows, hidden_size, dtype=dtype, device=device)
        self._vocab_size = vocab_size
        self._keys = torch.full((num_rows,), _NO_KEY, device=device)
        self._places = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._runs: dict[int, _Run] = {}  # by adapter slot

    def num_held(self, slot: int) -> int:
        """Rows of the adapter in a slot."""
        return self._runs[slot].stop - self._runs[slot].start if slot in self._runs else 0

    def row(self, slot: int) -> int:
        """The first row of the adapter in a slot, -1 where it has none."""
        return self._runs[slot].start if slot in self._runs else -1

    def holders(self, token_slots: npt.NDArray[np.int32]) -> list[int]:
        """Those of a step's slots whose adapters have rows."""
        return [slot for slot in self._runs if (token_slots == slot).any()]

    def head(self, slot: int) -> HeadRows | None:
        """What the adapter in a slot has of lm_head."""
        run = self._runs.get(slot)
        return run.head if run is not None else None

    def longest_run(self, given_back: Collection[int] = ()) -> int:
        """Rows that lie free side by side, if these slots were free."""
        return max(stop - start for start, stop in self._gaps(given_back))

    def take(self, slot: int, tables: tuple[TokenTable, ...], start: int | None = None) -> int:
        """Give the adapter in a slot a run, for which there is room. Returns the first of its rows, to be filled.

        start: of which free run; None leaves the choice to the pool.
        """
        num_rows = sum(len(table.ids) for table in tables)
        if start is None:
            start = next(begin for begin, stop in self._gaps() if stop - begin >= num_rows)
        is_free = any(begin <= start and start + num_rows <= stop for begin, stop in self._gaps())
        assert is_free, f"of the rows [{start}, {start + num_rows}) some are taken"
        place = start
        embedded, head = None, None
        for modules, ids, _ in tables:
            if "embed_tokens" in modules:
                embedded = ids, place
            if "lm_head" in modules:
                head = HeadRows(_sent(ids, self.rows.device), self.rows[place : place + len(ids)])
            place += len(ids)
        self._runs[slot] = _Run(start, place, embedded, head)
        self._send_keys()
        return start

    def free(self, slot: int) -> None:
        """Give back the rows of the adapter in a slot, if it has any."""
        if self._runs.pop(slot, None) is not None:
            self._send_keys()

    def embed(self, x: Tensor, ids: Tensor, token_slots: Tensor) -> None:
        """Overwrite the embeddings x [num_tokens, hidden] of those ids for which the token's slot has a row.

        ids, token_slots: int64 [num_tokens], -1 for the bare base.
        """
        keys = token_slots * self._vocab_size + ids
        found = torch.searchsorted(self._keys, keys).clamp_max_(len(self._keys) - 1)
        is_own = (self._keys[found] == keys).unsqueeze(1)
        torch.where(is_own, self.rows[self._places[found]], x, out=x)

    def check_integrity(self) -> None:
        """Assert that no row is held twice."""
        stop = 0
        for run in sorted(self._runs.values(), key=lambda run: run.start):
            assert stop <= run.start < run.stop <= len(self.rows), "rows of tokens are held twice"
            stop = run.stop

    def _gaps(self, given_back: Collection[int] = ()) -> Iterator[tuple[int, int]]:
        """The runs that nobody holds, in order."""
        held = sorted((run.start, run.stop) for slot, run in self._runs.items() if slot not in given_back)
        starts = [0, *(stop for _, stop in held)]
        return zip(starts, [*(start for start, _ in held), len(self.rows)], strict=True)

    def _send_keys(self) -> None:
        """Steps that were launched before have what they look up; later ones find this."""
        keys, places = torch.full((len(self._keys),), _NO_KEY), torch.zeros(len(self._keys), dtype=torch.int64)
        end = 0
        for slot, run in sorted(self._runs.items(), key=lambda held: held[0]):
            if run.embedded is not None:
                ids, place = run.embedded
                own = slice(end, end := end + len(ids))
                keys[own] = slot * self._vocab_size + ids
                places[own] = torch.arange(place, place + len(ids))
        self._keys.copy_(_sent(keys, self._keys.device))
        self._places.copy_(_sent(places, self._places.device))


def _sent(numbers: Tensor, device: torch.device) -> Tensor:
    """On the device, without a wait."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers
