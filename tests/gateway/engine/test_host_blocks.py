from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engine.host_blocks import BlockCopy, HostBlocks, least_fetch

A, B, C, D = b"a", b"b", b"c", b"d"


def save(host: HostBlocks, *links: bytes) -> list[BlockCopy]:
    """Take in links whose device blocks are 0, 1, ..."""
    return host.save({link: block for block, link in enumerate(links)}, [])


def test_what_is_saved_is_found_up_to_the_first_gap() -> None:
    host = HostBlocks(4)
    assert len(save(host, A, B, D)) == 3
    assert host.count([A, B, C, D]) == 2
    assert host.count([C]) == 0
    assert host.usage == 0.75


def test_a_link_that_is_here_is_not_saved_again() -> None:
    host = HostBlocks(4)
    save(host, A)
    assert [copy.block for copy in save(host, A, B)] == [1]
    assert host.num_saved == 2


def test_the_least_recently_used_link_leaves_first() -> None:
    host = HostBlocks(3)
    save(host, A, B, C)
    host.fetch([A])  # used
    save(host, B)  # used: the device drops it once more
    save(host, D)
    assert [host.count([link]) for link in (A, B, C, D)] == [1, 1, 0, 1]
    host.check_integrity()


def test_of_a_chain_the_end_leaves_first() -> None:
    host = HostBlocks(3)
    save(host, A, B, C)
    host.fetch([A, B, C])
    save(host, D)
    assert host.count([A, B, C]) == 2


def test_what_a_step_loads_stays_though_its_saves_find_no_room() -> None:
    host = HostBlocks(2)
    save(host, A, B)
    loads = [BlockCopy(7, place) for place in host.fetch([A, B])]
    assert host.save({C: 3}, loads) == []
    assert host.count([A, B]) == 2
    assert host.save({C: 3}, loads[1:]) == [BlockCopy(3, loads[0].host_block)]
    host.check_integrity()


def test_no_place_is_filled_twice_in_a_step() -> None:
    host = HostBlocks(1)
    assert save(host, A, B, C) == [BlockCopy(2, 0)]
    assert [host.count([link]) for link in (A, B, C)] == [0, 0, 1]


def test_a_short_run_is_left_to_be_computed() -> None:
    host = HostBlocks(4, least_fetch=3)
    save(host, A, B, C)
    assert [host.count(run) for run in ([A], [A, B], [A, B, C])] == [0, 0, 3]


def test_after_clearing_all_room_is_free() -> None:
    host = HostBlocks(2)
    save(host, A, B)
    host.clear()
    assert host.count([A]) == 0
    assert len(save(host, C, D)) == 2
    host.check_integrity()


@pytest.mark.parametrize(
    ("block_bytes", "operations", "device_type", "fewest"),
    [
        (2 << 20, 16 * 14 * 10**9, "cuda", 1),  # Llama-3.1-8B: 105 us against 560 us a block, and 200 us once
        (2 << 18, 28 * 10**9, "cuda", 5),
        (2 << 20, 10**9, "cuda", None),
        (2048, 6 * 10**5, "cpu", 1),
    ],
)
def test_fetching_is_weighed_against_computing(
    block_bytes: int, operations: int, device_type: str, fewest: int | None
) -> None:
    assert least_fetch(block_bytes, operations, device_type) == fewest


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 9), min_size=1, unique=True)), max_size=30))
def test_it_holds_what_a_plain_list_in_order_of_use_holds(uses: list[tuple[bool, list[int]]]) -> None:
    host, plain = HostBlocks(4), list[bytes]()
    for is_fetch, numbers in uses:
        links = [bytes([n]) for n in numbers]
        if is_fetch:
            links = [link for link in links if link in plain]
            host.fetch(links)
            links.reverse()
        else:
            save(host, *links)
        plain = ([link for link in plain if link not in links] + links)[-4:] if is_fetch else _used(plain, links)
        host.check_integrity()
        assert [bytes([n]) for n in range(10) if host.count([bytes([n])])] == sorted(plain)


def _used(plain: list[bytes], links: list[bytes]) -> list[bytes]:
    for link in links:
        plain = [*(other for other in plain if other != link), link][-4:]
    return plain
