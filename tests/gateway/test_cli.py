"""The command line: what it prints where, how it exits, and which key it sends, against scripted answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer

from gateway.cli import main
from gateway.cli.app import app
from gateway.cli.failures import ExitCode
from gateway.cli.output import print_table
from gateway.cli.serve import configure
from gateway.config import GatewayConfig

Json = dict[str, Any]
VERSION = {
    "ref": "acme/tone:2",
    "version": 2,
    "rank": 8,
    "num_parameters": 4096,
    "created_at": 1_700_000_000,
    "status": "ready",
    "import_error": 0.0,
    "tags": {"stage": "test"},
}
ADAPTER = {
    "tenant": "acme",
    "name": "tone",
    "aliases": {"default": 2, "prod": 2},
    "versions": [VERSION],
    "canaries": {},
}


class Wire:
    """A listener that answers each route with what a test put there, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Json, dict[str, str]]] = {}
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        wire = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                route = f"{self.command} {self.path.partition('?')[0]}"
                wire.asked.append((route, {k.lower(): v for k, v in self.headers.items()}, body))
                status, answer, headers = wire.answers[route]
                data = json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def on(self, route: str, answer: Json, status: int = 200, **headers: str) -> None:
        self.answers[route] = (status, answer, headers)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    wire = Wire()
    monkeypatch.setenv("PATCHBAY_URL", wire.url)
    monkeypatch.setenv("PATCHBAY_API_KEY", "pb_key")
    yield wire
    wire.close()


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its full name."""

    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for child, sub in command.commands.items():
                yield from walk(f"{name} {child}".strip(), sub)
        else:
            yield name, command

    return walk("", typer.main.get_command(app))


def test_the_commands_are_those_of_the_release() -> None:
    assert {name for name, _ in commands()} == {
        "serve",
        "demo",
        "chat",
        "version",
        "tenant create",
        "tenant list",
        "key create",
        "key list",
        "key revoke",
        "adapter upload",
        "adapter list",
        "adapter alias",
        "adapter unalias",
        "adapter rollback",
        "adapter test",
        "adapter download",
        "adapter tag",
        "adapter untag",
        "adapter delete",
        "store fsck",
        "finetune create",
        "finetune watch",
        "finetune list",
        "finetune cancel",
    }


def test_every_command_has_help_and_json() -> None:
    for name, command in commands():
        assert command.help, name
        assert any("--json" in parameter.opts for parameter in command.params), name


def test_the_exit_codes_are_stable() -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "OK": 0,
        "UNEXPECTED": 1,
        "USAGE": 2,
        "REFUSED": 3,
        "AUTHENTICATION": 4,
        "NOT_FOUND": 5,
        "UNAVAILABLE": 6,
        "UNSUCCESSFUL": 7,
        "INTERRUPTED": 130,
    }


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (400, "invalid_adapter", 3),
        (409, "alias_in_use", 3),
        (413, "upload_too_large", 3),
        (401, "invalid_api_key", 4),
        (403, "permission_denied", 4),
        (404, "model_not_found", 5),
        (429, "overloaded", 6),
        (503, "engine_unavailable", 6),
        (500, "internal_error", 1),
    ],
)
def test_a_refusal_exits_with_its_code(
    wire: Wire, capsys: pytest.CaptureFixture[str], status: int, code: str, exit_code: int
) -> None:
    body = {"message": "It was refused because of X.", "code": code, "param": "name"}
    wire.on("GET /v1/adapters", {"error": body}, status)
    assert run("adapter", "list") == exit_code
    printed = capsys.readouterr()
    assert "Error: It was refused because of X." in printed.err
    assert printed.out == ""


def test_with_json_an_error_is_json_on_stdout(wire: Wire, capsys: pytest.CaptureFixture[str]) -> None:
    body = {"message": "The queue is full.", "code": "overloaded", "param": None}
    wire.on("GET /v1/adapters", {"error": body}, 429, **{"retry-after": "2", "x-request-id": "req-7"})
    assert run("adapter", "list", "--json") == ExitCode.UNAVAILABLE
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert error == {
        "message": "The queue is full.",
        "hint": "Try again in 2 s.",
        "code": "overloaded",
        "param": None,
        "request_id": "req-7",
        "exit_code": 6,
    }
    assert "Try again in 2 s." in printed.err


def test_no_gateway_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("adapter", "list", "--url", "http://127.0.0.1:1", "--api-key", "pb_key") == ExitCode.UNAVAILABLE
    assert "patchbay serve" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "told"), [(0.0, "(rank 8), named"), (0.0031, "(rank 8, off by 0.31%), named")])
def test_an_upload_says_how_far_off_it_is_where_it_is(
    wire: Wire, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: float, told: str
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    wire.on("POST /v1/adapters", {**VERSION, "import_error": error})
    assert run("adapter", "upload", str(tmp_path), "acme/tone") == 0
    assert told in capsys.readouterr().out


def test_a_wrong_command_line_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("adapter", "upload") == ExitCode.USAGE
    assert run("adapter", "delete", "acme/tone", "--api-key", "pb_key") == ExitCode.USAGE
    assert "tenant/name:3" in capsys.readouterr().err


def test_without_a_key_nothing_is_sent(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PATCHBAY_API_KEY")
    assert run("adapter", "list") == ExitCode.AUTHENTICATION
    assert "PATCHBAY_API_KEY" in capsys.readouterr().err
    assert wire.asked == []


def test_admin_commands_take_the_local_gateways_key(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PATCHBAY_API_KEY")
    (tmp_path / "admin.key").write_text("pb_admin\n")
    wire.on("POST /v1/tenants", {"id": "acme"})
    assert run("tenant", "create", "acme", "--max-rank", "16", "--data-dir", str(tmp_path)) == 0
    _, headers, body = wire.asked[0]
    assert headers["authorization"] == "Bearer pb_admin"
    assert json.loads(body) == {"id": "acme", "max_rank": 16}


def test_the_local_admin_key_never_goes_to_another_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PATCHBAY_API_KEY", raising=False)
    (tmp_path / "admin.key").write_text("pb_admin\n")
    arguments = ("tenant", "list", "--url", "http://gateway.invalid", "--data-dir", str(tmp_path))
    assert run(*arguments) == ExitCode.AUTHENTICATION
    assert "admin key" in capsys.readouterr().err


def test_a_new_key_is_alone_on_stdout(wire: Wire, capsys: pytest.CaptureFixture[str]) -> None:
    wire.on("POST /v1/keys", {"id": "k1", "key": "pb_new", "tenant": "acme", "role": "tenant"})
    assert run("key", "create", "acme") == 0
    printed = capsys.readouterr()
    assert printed.out == "pb_new\n"
    assert "does not show again" in printed.err


def test_adapters_are_listed_with_the_aliases_that_name_them(wire: Wire, capsys: pytest.CaptureFixture[str]) -> None:
    wire.on("GET /v1/adapters", {"data": [ADAPTER]})
    assert run("adapter", "list") == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[:6] == ["acme/tone:2", "@default", "@prod", "stage=test", "8", "ready"]
    assert run("adapter", "list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [ADAPTER]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_table_cuts_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("NO_COLOR", "1")
    if terminal:
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    print_table(("JOB", "STATUS"), [("ftjob-" + "x" * 30, "validating_the_files")], "")
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "ftjob-" + "x" * 30
    assert "".join(line[36:].strip() for line in lines) == "validating_the_files"
    assert len(lines) == (2 if terminal else 1)


def test_aliases_move_and_roll_back(wire: Wire, capsys: pytest.CaptureFixture[str]) -> None:
    wire.on("PUT /v1/adapters/acme/tone/aliases/prod", ADAPTER)
    wire.on("POST /v1/adapters/acme/tone/rollback", ADAPTER)
    wire.on("DELETE /v1/adapters/acme/tone/aliases/stage", ADAPTER)
    wire.on("DELETE /v1/adapters/acme/tone/versions/1", {"deleted": True})
    assert run("adapter", "alias", "acme/tone", "prod", "2") == 0
    assert run("adapter", "rollback", "acme/tone") == 0
    assert run("adapter", "unalias", "acme/tone", "stage") == 0
    assert run("adapter", "delete", "acme/tone:1") == 0
    assert [json.loads(body) for _, _, body in wire.asked[:2]] == [{"version": 2}, {"alias": "default"}]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "acme/tone@prod is now acme/tone:2.",
        "acme/tone@default is now acme/tone:2.",
        "acme/tone has no @stage any more.",
        "Deleted acme/tone:1.",
    ]


def test_a_version_is_tested_again_with_golden_prompts(
    wire: Wire, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    golden = tmp_path / "golden.json"
    prompts = [{"prompt": "2 + 2 =", "completion": " 4"}]
    golden.write_text(json.dumps(prompts))
    route = "POST /v1/adapters/acme/tone/versions/2/test"
    wire.on(route, VERSION | {"report": {"passed": True, "reason": None}})
    assert run("adapter", "test", "acme/tone:2", "--golden", str(golden)) == 0
    assert json.loads(wire.asked[0][2]) == {"golden": prompts}
    assert capsys.readouterr().out == "acme/tone:2 passed and is ready.\n"
    wire.on(route, VERSION | {"status": "quarantined", "report": {"passed": False, "reason": "it changes nothing"}})
    assert run("adapter", "test", "acme/tone:2") == ExitCode.UNSUCCESSFUL
    assert json.loads(wire.asked[1][2]) == {"golden": []}
    assert "is quarantined: it changes nothing" in capsys.readouterr().err
    for text in ("{", "{}"):
        golden.write_text(text)
        assert run("adapter", "test", "acme/tone:2", "--golden", str(golden)) == ExitCode.REFUSED
    assert len(wire.asked) == 2


def test_a_canary_is_set_and_shown(wire: Wire, capsys: pytest.CaptureFixture[str]) -> None:
    split = ADAPTER | {"aliases": {"default": 1}, "canaries": {"default": {"version": 2, "percent": 25}}}
    wire.on("PUT /v1/adapters/acme/tone/aliases/default", split)
    wire.on("GET /v1/adapters", {"data": [split]})
    assert run("adapter", "alias", "acme/tone", "default", "1", "--canary", "2", "--percent", "25") == 0
    assert json.loads(wire.asked[0][2]) == {"version": 1, "canary": {"version": 2, "percent": 25}}
    assert capsys.readouterr().out == "acme/tone@default is now acme/tone:1, and acme/tone:2 for 25 % of callers.\n"
    assert run("adapter", "list") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["acme/tone:2", "@default(25%)"]


def test_adapters_and_versions_are_tagged_by_their_refs(wire: Wire, capsys: pytest.CaptureFixture[str]) -> None:
    wire.on("PUT /v1/adapters/acme/tone/tags/team", ADAPTER)
    wire.on("PUT /v1/adapters/acme/tone/versions/2/tags/eval%2Fscore", ADAPTER)
    wire.on("DELETE /v1/adapters/acme/tone/versions/2/tags/eval%2Fscore", ADAPTER)
    assert run("adapter", "tag", "acme/tone", "team", "north") == 0
    assert run("adapter", "tag", "acme/tone:2", "eval/score", "0.9") == 0
    assert run("adapter", "untag", "acme/tone:2", "eval/score") == 0
    assert [json.loads(body) for _, _, body in wire.asked[:2]] == [{"value": "north"}, {"value": "0.9"}]
    assert capsys.readouterr().out.splitlines()[0] == "acme/tone has team=north."


def _job(wire: Wire, status: str, error: Json | None = None) -> Json:
    job = {"id": "ftjob-1", "status": status, "fine_tuned_model": "acme/tone:3", "error": error}
    metrics = {"step": 2, "total_steps": 4, "train_loss": 0.5, "tokens_per_second": 100.0}
    events = [
        {"id": "ftevent-2", "type": "metrics", "message": "Step 2/4", "data": metrics},
        {"id": "ftevent-1", "type": "message", "message": "Started", "data": {}},
    ]
    wire.on("GET /v1/fine_tuning/jobs/ftjob-1", job)
    wire.on("GET /v1/fine_tuning/jobs/ftjob-1/events", {"data": events, "has_more": False})
    return job


def test_watching_prints_events_and_the_job_as_json_lines(wire: Wire, capsys: pytest.CaptureFixture[str]) -> None:
    job = _job(wire, "succeeded")
    assert run("finetune", "watch", "ftjob-1", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in lines] == ["ftevent-1", "ftevent-2", "ftjob-1"]
    assert lines[-1] == job


def test_watching_a_job_that_fails_says_why(wire: Wire, capsys: pytest.CaptureFixture[str]) -> None:
    _job(wire, "failed", {"message": "Line 3 has no messages.", "code": "invalid_file"})
    assert run("finetune", "watch", "ftjob-1") == ExitCode.UNSUCCESSFUL
    assert "Line 3 has no messages." in capsys.readouterr().err


def test_a_job_is_created_from_a_local_file(wire: Wire, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"messages": []}\n')
    wire.on("GET /v1/models", {"data": [{"id": "acme/tone"}, {"id": "base"}]})
    wire.on("POST /v1/files", {"id": "file-1"})
    wire.on("POST /v1/fine_tuning/jobs", {"id": "ftjob-1"})
    arguments = ("--suffix", "tone", "--epochs", "2", "--rank", "8", "--target-module", "q_proj")
    assert run("finetune", "create", str(tmp_path / "train.jsonl"), *arguments) == 0
    assert json.loads(wire.asked[-1][2]) == {
        "model": "base",
        "training_file": "file-1",
        "suffix": "tone",
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        "peft": {"r": 8, "target_modules": ["q_proj"]},
    }


def test_chat_prints_the_whole_response_as_json(wire: Wire, capsys: pytest.CaptureFixture[str]) -> None:
    response = {"choices": [{"message": {"content": "Hi there"}}]}
    wire.on("POST /v1/chat/completions", response)
    assert run("chat", "acme/tone", "Hello", "--system", "Be brief.", "--temperature", "0", "--json") == 0
    assert json.loads(capsys.readouterr().out) == response
    assert json.loads(wire.asked[0][2]) == {
        "model": "acme/tone",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        "temperature": 0.0,
    }


def test_serve_flags_replace_the_files_values(tmp_path: Path) -> None:
    file = tmp_path / "patchbay.yaml"
    file.write_text("server: {http_port: 9000, grpc_port: 9001}\nengine: {quantization: none}\n")
    config = configure(file, server={"http_port": 0}, engine={"base": "/models/llama"})
    assert (config.server.http_port, config.server.grpc_port) == (0, 9001)
    assert (config.engine.base, config.engine.quantization) == ("/models/llama", "none")
    assert configure(None) == GatewayConfig()


def test_tenants_have_weights(tmp_path: Path) -> None:
    file = tmp_path / "patchbay.yaml"
    file.write_text("limits: {tenant_weights: {acme: 2, small: 0.5}}\n")
    assert configure(file).limits.tenant_weights == {"acme": 2.0, "small": 0.5}


def test_serve_refuses_a_bad_configuration_by_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "patchbay.yaml"
    file.write_text("server: {http_port: 70000}\n")
    assert run("serve", "--config", str(file)) == ExitCode.REFUSED
    assert "server.http_port: input should be less than 65536, not 70000" in capsys.readouterr().err
    assert run("serve", "--quantization", "int3", "--json") == ExitCode.REFUSED
    assert json.loads(capsys.readouterr().out)["error"]["param"] == "engine.quantization"


def _process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from gateway.cli import main; main()"
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, timeout=240, check=False
    )


def test_help_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from gateway.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'grpc', 'sqlalchemy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_color_is_honoured() -> None:
    arguments = ("adapter", "list", "--url", "http://127.0.0.1:1", "--api-key", "pb_key")
    red = "\x1b[1;31m"
    assert red in _process(*arguments, FORCE_COLOR="1", NO_COLOR="").stderr
    assert "31m" not in _process(*arguments, FORCE_COLOR="1", NO_COLOR="1").stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands(shell: str) -> None:
    asked = {"COMP_WORDS": "patchbay ada", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "patchbay ada"}
    done = _process(_PATCHBAY_COMPLETE=f"complete_{shell}", _TYPER_COMPLETE_FISH_ACTION="get-args", **asked)
    assert "adapter" in done.stdout
    assert "finetune" not in done.stdout
