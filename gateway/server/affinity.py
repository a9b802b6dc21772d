"""Which replica a request goes to: one that has its adapter and prefixes first, then the less busy one."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Final

from gateway.server.delivery import Connection

SLACK: Final = 8
"""Requests that a replica may have more than the least busy one before an adapter's requests pass it over."""


def choose_replica(connections: Sequence[Connection], digest: str | None) -> Connection:
    """The connection for a request of the adapter with this digest (None: the bare base); `connections` not empty.

    Rendezvous hashing (Thaler and Ravishankar, 1998) with bounded loads: every front door ranks the replicas alike for
    an adapter, and takes the first that is not much busier than the least busy. So an adapter is resident, and its
    prefixes are cached, on few replicas; a hot one spreads; a replica that comes or goes moves its own adapters only.
    Loads are this front door's own requests.
    """
    least = min(len(connection.mailboxes) for connection in connections)
    if digest is None:
        return random.choice([c for c in connections if len(c.mailboxes) == least])
    able = (c for c in connections if len(c.mailboxes) <= least + SLACK)
    return max(able, key=lambda connection: _weight(digest, connection.replica))


def _weight(digest: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{digest}/{replica}".encode(), digest_size=8).digest()
