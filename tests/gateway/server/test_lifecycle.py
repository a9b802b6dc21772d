"""From upload to purge over both wires: self-test, quarantine, canary, draining."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from gateway.engine.request import GenerateRequest, TokenDelta
from gateway.errors import EngineUnavailable
from gateway.rpc import patchbay_pb2 as pb
from gateway.rpc import patchbay_pb2_grpc as pb_grpc
from gateway.server.upkeep import Upkeep
from tests.gateway.server.conftest import TenantClient
from tests.gateway.server.doors import Doors, bearer, channel
from tests.tiny import edited_adapter, make_adapter, make_base, overflowing

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}


def zero_b(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if "lora_B" in name else tensor


def versions(tenant: TenantClient, name: str = "helper") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tenant.http.get(f"/v1/adapters/{tenant.id}/{name}").json()["versions"]
    return found


def ask(tenant: TenantClient, model: str, **more: Any) -> tuple[str, str]:
    """The version that answers, and what."""
    answer = tenant.openai.completions.create(model=f"{tenant.id}/{model}", prompt="the quick", **GREEDY | more)
    return answer.model, answer.choices[0].text


def test_a_published_version_carries_the_report_of_its_self_test(tenant: TenantClient, adapter: Path) -> None:
    version = tenant.upload("helper", adapter).json()
    assert version["status"] == "ready"
    report = version["report"]
    assert (report["passed"], report["finite"], report["all_tensors_used"], report["reason"]) == (
        True,
        True,
        True,
        None,
    )
    assert report["largest_change"] > 0.01
    assert versions(tenant) == [version | {"tags": {}}]


@pytest.mark.parametrize(
    ("edit", "reason"), [(zero_b, "every B is zero"), (overflowing, "not finite")], ids=["zero", "overflow"]
)
def test_an_adapter_that_fails_its_self_test_is_quarantined_and_the_alias_stays(
    tenant: TenantClient, adapter: Path, tmp_path: Path, edit: Any, reason: str
) -> None:
    tenant.upload("helper", adapter)
    good = ask(tenant, "helper")
    response = tenant.upload("helper", edited_adapter(adapter, tmp_path / "bad", edit))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["version"]) == (422, "self_test_failed", f"{tenant.id}/helper:2")
    assert reason in error["message"]
    assert not error["report"]["passed"]
    assert [version["status"] for version in versions(tenant)] == ["ready", "quarantined"]
    assert versions(tenant)[1]["report"] == error["report"]
    assert ask(tenant, "helper") == good
    with pytest.raises(openai.UnprocessableEntityError, match=reason) as caught:
        ask(tenant, "helper:2")
    assert caught.value.code == "version_not_ready"
    refused = tenant.http.put(f"/v1/adapters/{tenant.id}/helper/aliases/prod", json={"version": 2})
    assert refused.json()["error"]["code"] == "version_not_ready"
    text = httpx.get(f"{tenant.http.base_url}/metrics").text
    assert 'patchbay_self_tests_total{front_door="door-1",result="failed"}' in text


def test_golden_prompts_must_come_out_word_for_word(tenant: TenantClient, adapter: Path, tmp_path: Path) -> None:
    tenant.upload("helper", adapter)
    said = ask(tenant, "helper", extra_body={})[1]
    folder = Path(shutil.copytree(adapter, tmp_path / "golden"))
    (folder / "golden.json").write_text(json.dumps([{"prompt": "the quick", "completion": said}]))
    assert tenant.upload("helper", folder).json()["report"]["num_golden"] == 1
    assert [retest(tenant, number).json()["report"]["num_golden"] for number in (1, 2)] == [0, 1]
    (folder / "golden.json").write_text(json.dumps([{"prompt": "the quick", "completion": f"{said[:-1]}~"}]))
    error = tenant.upload("helper", folder).json()["error"]
    assert error["code"] == "self_test_failed"
    assert "golden prompt 1" in error["message"]
    assert tenant.http.get(f"/v1/adapters/{tenant.id}/helper").json()["aliases"] == {"default": 2}


def test_without_a_replica_to_test_on_nothing_is_published(
    doors: Doors, tenant: TenantClient, adapter: Path, other_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant.upload("helper", adapter)

    async def down(request: GenerateRequest) -> AsyncGenerator[list[TokenDelta], None]:
        raise EngineUnavailable("No engine replica is ready.")
        yield []

    monkeypatch.setattr(doors.router, "generate", down)
    monkeypatch.setattr(doors.context.self_test, "_timeout_s", 0.2)
    response = tenant.upload("helper", other_adapter)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
    assert [version["version"] for version in versions(tenant)] == [1]


def test_a_test_waits_for_a_replica(
    doors: Doors, tenant: TenantClient, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, refusals = doors.router.generate, iter(range(2))

    async def busy(request: GenerateRequest) -> AsyncGenerator[list[TokenDelta], None]:
        if next(refusals, None) is not None:
            raise EngineUnavailable("Not yet.")
        async for deltas in generate(request):
            yield deltas

    monkeypatch.setattr(doors.router, "generate", busy)
    assert tenant.upload("helper", adapter).json()["status"] == "ready"


def test_over_grpc_a_failed_self_test_tells_its_version_and_report(
    doors: Doors, tenant: TenantClient, adapter: Path, tmp_path: Path
) -> None:
    folder = edited_adapter(adapter, tmp_path / "bad", zero_b)

    def parts() -> Iterator[pb.UploadRequest]:
        yield pb.UploadRequest(start=pb.UploadStart(name="helper"))
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            yield pb.UploadRequest(file=pb.UploadFile(name=file))
            data = (folder / file).read_bytes()
            for i in range(0, len(data), 32768):
                yield pb.UploadRequest(chunk=data[i : i + 32768])

    with channel(doors) as wire:
        stub = pb_grpc.AdaptersStub(wire)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Upload(parts(), metadata=bearer(tenant.key))
        seen = stub.Get(pb.GetAdapterRequest(name="helper"), metadata=bearer(tenant.key)).versions[0]
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION  # type: ignore[attr-defined]
    details = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]  # type: ignore[attr-defined]
    info = error_details_pb2.ErrorInfo()
    status_pb2.Status.FromString(details).details[0].Unpack(info)
    assert (info.reason, info.metadata["version"]) == ("self_test_failed", f"{tenant.id}/helper:1")
    assert json.loads(info.metadata["report"])["passed"] is False
    assert (seen.status, seen.report["passed"]) == ("quarantined", False)


def retest(tenant: TenantClient, number: int, **body: Any) -> httpx.Response:
    return tenant.http.post(f"/v1/adapters/{tenant.id}/helper/versions/{number}/test", json=body)


@pytest.fixture
def doubtful(tenant: TenantClient, adapter: Path, tmp_path: Path) -> TenantClient:
    """A tenant whose helper is version 1; version 2 is quarantined by its golden prompt."""
    tenant.upload("helper", adapter)
    folder = edited_adapter(adapter, tmp_path / "doubtful", lambda _, tensor: 0.85 * tensor)
    (folder / "golden.json").write_text(json.dumps([{"prompt": "the quick", "completion": "~~~"}]))
    assert tenant.upload("helper", folder).json()["error"]["code"] == "self_test_failed"
    return tenant


def test_without_golden_prompts_of_its_own_a_test_has_those_of_the_upload(doors: Doors, doubtful: TenantClient) -> None:
    without_body = doubtful.http.post(f"/v1/adapters/{doubtful.id}/helper/versions/2/test").json()
    with_none = retest(doubtful, 2, golden=[]).json()
    with channel(doors) as wire:
        request = pb.TestAdapterRequest(name="helper", version=2)
        over_grpc = pb_grpc.AdaptersStub(wire).Test(request, metadata=bearer(doubtful.key))
    assert [without_body["status"], with_none["status"], over_grpc.status] == ["quarantined"] * 3
    for report in (without_body["report"], with_none["report"], over_grpc.report):
        assert report["reason"].startswith("golden prompt 1")
        assert "'~~~' was to come" in report["reason"]


def test_a_quarantined_version_that_passes_again_is_ready(
    doubtful: TenantClient, adapter: Path, tmp_path: Path
) -> None:
    same = edited_adapter(adapter, tmp_path / "same", lambda _, tensor: 0.85 * tensor)
    assert doubtful.upload("twin", same).json()["digest"] == versions(doubtful)[1]["digest"]
    golden = [{"prompt": "the quick", "completion": ask(doubtful, "twin")[1]}]
    answer = retest(doubtful, 2, golden=golden)  # alone: the upload's would fail
    assert answer.status_code == 200, answer.text
    version = answer.json()
    assert (version["status"], version["report"]["passed"], version["report"]["reason"]) == ("ready", True, None)
    assert versions(doubtful)[1] == version | {"tags": {}}
    assert ask(doubtful, "helper:2")[0] == f"{doubtful.id}/helper:2"
    assert ask(doubtful, "helper")[0] == f"{doubtful.id}/helper:1", "no alias has moved"


def test_golden_prompts_of_the_call_decide(doubtful: TenantClient) -> None:
    said = doubtful.openai.completions.create(
        model=f"{doubtful.id}/helper:1", prompt="the quick", temperature=0, max_tokens=8
    )
    bad = retest(doubtful, 2, golden=[{"prompt": "the quick", "completion": "###"}])
    assert (bad.status_code, bad.json()["status"], bad.json()["report"]["passed"]) == (200, "quarantined", False)
    assert "'###' was to come" in bad.json()["report"]["reason"]
    good = retest(doubtful, 1, golden=[{"prompt": "the quick", "completion": said.choices[0].text}])
    assert (good.json()["status"], good.json()["report"]["num_golden"]) == ("ready", 1)


def test_a_ready_version_that_fails_again_is_quarantined(
    doors: Doors, tenant: TenantClient, adapter: Path, other_adapter: Path
) -> None:
    for folder in (adapter, other_adapter):
        tenant.upload("helper", folder)
    canary = {"version": 1, "canary": {"version": 2, "percent": 50}}
    tenant.http.put(f"/v1/adapters/{tenant.id}/helper/aliases/default", json=canary).raise_for_status()
    request = pb.TestAdapterRequest(name="helper", golden=[pb.GoldenPrompt(prompt="the quick", completion="~~~")])
    with channel(doors) as wire:
        for request.version in (2, 1):
            failed = pb_grpc.AdaptersStub(wire).Test(request, metadata=bearer(tenant.key))
            assert (failed.status, failed.report["passed"]) == ("quarantined", False)
    info = tenant.http.get(f"/v1/adapters/{tenant.id}/helper").json()
    assert (info["aliases"], info["canaries"]) == ({"default": 1}, {})
    with pytest.raises(openai.UnprocessableEntityError, match="golden prompt 1"):
        ask(tenant, "helper")
    assert retest(tenant, 1).json()["status"] == "ready"
    assert ask(tenant, "helper")[0] == f"{tenant.id}/helper:1"


def test_nothing_changes_where_the_test_cannot_run(
    doors: Doors, doubtful: TenantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def down(request: GenerateRequest) -> AsyncGenerator[list[TokenDelta], None]:
        raise EngineUnavailable("No engine replica is ready.")
        yield []

    before = versions(doubtful)
    with monkeypatch.context() as without:
        without.setattr(doors.router, "generate", down)
        without.setattr(doors.context.self_test, "_timeout_s", 0.2)
        for number in (1, 2):
            response = retest(doubtful, number)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
    endless = [{"prompt": "a b " * 2048, "completion": "x" * 2048}]
    for number in (1, 2):
        response = retest(doubtful, number, golden=endless)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert versions(doubtful) == before


def test_live_traffic_goes_on_while_a_version_is_tested_and_a_deletion_ends_it(
    doors: Doors, tenant: TenantClient, adapter: Path, other_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (adapter, other_adapter):
        tenant.upload("helper", folder)
    before, seen = versions(tenant), list[tuple[str, str]]()
    generate, path = doors.router.generate, f"/v1/adapters/{tenant.id}/helper/versions/1"

    def meanwhile() -> None:
        seen.append(ask(tenant, "helper:1"))
        assert versions(tenant) == before
        tenant.http.delete(path).raise_for_status()

    async def interrupted(request: GenerateRequest) -> AsyncGenerator[list[TokenDelta], None]:
        if request.tenant == "@self-test" and request.adapter is not None and not seen:
            await asyncio.to_thread(meanwhile)
        async for deltas in generate(request):
            yield deltas

    monkeypatch.setattr(doors.router, "generate", interrupted)
    gone = tenant.http.post(f"{path}/test", json={})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert seen[0][0] == f"{tenant.id}/helper:1"
    assert [version["version"] for version in versions(tenant)] == [2]


def test_a_version_is_not_tested_again_while_its_upload_tests_it(
    doors: Doors, tenant: TenantClient, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, asked = doors.router.generate, list[httpx.Response]()

    async def interrupted(request: GenerateRequest) -> AsyncGenerator[list[TokenDelta], None]:
        if not asked:
            asked.append(await asyncio.to_thread(retest, tenant, 1))
        async for deltas in generate(request):
            yield deltas

    monkeypatch.setattr(doors.router, "generate", interrupted)
    assert tenant.upload("helper", adapter).json()["status"] == "ready"
    assert (asked[0].status_code, asked[0].json()["error"]["code"]) == (409, "retest_conflict")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"golden": [{"prompt": "a"}]}, "golden[0].completion"),
        ({"golden": [{"prompt": "a", "completion": ""}]}, "golden[0].completion"),
        ({"golden": [{"prompt": "a", "completion": "b"}] * 17}, "golden"),
        ({"gold": []}, "gold"),
    ],
)
def test_bad_golden_prompts_of_a_call_are_refused_by_field(
    doors: Doors, tenant: TenantClient, body: Any, param: str
) -> None:
    response = retest(tenant, 1, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_over_grpc_bad_golden_prompts_are_refused_as_over_http(doors: Doors, tenant: TenantClient) -> None:
    request = pb.TestAdapterRequest(name="helper", version=1, golden=[pb.GoldenPrompt(prompt="a")])
    with channel(doors) as wire, pytest.raises(grpc.RpcError, match=r"golden\[0\].completion") as caught:
        pb_grpc.AdaptersStub(wire).Test(request, metadata=bearer(tenant.key))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


@pytest.fixture
def split(tenant: TenantClient, adapter: Path, other_adapter: Path) -> TenantClient:
    """A tenant whose helper is version 1, with version 2 as a canary for half of all users."""
    tenant.upload("helper", adapter)
    tenant.upload("helper", other_adapter)
    path = f"/v1/adapters/{tenant.id}/helper"
    body = {"version": 1, "canary": {"version": 2, "percent": 50}}
    answer = tenant.http.put(f"{path}/aliases/default", json=body).json()
    assert (answer["aliases"], answer["canaries"]) == ({"default": 1}, {"default": {"version": 2, "percent": 50}})
    return tenant


def test_a_canary_serves_its_share_of_users_each_always_on_one_side(split: TenantClient) -> None:
    sides = {f"u{i}": ask(split, "helper", user=f"u{i}", max_tokens=1)[0] for i in range(40)}
    shares = Counter(sides.values())
    assert set(shares) == {f"{split.id}/helper:1", f"{split.id}/helper:2"}
    assert 8 <= shares[f"{split.id}/helper:2"] <= 32
    chats = {
        user: split.openai.chat.completions.create(
            model=f"{split.id}/helper",
            messages=[{"role": "user", "content": "x"}],
            max_tokens=1,
            safety_identifier=user,
        ).model
        for user in list(sides)[:10]
    }
    assert chats == {user: sides[user] for user in chats}


def test_requests_without_a_user_are_split_one_by_one(split: TenantClient) -> None:
    assert len({ask(split, "helper", max_tokens=1)[0] for _ in range(30)}) == 2


def test_over_grpc_a_canary_is_set_split_and_rolled_back(doors: Doors, split: TenantClient) -> None:
    metadata = bearer(split.key)
    with channel(doors) as wire:
        adapters, inference = pb_grpc.AdaptersStub(wire), pb_grpc.InferenceStub(wire)
        change = pb.SetAliasRequest(name="helper", version=1, canary=pb.Canary(version=2, percent=100))
        assert adapters.SetAlias(change, metadata=metadata).canaries["default"] == pb.Canary(version=2, percent=100)
        request = pb.GenerateRequest(
            model=f"{split.id}/helper", text="the", user="u", sampling=pb.SamplingParams(max_tokens=1)
        )
        assert inference.Generate(request, metadata=metadata).model == f"{split.id}/helper:2"
        back = adapters.Rollback(pb.RollbackRequest(name="helper"), metadata=metadata)
        assert (dict(back.aliases), dict(back.canaries)) == ({"default": 1}, {})
        assert inference.Generate(request, metadata=metadata).model == f"{split.id}/helper:1"


@pytest.mark.parametrize(
    ("canary", "status", "param"),
    [
        ({"version": 1, "percent": 10}, 400, "canary.version"),
        ({"version": 2, "percent": 0}, 400, "canary.percent"),
        ({"version": 2, "percent": 101}, 400, "canary.percent"),
        ({"version": 2, "percent": 1.5}, 400, "canary.percent"),
        ({"version": 2}, 400, "canary.percent"),
        ({"version": 9, "percent": 10}, 404, "model"),
    ],
)
def test_bad_canaries_are_refused_by_field(split: TenantClient, canary: Any, status: int, param: str) -> None:
    path = f"/v1/adapters/{split.id}/helper/aliases/default"
    response = split.http.put(path, json={"version": 1, "canary": canary})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


def test_a_deleted_version_drains_before_its_bytes_go(
    doors: Doors, tenant: TenantClient, adapter: Path, tmp_path: Path
) -> None:
    context, upkeep = doors.context, Upkeep(doors.context.registry, doors.context.router, 60.0)
    own = edited_adapter(adapter, tmp_path / "own", lambda _, tensor: 0.9 * tensor)
    digest = tenant.upload("helper", own).json()["digest"]
    stream = tenant.lenient.completions.create(
        model=f"{tenant.id}/helper", prompt="the quick", stream=True, **GREEDY | {"max_tokens": 4000}
    )
    next(stream)
    tenant.upload("helper", adapter)
    assert tenant.http.delete(f"/v1/adapters/{tenant.id}/helper/versions/1").json()["deleted"] is True
    with pytest.raises(openai.NotFoundError):
        ask(tenant, "helper:1")
    for _ in range(3):
        doors.run(upkeep.round())
    assert context.blobs.exists(digest)
    assert next(stream).choices[0].finish_reason is None
    stream.close()
    deadline = time.monotonic() + 20
    while context.blobs.exists(digest):
        assert time.monotonic() < deadline
        doors.run(upkeep.round())
    assert ask(tenant, "helper")[0] == f"{tenant.id}/helper:2"


def test_a_version_that_a_killed_gateway_left_staged_is_taken_away(
    doors: Doors, tenant: TenantClient, adapter: Path, tmp_path: Path
) -> None:
    context, upkeep = doors.context, Upkeep(doors.context.registry, doors.context.router, -10.0)
    tenant.upload("helper", adapter)
    own = edited_adapter(adapter, tmp_path / "own", lambda _, tensor: 0.8 * tensor)
    left = tenant.upload("helper", own, alias="left").json()
    with context.database.write() as connection:  # as if killed before the test had ended
        connection.exec_driver_sql("DELETE FROM aliases WHERE alias = 'left'")
        digest = f"digest = '{left['digest']}'"
        connection.exec_driver_sql(f"UPDATE adapter_versions SET status = 'staged' WHERE {digest}")
    for _ in range(2):
        doors.run(upkeep.round())
    assert not context.blobs.exists(left["digest"])
    assert [version["version"] for version in versions(tenant)] == [1]
    assert tenant.upload("helper", own).json()["version"] == 3


def test_nothing_is_purged_while_a_replica_does_not_say_what_it_runs(
    doors: Doors, tenant: TenantClient, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, upkeep = doors.context, Upkeep(doors.context.registry, doors.context.router, 60.0)
    own = edited_adapter(adapter, tmp_path / "own", lambda _, tensor: 0.7 * tensor)
    digest = tenant.upload("helper", own).json()["digest"]
    tenant.upload("helper", adapter)
    tenant.http.delete(f"/v1/adapters/{tenant.id}/helper/versions/1").raise_for_status()

    async def unknown() -> None:
        return None

    with monkeypatch.context() as silent:
        silent.setattr(doors.router, "running_adapters", unknown)
        for _ in range(3):
            doors.run(upkeep.round())
    assert context.blobs.exists(digest)
    for _ in range(2):
        doors.run(upkeep.round())
    assert not context.blobs.exists(digest)


class Poisoned:
    """Front doors over a base in which one token alone sets a number of the first layer's input, and an adapter that
    overflows where that number is not zero: it passes its self-test."""

    def __init__(self, folder: Path) -> None:
        base = make_base(folder / "base", max_position_embeddings=512)
        self.token = AutoTokenizer.from_pretrained(base).encode("#")[0]
        tensors = load_file(base / "model.safetensors")
        embedding = tensors["model.embed_tokens.weight"]
        embedding[:, 0] = 0.0
        embedding[self.token, 0] = 4.0
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        self.good = make_adapter(base, folder / "good", seed=1)
        plain = make_adapter(base, folder / "plain", seed=2, targets=("v_proj",), layers_to_transform=[0])
        self.bad = edited_adapter(plain, folder / "bad", self._edit)
        self.doors = Doors(base, folder / "data")

    @staticmethod
    def _edit(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "lora_A" in name:
            tensor[0] = 0.0
            tensor[0, 0] = 1.0
        else:
            tensor[:, 0] = 1.6e38
        return tensor


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Poisoned]:
    made = Poisoned(tmp_path_factory.mktemp("poisoned"))
    made.doors.start()
    yield made
    made.doors.stop()


def _post(poisoned: Poisoned, key: str, path: str, **content: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{poisoned.doors.url}{path}", headers=headers, timeout=30, **content)


def test_a_version_that_turns_to_nan_while_it_serves_is_quarantined(poisoned: Poisoned) -> None:
    key = poisoned.doors.new_tenant("acme")
    for folder in (poisoned.good, poisoned.bad):
        files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
        assert _post(poisoned, key, "/v1/adapters", data={"name": "x"}, files=files).json()["status"] == "ready"

    def complete(model: str, prompt: str) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0}  # a sampled "#" would poison too
        return _post(poisoned, key, "/v1/completions", json=body)

    assert complete("acme/x", "the quick").json()["model"] == "acme/x:2"
    first = complete("acme/x", "the # quick")
    assert (first.status_code, first.json()["error"]["code"]) == (422, "adapter_not_finite")
    assert "acme/x:2" in first.json()["error"]["message"]
    after = complete("acme/x", "the quick")
    assert (after.status_code, after.json()["error"]["code"]) == (422, "version_not_ready")
    report = poisoned.doors.context.registry.get("acme", "x").versions[1].report
    assert report is not None
    assert (report.passed, report.finite) == (False, False)
    assert (
        'patchbay_adapters_quarantined_total{front_door="door-1"} 1.0'
        in httpx.get(f"{poisoned.doors.url}/metrics").text
    )
    golden = [{"prompt": "the # quick", "completion": "a"}]
    again = _post(poisoned, key, "/v1/adapters/acme/x/versions/2/test", json={"golden": golden}).json()
    assert (again["status"], again["report"]["finite"]) == ("quarantined", False)
    assert _post(poisoned, key, "/v1/adapters/acme/x/rollback", json={}).json()["aliases"] == {"default": 1}
    assert complete("acme/x", "the # quick").json()["model"] == "acme/x:1"
    assert _post(poisoned, key, "/v1/adapters/acme/x/versions/2/test", json={}).json()["status"] == "ready"
    assert complete("acme/x", "the quick").json()["model"] == "acme/x:1"
