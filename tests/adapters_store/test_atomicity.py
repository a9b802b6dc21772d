"""Invariant 3: killed at any point, the alias names either the old version or the new, whole."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from adapters_store.accounts import Accounts
from adapters_store.base_spec import BaseSpec
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.registry import AdapterRegistry
from adapters_store.upload import Staging

from .conftest import edit_config, save_adapter, stage

KILLS = int(os.environ.get("PATCHBAY_SOAK_KILLS", "500"))
SEED = int(os.environ.get("PATCHBAY_SOAK_SEED", str(random.randrange(1 << 30))))


@pytest.mark.parametrize("operation", ["publish", "quarantine", "canary", "rollback", "delete"])
def test_killed_at_any_line_the_registry_is_whole(
    tmp_path: Path, adapter: Path, base: BaseSpec, operation: str
) -> None:
    store = tmp_path / "template"
    database = Database(f"sqlite:///{store / 'patchbay.db'}")
    database.upgrade()
    Accounts(database).create_tenant("acme")
    registry = AdapterRegistry(database, BlobStore(f"file://{store / 'blobs'}"))
    for alpha in (1, 2):
        edit_config(adapter, lora_alpha=alpha)
        with Staging(tmp_path / "staging") as staging:
            registry.publish("acme", "support", stage(staging, adapter, base))
    database.dispose()
    edit_config(adapter, lora_alpha=3)
    with Staging(tmp_path / "staging") as staging:
        staged = stage(staging, adapter, base)
        manifest = tmp_path / "manifest.json"
        manifest.write_text(staged.manifest.model_dump_json())
        program = Path(__file__).with_name("kill_everywhere.py")
        command = [sys.executable, str(program), operation, str(store), str(staged.path), str(manifest)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["points"] > 30
    assert (result["first"], result["last"], result["flips"]) == ("old", "new", 1)


@pytest.mark.parametrize("kills", [12, pytest.param(KILLS, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
def test_killed_at_random_moments_it_loses_nothing_that_was_acknowledged(
    tmp_path: Path, database: Database, base: BaseSpec, kills: int
) -> None:
    """SIGKILL of whole uploads, publishes, flips and deletes; PATCHBAY_SOAK_SEED=<seed> goes the same way again."""
    for seed in range(3):
        save_adapter(tmp_path / "adapters" / str(seed), seed=seed)
    (tmp_path / "adapters" / "base.json").write_text(json.dumps(asdict(base)))
    url = database.engine.url.render_as_string(hide_password=False)
    print(f"seed {SEED}")
    program = Path(__file__).with_name("kill_randomly.py")
    command = [sys.executable, program, url, tmp_path, tmp_path / "adapters", str(kills), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert json.loads(done.stdout)["versions"] >= kills // 4
