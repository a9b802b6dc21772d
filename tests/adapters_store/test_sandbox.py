"""The confined process: what the code that reads a tenant's bytes cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapters_store import confined
from adapters_store.base_spec import BaseSpec
from adapters_store.errors import AdapterInvalid, StoreError, StoreUnavailable
from adapters_store.sandbox import ConfinedProcess, SandboxLimits
from adapters_store.upload import Staging

from .conftest import edit_config, stage

# Confines itself as `confined.main` does, then tries what the test asks for.
PROGRAM = """
import sys
from pathlib import Path
from adapters_store import confined
import socket, os, subprocess, pickle, ctypes
folder = Path(sys.argv[1]).resolve()
confined._drop_network()
confined._limit(wall_seconds=10, cpu_seconds=2, memory_bytes=1 << 30, file_bytes=1 << 20)
sys.addaudithook(confined._guard(folder))
os.chdir(folder)
{attempt}
print("done")
"""


def attempt(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM.format(attempt=code), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/passwd')",
        "open('../outside', 'w')",
        "os.open('/etc/passwd', os.O_RDONLY)",
        "socket.socket()",
        "socket.getaddrinfo('localhost', 80)",
        "subprocess.run(['true'])",
        "os.system('true')",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.symlink('/etc/passwd', 'link')",
        "pickle.loads(b'cos\\nsystem\\n(S\"true\"\\ntR.')",
        "ctypes.CDLL(None)",
        "import sqlite3",
    ],
)
def test_what_is_not_allowed_fails(tmp_path: Path, code: str) -> None:
    done = attempt(tmp_path, code)
    assert "done" not in done.stdout
    assert "is not allowed here" in done.stderr


def test_files_inside_the_folder_are_allowed(tmp_path: Path) -> None:
    done = attempt(tmp_path, "open('x', 'w').write('y'); assert open('x').read() == 'y'")
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize(
    ("code", "sign"),
    [("bytearray(2 << 30)", "MemoryError"), ("open('x', 'wb').write(bytes(2 << 20))", "File too large")],
)
def test_memory_and_files_are_limited(tmp_path: Path, code: str, sign: str) -> None:
    done = attempt(tmp_path, code)
    assert "done" not in done.stdout
    assert sign in done.stderr


def test_time_is_limited(tmp_path: Path) -> None:
    assert attempt(tmp_path, "while True: pass").returncode < 0


def test_a_task_out_of_memory_or_time_refuses_the_adapter(tmp_path: Path) -> None:
    (tmp_path / "upload.archive").write_bytes(b"")
    request = {"name": "a.tar", "max_bytes": 1}
    with pytest.raises(AdapterInvalid, match="more time or memory"):
        ConfinedProcess("unpack", tmp_path).run(request, SandboxLimits(wall_seconds=0.001))


def test_a_defect_of_ours_is_not_blamed_on_the_adapter(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        ConfinedProcess("unpack", tmp_path).run({}, SandboxLimits())
    assert not isinstance(caught.value, AdapterInvalid)


def test_a_disk_that_is_full_is_not_blamed_on_the_adapter(tmp_path: Path) -> None:
    def write(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
        Path("/dev/full").write_bytes(b"x")
        return {}

    answer = json.dumps(confined._run(write, tmp_path, {})).encode()
    process = ConfinedProcess("unpack", tmp_path)
    try:
        with pytest.raises(StoreUnavailable, match="No space is left"):
            process._answer(answer, b"")
    finally:
        process.kill()


def test_paths_and_modules_that_a_config_names_are_not_kept(adapter: Path, base: BaseSpec, staging: Staging) -> None:
    edit_config(
        adapter, base_model_name_or_path="/etc/passwd", revision="canary", auto_mapping={"parent_library": "canary"}
    )
    staged = stage(staging, adapter, base)
    for text in (staged.manifest.model_dump_json().encode(), staged.path.read_bytes()):
        assert b"canary" not in text
        assert b"passwd" not in text


def test_the_validator_does_not_import_torch() -> None:
    code = "import sys; import adapters_store.validator, adapters_store.archive, adapters_store.confined; "
    check = "print([name for name in ('torch', 'peft', 'transformers', 'sqlalchemy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
