"""Which replica a request goes to."""

from __future__ import annotations

from collections import Counter

from gateway.server.affinity import SLACK, choose_replica
from gateway.server.delivery import Connection
from gateway.server.mailbox import Mailbox

DIGESTS = [f"{number:064x}" for number in range(400)]


def replicas(*loads: int) -> list[Connection]:
    """Connections of replicas r0, r1, ... that run so many requests each."""
    return [
        Connection(f"r{i}-call", f"r{i}", mailboxes={str(m): Mailbox(str(m), 1) for m in range(load)})
        for i, load in enumerate(loads)
    ]


def test_an_adapters_requests_stay_together_and_adapters_spread_evenly() -> None:
    connections = replicas(0, 0, 0, 0)
    homes = [choose_replica(connections, digest) for digest in DIGESTS]
    assert homes == [choose_replica(connections[::-1], digest) for digest in DIGESTS]
    assert all(60 <= number <= 140 for number in Counter(home.replica for home in homes).values())


def test_a_new_connection_of_a_replica_keeps_its_adapters() -> None:
    before, again = replicas(0, 0, 0), replicas(0, 0, 0)
    for connection in again:
        connection.name += "-again"
    assert [choose_replica(before, d).replica for d in DIGESTS] == [choose_replica(again, d).replica for d in DIGESTS]


def test_a_replica_that_goes_moves_its_own_adapters_only() -> None:
    connections = replicas(0, 0, 0, 0)
    for digest in DIGESTS:
        home = choose_replica(connections, digest)
        if home is not connections[3]:
            assert choose_replica(connections[:3], digest) is home


def test_a_much_busier_home_is_passed_over() -> None:
    idle = replicas(0, 0)
    digest = next(d for d in DIGESTS if choose_replica(idle, d) is idle[0])
    for load, expected in ((SLACK, 0), (SLACK + 1, 1)):
        connections = replicas(load, 0)
        assert choose_replica(connections, digest) is connections[expected]


def test_the_base_goes_to_the_least_busy() -> None:
    connections = replicas(2, 1, 1, 3)
    chosen = {choose_replica(connections, None).replica for _ in range(100)}
    assert chosen == {"r1", "r2"}
