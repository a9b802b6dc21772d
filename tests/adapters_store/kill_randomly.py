"""Uploads, publishes, flips and deletes, killed with SIGKILL at random moments, and what the store then has to show.

A program of its own, because it forks: `python kill_randomly.py DATABASE_URL FOLDER ADAPTERS KILLS SEED`. ADAPTERS has
peft folders and the `base.json` that they fit; blobs come under FOLDER. It prints what was done, as JSON, and fails
where a promise was broken.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters_store.accounts import Accounts
from adapters_store.base_spec import BaseSpec
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.errors import AdapterNotFound
from adapters_store.fsck import StoreCheck
from adapters_store.registry import AdapterRegistry
from adapters_store.upload import StagedAdapter, Staging

ALIASES = ("default", "prod")
# An upload takes long, nearly all of it before it is published: most children do none, and live shorter. Seconds.
KINDS = {
    2.0: ("upload", "publish", "flip", "delete"),
    0.3: ("publish", "flip", "delete"),
}


@dataclass
class Known:
    """What was acknowledged: digests by version, versions by alias, and the highest version ever."""

    versions: dict[int, str] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    last: int = 0


class Store:
    """The store under test. A connection must not cross a fork: `close` comes before."""

    def __init__(self, url: str, folder: Path, base: BaseSpec) -> None:
        self.base = base
        self.ready: dict[str, StagedAdapter] = {}  # folder -> what needs no more than to be published
        self.database = Database(url)
        self.blobs = BlobStore(f"file://{folder / 'blobs'}")
        self.registry = AdapterRegistry(self.database, self.blobs)
        self.staging = folder / "staging"
        self.check = StoreCheck(self.database, self.blobs, self.staging)

    def do(self, operation: list[Any]) -> list[Any]:
        """Do one operation; what the caller is told."""
        name, *arguments = operation
        if name == "upload":
            with Staging(self.staging) as staging:
                return self.publish(self.stage(staging, arguments[0]), arguments[1])
        if name == "publish":
            return self.publish(self.ready[arguments[0]], arguments[1])
        if name == "flip":
            self.registry.set_alias("acme", "support", *arguments)
        else:
            self.registry.delete("acme", "support", *arguments)
        return []

    def stage(self, staging: Staging, folder: str) -> StagedAdapter:
        for path in sorted(Path(folder).iterdir()):
            staging.add_file(path.name, [path.read_bytes()])
        return staging.validate(self.base, max_rank=16)

    def publish(self, staged: StagedAdapter, alias: str) -> list[Any]:
        version = self.registry.publish("acme", "support", staged, alias=alias)
        return [version.version, version.digest]


def next_operation(known: Known, adapters: list[str], kinds: Sequence[str], dice: random.Random) -> list[Any]:
    """An operation that succeeds unless it is killed."""
    spare = [version for version in known.versions if version not in known.aliases.values()]
    kind = dice.choice(kinds)
    if kind == "flip" and known.versions:
        return ["flip", dice.choice(ALIASES), dice.choice(list(known.versions))]
    if kind == "delete" and spare:
        return ["delete", dice.choice(spare)]
    return [kind if kind == "upload" else "publish", dice.choice(adapters), dice.choice(ALIASES)]


def apply(known: Known, operation: list[Any], answer: list[Any]) -> None:
    """Note an operation that was acknowledged."""
    if operation[0] in ("upload", "publish"):
        version, digest = answer
        assert version > known.last, "a number was given out twice"
        known.last = version
        known.versions[version] = digest
        known.aliases[operation[2]] = version
    elif operation[0] == "flip":
        known.aliases[operation[1]] = operation[2]
    else:
        del known.versions[operation[1]]


def operate(
    store: Store, known: Known, adapters: list[str], kinds: Sequence[str], dice: random.Random, out: int
) -> None:
    """In the child: do operations for ever, and tell of each before it begins and after it ends."""
    while True:
        operation = next_operation(known, adapters, kinds, dice)
        os.write(out, json.dumps(operation).encode() + b"\n")
        answer = store.do(operation)
        os.write(out, json.dumps(answer).encode() + b"\n")
        apply(known, operation, answer)


def run_killed(store: Store, known: Known, adapters: list[str], dice: random.Random) -> list[Any] | None:
    """Operate in a child until it is killed. Updates `known`; returns the operation that was under way."""
    store.database.dispose()
    inlet, outlet = os.pipe()
    longest = dice.choice((2.0, 0.3, 0.3, 0.3))
    pid, seed, wait = os.fork(), dice.random(), dice.random() * longest
    if pid == 0:
        try:
            operate(store, known, adapters, KINDS[longest], random.Random(seed), outlet)
        finally:
            os._exit(1)
    os.close(outlet)
    time.sleep(wait)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the child failed by itself"
    with open(inlet) as pipe:
        told = [json.loads(line) for line in pipe]
    for operation, answer in zip(told[::2], told[1::2], strict=False):
        apply(known, operation, answer)
    return told[-1] if len(told) % 2 else None


def settle(store: Store, known: Known, under_way: list[Any] | None) -> str:
    """Compare the store with what was acknowledged; the one operation under way is done or not done, whole.

    A version that a kill left staged is ended, as a front door does once its tester must be gone.
    """
    store.registry.expire(before=int(time.time()) + 1)
    for version in store.registry.retired():
        store.registry.purge(version)
    try:
        info = store.registry.get("acme", "support")
        assert all(version.status == "ready" for version in info.versions)
        versions = {version.version: version.digest for version in info.versions}
        aliases = dict(info.aliases)
    except AdapterNotFound:
        versions, aliases = {}, {}
    if (versions, aliases) == (known.versions, known.aliases):
        return "not done"
    assert under_way is not None, f"{versions} {aliases} is not {known}"
    answer = [max(versions), versions[max(versions)]] if under_way[0] in ("upload", "publish") else []
    apply(known, under_way, answer)
    assert (versions, aliases) == (known.versions, known.aliases), under_way
    return "done"


def inspect(store: Store, known: Known) -> int:
    """Every acknowledged byte is there, and nothing is wrong but leftovers, which are removed. How many there were."""
    for digest in set(known.versions.values()):
        store.blobs.open(digest).close()
    findings = list(store.check.findings())
    assert all(finding.is_leftover for finding in findings), findings
    assert all(map(store.check.repair, findings)), findings
    assert list(store.check.findings()) == []
    return len(findings)


def main(url: str, folder: str, adapters: str, kills: str, seed: str) -> None:
    base = BaseSpec(**json.loads((Path(adapters) / "base.json").read_text()))
    store, known, dice = Store(url, Path(folder), base), Known(), random.Random(int(seed))
    Accounts(store.database).create_tenant("acme")
    folders = sorted(str(path) for path in Path(adapters).iterdir() if path.is_dir())
    seen: Counter[str] = Counter()
    with ExitStack() as stack:
        for path in folders:
            store.ready[path] = store.stage(stack.enter_context(Staging(Path(folder) / "ready")), path)
        for _ in range(int(kills)):
            under_way = run_killed(store, known, folders, dice)
            how = settle(store, known, under_way)
            seen[f"{under_way[0]} {how}" if under_way else "between"] += 1
            seen["leftovers"] += inspect(store, known)
    print(json.dumps({**seen, "versions": known.last}))


if __name__ == "__main__":
    main(*sys.argv[1:])
