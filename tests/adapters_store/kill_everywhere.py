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
from pathlib import Path
from types import FrameType
from typing import Any

from adapters_store import blobs, database, references, registry
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.manifest import AdapterManifest
from adapters_store.registry import AdapterRegistry, AdapterVersion
from adapters_store.upload import StagedAdapter

KILLED = 9
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
        adapters.publish("acme", "support", staged)
    elif operation == "rollback":
        adapters.rollback("acme", "support")
    else:
        adapters.delete("acme", "support", 1)


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
        return check_published(store.registry, numbers, current, staged)
    if operation == "rollback":
        assert numbers == [1, 2]
        return "new" if current.version == 1 else "old"
    assert numbers in ([1, 2], [2])
    return "new" if numbers == [2] else "old"


def check_published(
    adapters: AdapterRegistry, numbers: list[int], current: AdapterVersion, staged: StagedAdapter
) -> str:
    assert (current.version, numbers) in ((2, [1, 2]), (3, [1, 2, 3]))
    assert (current.digest == staged.manifest.digest) == (current.version == 3)
    following = adapters.publish("acme", "support", staged)  # and the store goes on
    assert following.version == current.version + 1
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
