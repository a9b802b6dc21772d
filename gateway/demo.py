"""The demo: three tenants' adapters on one base, served in one batch over both wires, and measured."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from gateway.client import ApiError, GatewayClient
from gateway.config import GatewayConfig, ServerConfig, StoreConfig
from gateway.embedded import adapter_path, demo_path
from gateway.rpc import patchbay_pb2, patchbay_pb2_grpc

ADAPTER_NAME = "tickets"
MAX_TOKENS = 64
MAX_BASE_ACCURACY = 0.30
MIN_ADAPTER_ACCURACY = 0.90
WIDTH_OF_PIPES = 140
NUM_STEPS_SHOWN = 5  # progress lines where there is no terminal for a bar

Message = dict[str, str]
Chat = list[Message]
Steps = dict[float, float]
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Check:
    """One thing that the demo promises, whether it held, and the figures."""

    name: str
    held: bool
    detail: str


@dataclass(frozen=True)
class Tenant:
    """A tenant with its key; `model` is its adapter."""

    id: str
    key: str

    @property
    def model(self) -> str:
        return f"{self.id}/{ADAPTER_NAME}"


@dataclass(frozen=True)
class Stage:
    """What the demo runs on: the gateway's two addresses, the admin's key, and where it prints."""

    http_url: str
    grpc_address: str
    admin_key: str
    console: Console

    def client(self, key: str) -> GatewayClient:
        """A client with this key."""
        return GatewayClient(self.http_url, key)

    def title(self, text: str) -> None:
        """The line that begins one part."""
        _title(self.console, text)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def run_demo(*, keep: bool, data_dir: Path | None, quiet: bool) -> list[Check]:
    """Run the demo on a gateway of its own; `quiet` prints to stderr.

    With `keep` the gateway stays up until Ctrl-C and its data stays in place.
    """
    started = time.monotonic()
    console = Console(stderr=quiet)
    if not console.is_terminal:
        console = Console(stderr=quiet, width=WIDTH_OF_PIPES)
    with _data_folder(data_dir, keep) as folder, _gateway(folder, console) as stage:
        checks = _show(stage)
        stage.say("")
        for check in checks:
            stage.say(f"  {'ok  ' if check.held else 'FAIL'}  {check.name}: {check.detail}")
        held = sum(check.held for check in checks)
        stage.say(f"{held} of {len(checks)} checks held, in {time.monotonic() - started:.0f} s.")
        if keep:
            _wait(stage, folder)
    return checks


def _title(console: Console, text: str) -> None:
    console.print(text, style="bold", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _data_folder(data_dir: Path | None, keep: bool) -> Iterator[Path]:
    folder = data_dir or Path(tempfile.mkdtemp(prefix="patchbay-demo-"))
    try:
        yield folder
    finally:
        if data_dir is None and not keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _gateway(folder: Path, console: Console) -> Iterator[Stage]:
    import gateway.server.app as app

    _title(console, "[1/6] Starting Ray, a replica with the embedded base and the gateway on loopback")
    started = time.monotonic()
    config = GatewayConfig(
        store=StoreConfig(data_dir=str(folder)),
        server=ServerConfig(http_port=0, grpc_port=0),
    )
    running = app.start(config)
    try:
        seconds = time.monotonic() - started
        stage = Stage(running.http_url, running.grpc_address, running.admin_key_path.read_text().strip(), console)
        stage.say(f"      ready in {seconds:.0f} s: HTTP {stage.http_url}, gRPC {stage.grpc_address}")
        yield stage
    finally:
        app.stop()


def _wait(stage: Stage, folder: Path) -> None:
    stage.say(f"Left running; its data is in {folder}. Ctrl-C stops it. Try:")
    stage.say(f"  patchbay tenant list --url {stage.http_url} --data-dir {folder}")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        stage.say("Stopping.")


def _show(stage: Stage) -> list[Check]:
    demo = demo_path()
    recipe = json.loads((demo / "recipe.json").read_text())
    tenants = _make_tenants(stage, sorted(path.name.split(".")[0] for path in demo.glob("*.heldout.jsonl")))
    _upload(stage, [tenant for tenant in tenants if tenant.id != recipe["live_tenant"]])
    _fine_tune(stage, next(tenant for tenant in tenants if tenant.id == recipe["live_tenant"]), recipe)
    return [*_serve_together(stage, tenants), *_measure(stage, tenants)]


def _make_tenants(stage: Stage, ids: Sequence[str]) -> list[Tenant]:
    stage.title(f"[2/6] Making the tenants {', '.join(ids)}, with a key each")
    with stage.client(stage.admin_key) as admin:
        for tenant_id in ids:
            try:
                admin.create_tenant(tenant_id)
            except ApiError as error:
                if error.status != 409:  # there already: the data folder is an older demo's
                    raise
        return [Tenant(tenant_id, admin.create_key(tenant_id)["key"]) for tenant_id in ids]


def _upload(stage: Stage, tenants: Sequence[Tenant]) -> None:
    stage.title("[3/6] Uploading a ready adapter for each of the first two")
    for tenant in tenants:
        with stage.client(tenant.key) as client:
            version = client.upload_adapter(tenant.model, adapter_path(tenant.id))
        stage.say(f"      {version['ref']}, rank {version['rank']}, {version['num_parameters']:,} parameters")


def _fine_tune(stage: Stage, tenant: Tenant, recipe: dict[str, Any]) -> None:
    train_file = demo_path() / f"{tenant.id}.train.jsonl"
    num_examples = len(train_file.read_text().splitlines())
    what = f"{recipe['n_epochs']} epochs of {num_examples} examples, rank {recipe['rank']}"
    stage.title(f"[4/6] Fine-tuning {tenant.model} on the NF4 base: {what}")
    started = time.monotonic()
    with stage.client(tenant.key) as client:
        hyperparameters = {"n_epochs": recipe["n_epochs"], "batch_size": recipe["batch_size"]}
        job = client.create_job(
            model=client.base_model(),
            training_file=client.upload_file(train_file)["id"],
            suffix=ADAPTER_NAME,
            seed=recipe["seed"],
            method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
            peft={
                "r": recipe["rank"],
                "lora_alpha": recipe["alpha"],
                "learning_rate": recipe["learning_rate"],
                "lr_scheduler": "linear",
            },
        )
        with _training_bar(stage) as update:
            for event in client.watch_job(job["id"]):
                if event["type"] == "metrics":
                    update(event["data"])
        job = client.job(job["id"])
    if job["status"] != "succeeded":
        raise RuntimeError(f"the fine-tune job {job['status']}: {(job.get('error') or {}).get('message')}")
    stage.say(f"      {job['fine_tuned_model']} is live, {time.monotonic() - started:.0f} s after the upload")


@contextmanager
def _training_bar(stage: Stage) -> Iterator[Callable[[dict[str, Any]], None]]:
    columns = (
        TextColumn("     "),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps {task.description}"),
    )
    with Progress(*columns, console=stage.console, disable=not stage.console.is_terminal) as bar:
        task = bar.add_task("", total=1)

        def update(data: dict[str, Any]) -> None:
            step, total = data["step"], data["total_steps"]
            figures = f" loss {data['train_loss']:.3f}  {data['tokens_per_second']:.0f} tokens/s"
            bar.update(task, completed=step, total=total, description=figures)
            if bar.disable and step * NUM_STEPS_SHOWN // total != (step - 1) * NUM_STEPS_SHOWN // total:
                stage.say(f"      step {step}/{total} {figures}")

        yield update


# -- one batch for all --------------------------------------------------------------------------------------


def _serve_together(stage: Stage, tenants: Sequence[Tenant]) -> list[Check]:
    prompts: list[str] = json.loads((demo_path() / "prompts.json").read_text())
    stage.title(f"[5/6] {len(prompts)} prompts to the base and all tenants at once, streamed over each wire")
    with stage.client(tenants[0].key) as client:
        base = client.base_model()
    asked = [(tenants[0].key, base, prompt) for prompt in prompts]
    asked += [(tenant.key, tenant.model, prompt) for tenant in tenants for prompt in prompts]
    answers, checks = {}, []
    for wire, stream in (("gRPC", _grpc_stream(stage)), ("the openai client", _openai_stream(stage))):
        before = _steps(stage)
        answers[wire] = _all_at_once(stream, asked)
        checks.append(_batch_check(wire, before, _steps(stage), len(tenants)))
    over_grpc, over_http = answers.values()
    _print_answers(stage, prompts, [base, *(tenant.model for tenant in tenants)], over_grpc)
    same = sum(a == b for a, b in list(zip(over_grpc, over_http, strict=True))[len(prompts) :])
    of = len(asked) - len(prompts)
    checks.append(Check("both wires give the same adapters' answers", same == of, f"{same} of {of}"))
    return checks


def _grpc_stream(stage: Stage) -> Callable[[tuple[str, str, str]], str]:
    channel = grpc.insecure_channel(stage.grpc_address)
    stub = patchbay_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]

    def ask(question: tuple[str, str, str]) -> str:
        key, model, prompt = question
        request = patchbay_pb2.ChatRequest(
            model=model,
            messages=[patchbay_pb2.Message(role="user", content=prompt)],
            sampling=patchbay_pb2.SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS),
        )
        chunks = stub.ChatStream(request, metadata=(("authorization", f"Bearer {key}"),), timeout=120)
        return "".join(choice.text for chunk in chunks for choice in chunk.choices)

    return ask


def _openai_stream(stage: Stage) -> Callable[[tuple[str, str, str]], str]:
    import openai

    client = openai.OpenAI(base_url=f"{stage.http_url}/v1", api_key="one for each call", max_retries=0)

    def ask(question: tuple[str, str, str]) -> str:
        key, model, prompt = question
        chunks = client.with_options(api_key=key).chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=MAX_TOKENS,
            stream=True,
        )
        return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)

    return ask


def _all_at_once(ask: Callable[[T], U], questions: Sequence[T]) -> list[U]:
    """The answers to all questions, each asked from a thread of its own, all released together."""
    barrier = threading.Barrier(len(questions))

    def released(question: T) -> U:
        barrier.wait()
        return ask(question)

    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(released, questions))


def _steps(stage: Stage) -> Steps:
    """Engine steps so far, by the most distinct adapters in their batch (infinity: all steps)."""
    with stage.client(stage.admin_key) as client:
        text = client.metrics()
    bounds: Steps = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "patchbay_step_adapters_bucket":
                bound = float(sample.labels["le"])
                bounds[bound] = bounds.get(bound, 0) + sample.value
    return bounds


def _batch_check(wire: str, before: dict[float, float], after: dict[float, float], num_adapters: int) -> Check:
    def grown(bound: float) -> int:
        return int(after.get(bound, 0) - before.get(bound, 0))

    steps = grown(float("inf"))
    shared = steps - grown(num_adapters - 1)
    name = f"one batch served all {num_adapters} adapters over {wire}"
    return Check(name, shared > 0, f"{shared} of {steps} engine steps held all {num_adapters}")


def _print_answers(stage: Stage, prompts: Sequence[str], models: Sequence[str], answers: Sequence[str]) -> None:
    table = Table("prompt", *models, box=None, header_style="bold")
    for row, prompt in enumerate(prompts):
        said = [answers[column * len(prompts) + row] for column in range(len(models))]
        table.add_row(*(_shortened(text) for text in (prompt, *said)))
    stage.console.print(table, markup=False)


def _shortened(text: str, limit: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


# -- held-out accuracy --------------------------------------------------------------------------------------


def _measure(stage: Stage, tenants: Sequence[Tenant]) -> list[Check]:
    folder = demo_path()
    held_out = {tenant.id: _read_chats(folder / f"{tenant.id}.heldout.jsonl") for tenant in tenants}
    count = len(held_out[tenants[0].id])
    stage.title(f"[6/6] Accuracy on {count} held-out examples each (exact match, greedy)")
    checks = []
    for tenant in tenants:
        with stage.client(tenant.key) as client:
            base = _accuracy(client, client.base_model(), held_out[tenant.id])
            adapter = _accuracy(client, tenant.model, held_out[tenant.id])
        held = base <= MAX_BASE_ACCURACY and adapter >= MIN_ADAPTER_ACCURACY
        bounds = f"at most {MAX_BASE_ACCURACY:.0%} and at least {MIN_ADAPTER_ACCURACY:.0%} asked"
        detail = f"base {base:.0%}, adapter {adapter:.0%} ({bounds})"
        checks.append(Check(f"{tenant.model} has learnt its task", held, detail))
    return checks


def _accuracy(client: GatewayClient, model: str, chats: Sequence[Chat]) -> float:
    """The share of chats whose last message the model gives exactly, from the messages before it."""

    def right(chat: Chat) -> bool:
        answer = client.chat(model, chat[:-1], temperature=0, max_tokens=MAX_TOKENS)
        return bool(answer["choices"][0]["message"]["content"].strip() == chat[-1]["content"])

    with ThreadPoolExecutor(32) as pool:
        return sum(pool.map(right, chats)) / len(chats)


def _read_chats(path: Path) -> list[Chat]:
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]
