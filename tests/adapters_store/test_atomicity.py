"""Invariant 3: killed at any point, the alias names either the old version or the new, whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adapters_store.accounts import Accounts
from adapters_store.base_spec import BaseSpec
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.registry import AdapterRegistry
from adapters_store.upload import Staging

from .conftest import edit_config, stage


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
