"""The pages that no adapter has, and who may use them until one wants them."""

from __future__ import annotations

from typing import Protocol


class Borrower(Protocol):
    """Uses pages that were lent, as far as it needs them."""

    def is_using(self, page: int) -> bool:
        """Whether anything in a lent page is in use."""
        ...

    def used_at(self, page: int) -> float:
        """When what a lent page that is not in use holds was used last, on the monotonic clock; 0 for nothing."""
        ...

    def must_save(self, page: int) -> bool:
        """Whether what a lent page that is not in use holds would be kept elsewhere by a step after its recall."""
        ...

    def recall(self, page: int) -> None:
        """Begin to use nothing in a lent page that is not in use, and use others for what is."""
        ...

    def keep(self, page: int) -> None:
        """Use a page again that was recalled."""
        ...

    def give_back(self, page: int) -> None:
        """Use a lent page, in which nothing is in use, no more."""
        ...


class PageSupply:
    """Numbers of pages, each one adapter's, lent or free.

    Adapters take the lowest, and what is lent and not in use where too few are free. Where that is not enough either,
    `recall` has lent pages emptied, and nothing more is lent, as long as somebody asks for it in every step.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.borrower: Borrower | None = None
        self._free = list(range(num_pages))  # ascending
        self._lent: dict[int, bool] = {}  # whether it is recalled
        self._is_asked = self._was_asked = False

    @property
    def num_free(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._unused)

    @property
    def num_lent(self) -> int:
        """Pages that are lent, in use or not."""
        return len(self._lent)

    @property
    def num_in_use(self) -> int:
        """Pages that are lent and cannot be taken."""
        return self.num_lent - len(self._unused)

    @property
    def may_lend(self) -> bool:
        """Whether no adapter waits for pages."""
        return not (self._is_asked or self._was_asked)

    def take(self, num_pages: int) -> tuple[int, ...]:
        """Pages for an adapter, ascending, of which there are enough."""
        # The lowest: adapters loaded in turn lie in one run of pages, which the kernels like.
        taken = self._free[:num_pages]
        del self._free[:num_pages]
        if self._lent and len(taken) < num_pages:
            taken += self._end_loans(num_pages - len(taken))
        assert len(taken) == num_pages, f"{num_pages} pages asked for, {len(taken)} free"
        return tuple(sorted(taken))

    def make_ready(self, num_pages: int) -> bool:
        """Before `take`: whether nothing is lost by it. What is not yet kept elsewhere will be, if a step comes."""
        missing = num_pages - len(self._free)
        leaving = self._leaving_first[:missing] if missing > 0 else []
        if not any(self._lent_to.must_save(page) for page in leaving):
            return True
        for page in leaving:
            self._lent_to.recall(page)
            self._lent[page] = True
        self._is_asked = True
        return False

    def take_these(self, pages: tuple[int, ...]) -> None:
        """Take free pages, by their numbers."""
        assert set(pages) <= set(self._free), f"pages {pages} are taken"
        self._free = [page for page in self._free if page not in pages]

    def give_back(self, pages: tuple[int, ...]) -> None:
        """Take pages back from an adapter."""
        self._free = sorted([*self._free, *pages])

    def lend(self) -> int | None:
        """A page for the borrower: the highest; None where none is free, or an adapter waits for pages."""
        if not self._free or not self.may_lend:
            return None
        page = self._free.pop()
        self._lent[page] = False
        return page

    def recall(self, num_pages: int) -> bool:
        """Have lent pages emptied until, with what is free, so many can be taken.

        Returns whether the next step may empty them all. What is in use in those that were recalled before has found
        no room elsewhere.
        """
        self._is_asked = True
        unused = self._unused
        in_use = sorted(self._lent.keys() - unused)
        missing = num_pages - len(self._free) - len(unused) - sum(self._lent[page] for page in in_use)
        others = [page for page in in_use if not self._lent[page]][: max(0, missing)]
        for page in [*unused, *others]:
            self._lent_to.recall(page)
            self._lent[page] = True
        return 0 < missing == len(others)

    def begin_step(self) -> None:
        """Once per step, before `recall`: what nobody has asked for since the last step is the borrower's again."""
        self._was_asked, self._is_asked = self._is_asked, False
        if self._was_asked or not any(self._lent.values()):
            return
        for page in [page for page, is_recalled in self._lent.items() if is_recalled]:
            self._lent_to.keep(page)
            self._lent[page] = False

    def check_integrity(self, held: list[int]) -> None:
        """Assert that each page is free, lent or one of those that adapters have, exactly once."""
        assert sorted([*self._free, *self._lent, *held]) == list(range(self.num_pages)), "pages are lost or held twice"

    @property
    def _lent_to(self) -> Borrower:
        assert self.borrower is not None, "nothing is lent"
        return self.borrower

    @property
    def _unused(self) -> list[int]:
        """Lent pages in which nothing is in use."""
        return [page for page in self._lent if not self._lent_to.is_using(page)]

    @property
    def _leaving_first(self) -> list[int]:
        """Lent pages that are not in use: those that were recalled, then the least recently used."""
        unused = self._unused
        return sorted(unused, key=lambda page: (not self._lent[page], self._lent_to.used_at(page), page))

    def _end_loans(self, num_pages: int) -> list[int]:
        """Up to so many lent pages that are not in use."""
        pages = self._leaving_first[:num_pages]
        for page in pages:
            self._lent_to.give_back(page)
            del self._lent[page]
        return pages
