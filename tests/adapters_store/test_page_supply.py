"""Who has which page: adapters, a borrower, nobody."""

from __future__ import annotations

import pytest

from adapters_store.page_supply import PageSupply


class Reader:
    """Borrows pages and reads in some."""

    def __init__(self, supply: PageSupply) -> None:
        self.supply = supply
        self.pages: set[int] = set()
        self.recalled: set[int] = set()
        self.reading: set[int] = set()
        self.unsaved: set[int] = set()
        self.times: dict[int, float] = {}
        supply.borrower = self

    def borrow(self) -> int | None:
        page = self.supply.lend()
        if page is not None:
            self.pages.add(page)
        return page

    def is_using(self, page: int) -> bool:
        assert page in self.pages
        return page in self.reading

    def used_at(self, page: int) -> float:
        return self.times.get(page, 0.0)

    def must_save(self, page: int) -> bool:
        assert page not in self.reading
        return page in self.unsaved

    def recall(self, page: int) -> None:
        assert page in self.pages
        self.recalled.add(page)

    def keep(self, page: int) -> None:
        self.recalled.remove(page)

    def give_back(self, page: int) -> None:
        assert page not in self.reading
        self.pages.remove(page)
        self.recalled.discard(page)


@pytest.fixture
def supply() -> PageSupply:
    return PageSupply(6)


@pytest.fixture
def reader(supply: PageSupply) -> Reader:
    return Reader(supply)


def test_adapters_take_the_lowest_and_the_borrower_the_highest(supply: PageSupply, reader: Reader) -> None:
    assert supply.take(2) == (0, 1)
    assert [reader.borrow() for _ in range(5)] == [5, 4, 3, 2, None]
    assert (supply.num_free, supply.num_lent) == (4, 4)
    supply.give_back((0,))
    assert reader.borrow() == 0
    supply.check_integrity([1])


def test_lent_pages_that_are_not_in_use_are_taken_where_too_few_are_free(supply: PageSupply, reader: Reader) -> None:
    for _ in range(4):
        reader.borrow()
    reader.reading = {2, 4}
    assert supply.num_free == 4
    assert supply.take(3) == (0, 1, 3)
    assert (reader.pages, supply.num_free) == ({2, 4, 5}, 1)
    supply.check_integrity([0, 1, 3])


def test_the_least_recently_used_leave_the_borrower_first(supply: PageSupply, reader: Reader) -> None:
    for _ in range(6):
        reader.borrow()
    reader.times = {0: 7.0, 1: 3.0, 3: 9.0, 5: 3.0}
    assert supply.take(2) == (2, 4)
    assert supply.take(2) == (1, 5)
    assert supply.take(1) == (0,)


def test_a_page_is_taken_a_step_after_what_it_holds_is_to_be_kept(supply: PageSupply, reader: Reader) -> None:
    for _ in range(5):
        reader.borrow()
    reader.times = {1: 2.0, 2: 1.0, 3: 3.0, 4: 4.0, 5: 5.0}
    reader.unsaved = {1, 3}
    assert supply.make_ready(2)  # one is free, and page 2 holds nothing that would be lost
    assert not supply.make_ready(3)
    assert (reader.recalled, reader.borrow()) == ({1, 2}, None)
    supply.begin_step()
    reader.unsaved = {3}
    assert supply.make_ready(3)
    assert supply.take(3) == (0, 1, 2)
    assert reader.recalled == set()
    supply.begin_step()
    assert supply.may_lend


def test_a_recall_empties_as_many_as_are_missing_and_ends_all_lending(supply: PageSupply, reader: Reader) -> None:
    for _ in range(5):
        reader.borrow()
    reader.reading = {1, 2, 3, 4, 5}
    assert supply.recall(3)  # a step may empty them
    assert reader.recalled == {1, 2}
    assert reader.borrow() is None
    supply.begin_step()
    assert not supply.recall(3)  # and has not
    assert reader.recalled == {1, 2}
    reader.reading = {3, 4, 5}
    assert supply.num_free == 3
    assert supply.take(3) == (0, 1, 2)
    assert reader.recalled == set()


def test_a_recall_that_finds_too_few_pages_waits_for_more_than_a_step(supply: PageSupply, reader: Reader) -> None:
    supply.take(2)
    for _ in range(4):
        reader.borrow()
    reader.reading = {2, 3}
    assert not supply.recall(5)
    assert reader.recalled == {2, 3, 4, 5}


def test_unused_pages_are_recalled_first_and_so_stay_unused(supply: PageSupply, reader: Reader) -> None:
    for _ in range(6):
        reader.borrow()
    reader.reading = {0, 1, 2, 3}
    supply.recall(3)
    assert reader.recalled == {0, 4, 5}


def test_what_nobody_asks_for_any_more_is_the_borrowers_again(supply: PageSupply, reader: Reader) -> None:
    for _ in range(6):
        reader.borrow()
    reader.reading = {0, 1, 2, 3, 4, 5}
    supply.recall(2)
    supply.begin_step()
    assert (reader.recalled, supply.may_lend) == ({0, 1}, False)  # there is a step's time to ask again
    supply.begin_step()
    assert (reader.recalled, supply.may_lend) == (set(), True)
    supply.check_integrity([])


def test_pages_are_taken_by_their_numbers(supply: PageSupply) -> None:
    supply.take_these((4, 1))
    assert supply.take(2) == (0, 2)
    with pytest.raises(AssertionError, match="taken"):
        supply.take_these((1,))


def test_the_integrity_check_sees_a_lost_and_a_shared_page(supply: PageSupply) -> None:
    pages = supply.take(2)
    supply.check_integrity(list(pages))
    with pytest.raises(AssertionError, match="lost or held twice"):
        supply.check_integrity([0])
    with pytest.raises(AssertionError, match="lost or held twice"):
        supply.check_integrity([0, 1, 2])
