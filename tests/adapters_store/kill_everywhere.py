"""Runs a registry operation again and again, killed at each line of the store's code in turn, and checks what is left.

A program of its own, because it forks: `python kill_everywhere.py OPERATION STORE STAGED MANIFEST`. It prints the
number of points and how many of them left the old and the new state, as JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from adapters_store import blobs, database, references, registry
from adapters_store.aliases import Canary
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.errors import SelfTestFailed
from adapters_store.manifest import AdapterManifest
from adapters_store.registry import AdapterRegistry
from adapters_store.reports import VersionReport
from adapters_store.upload import StagedAdapter
from adapters_store.versions import AdapterVersion

KILLED = 9
PASSED = VersionReport(passed=True, tested_at=0)
FAILED = VersionReport(passed=False, tested_at=0, reason="a test")
TRACED = {module.__file__ for module in (blobs, database, references, registry)}


class Store:
    """A store whose folder is laid out anew for each point; one engine, so that statements are compiled once."""

    def __init__(self, template: Path) -> None:
        self._template = template
        self._folder = template.with_name("killed")
        self.database = Database(f"sqlite:///{self._folder / 'patchbay.db'}")
        self.blobs = BlobStore(f"file://{self._folder / 'blobs'}")
        self.registry = AdapterRegistry(self.database, self.blobs)

    def lay_out(self) -> None:
        self.database.dispose()  # a connection must not cross a fork
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(self._template, self._folder)


def kill_at(point: int) -> Any:
    """A trace function that ends the process, without any clean-up, at the `point`-th line."""
    left = point

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os._exit(KILLED)
        return trace

    return trace


def operate(adapters: AdapterRegistry, operation: str, staged: StagedAdapter) -> None:
    if operation == "publish":
        adapters.publish("acme", "support", staged, test=lambda _: PASSED)
    elif operation == "quarantine":
        with suppress(SelfTestFailed):
            adapters.publish("acme", "support", staged, test=lambda _: FAILED)
    elif operation == "canary":
        adapters.set_alias("acme", "support", "default", 2, Canary(1, 50))
    elif operation == "rollback":
        adapters.rollback("acme", "support")
    else:
        adapters.delete("acme", "support", 1)
        purge(adapters)


def purge(adapters: AdapterRegistry) -> None:
    for version in adapters.retired():
        adapters.purge(version)


def run_killed(store: Store, operation: str, staged: StagedAdapter, point: int) -> bool:
    """Run the operation in a child killed at `point`; False when it came to its end before."""
    pid = os.fork()
    if pid == 0:
        sys.settrace(kill_at(point))
        operate(store.registry, operation, staged)
        sys.settrace(None)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, KILLED), f"the child failed at point {point}"
    return code == KILLED


def check(store: Store, operation: str, staged: StagedAdapter) -> str:
    """Which state is left, after checking that it is whole."""
    info = store.registry.get("acme", "support")
    numbers = [version.version for version in info.versions]
    current = store.registry.resolve("acme", "acme/support")
    assert info.aliases == {"default": current.version}
    for version in info.versions:  # whatever is listed is there, whole
        store.blobs.local_path(version.digest)
    if operation == "publish":
        return check_published(store, current, staged)
    if operation == "quarantine":
        assert current.version == 2, "it is never served"
        return "new" if info.versions[-1].status == "quarantined" else "old"
    if operation == "canary":
        assert (current.version, numbers) == (2, [1, 2])
        assert info.canaries in ({}, {"default": Canary(1, 50)})
        return "new" if info.canaries else "old"
    if operation == "rollback":
        assert numbers == [1, 2]
        return "new" if current.version == 1 else "old"
    assert numbers in ([1, 2], [2])
    purge(store.registry)  # what was deleted and is not purged yet
    assert store.registry.retired() == ()
    return "new" if numbers == [2] else "old"


def check_published(store: Store, current: AdapterVersion, staged: StagedAdapter) -> str:
    adapters = store.registry
    statuses = [version.status for version in adapters.get("acme", "support").versions]
    assert (current.version, statuses) in (
        (2, ["ready"] * 2),
        (2, ["ready"] * 2 + ["staged"]),
        (3, ["ready"] * 3),
    )
    assert (current.digest == staged.manifest.digest) == (current.version == 3)
    adapters.expire(before=1 << 40)  # as the next gateway does
    purge(adapters)
    following = adapters.publish("acme", "support", staged)  # and the store goes on
    assert following.version == len(statuses) + 1
    assert store.blobs.local_path(following.digest).exists()
    return "new" if current.version == 3 else "old"


def main(operation: str, template: str, staged_path: str, manifest: str) -> None:
    staged = StagedAdapter(AdapterManifest.model_validate_json(Path(manifest).read_text()), Path(staged_path))
    store = Store(Path(template))
    store.lay_out()
    operate(store.registry, operation, staged)  # once unharmed, which compiles its statements
    states: list[str] = []
    is_killed = True
    while is_killed:
        store.lay_out()
        is_killed = run_killed(store, operation, staged, len(states))
        states.append(check(store, operation, staged))
    flips = sum(a != b for a, b in itertools.pairwise(states))
    print(json.dumps({"points": len(states), "first": states[0], "last": states[-1], "flips": flips}))


if __name__ == "__main__":
    main(*sys.argv[1:])
