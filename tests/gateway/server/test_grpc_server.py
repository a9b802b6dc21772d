"""The gRPC services with the generated stubs, against a real server."""

from __future__ import annotations

import io
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from peft import LoKrConfig

from gateway.errors import EngineUnavailable, Overloaded
from gateway.rpc import patchbay_pb2 as pb
from gateway.rpc import patchbay_pb2_grpc as pb_grpc
from tests.gateway.server.conftest import TenantClient
from tests.gateway.server.doors import Doors, bearer, channel
from tests.gateway.server.test_http_server import TRAINING
from tests.tiny import edited_adapter, make_prompt_adapter

GREEDY = pb.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def client(doors: Doors) -> Iterator[grpc.Channel]:
    with channel(doors) as opened:
        yield opened


@pytest.fixture
def inference(client: grpc.Channel) -> Any:
    return pb_grpc.InferenceStub(client)  # type: ignore[no-untyped-call]


@pytest.fixture
def adapters(client: grpc.Channel) -> Any:
    return pb_grpc.AdaptersStub(client)  # type: ignore[no-untyped-call]


@pytest.fixture
def fine_tuning(client: grpc.Channel) -> Any:
    return pb_grpc.FineTuningStub(client)  # type: ignore[no-untyped-call]


def details(error: grpc.RpcError) -> dict[str, Any]:
    """The rich details of an error, by type."""
    status = rpc_status.from_call(error)
    assert status is not None
    known = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    found = {}
    for detail in status.details:
        for kind in known:
            if detail.Is(kind.DESCRIPTOR):
                message = kind()
                detail.Unpack(message)
                found[kind.__name__] = message
    return found


def test_generate_equals_http(doors: Doors, tenant: TenantClient, inference: Any) -> None:
    request = pb.GenerateRequest(model=doors.model, text="the quick brown", sampling=GREEDY)
    answer, call = inference.Generate.with_call(request, metadata=bearer(tenant.key))
    http = tenant.openai.completions.create(
        model=doors.model, prompt="the quick brown", temperature=0, max_tokens=8, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == http.choices[0].text
    assert answer.choices[0].finish_reason == pb.FINISH_REASON_LENGTH
    assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens == 8
    assert answer.model == doors.model
    assert dict(call.trailing_metadata())["x-request-id"].startswith("req_")
    tokens = doors.router.engine._engine.model.tokenizer.encode("the quick brown")
    by_tokens = pb.GenerateRequest(model=doors.model, token_ids=pb.TokenIds(ids=tokens), sampling=GREEDY)
    same = inference.Generate(by_tokens, metadata=bearer(tenant.key))
    assert same.choices[0].token_ids == answer.choices[0].token_ids


def test_guessing_ahead_is_asked_for_and_accounted(doors: Doors, tenant: TenantClient, inference: Any) -> None:
    sampling = pb.SamplingParams(max_tokens=12, logit_bias={70: 100}, num_speculative_tokens=4)
    request = pb.GenerateRequest(model=doors.model, text="the", sampling=sampling)
    answer = inference.Generate(request, metadata=bearer(tenant.key))
    assert answer.choices[0].token_ids == [70] * 12
    assert answer.usage.accepted_prediction_tokens > 0


def test_a_priority_reaches_the_engine(doors: Doors, tenant: TenantClient, inference: Any) -> None:
    message, key = pb.Message(role="user", content="the"), bearer(tenant.key)
    inference.Generate(pb.GenerateRequest(model=doors.model, text="the", sampling=GREEDY, priority=-2), metadata=key)
    inference.Chat(pb.ChatRequest(model=doors.model, messages=[message], sampling=GREEDY, priority=5), metadata=key)
    assert [request.priority for request in doors.router.asked[-2:]] == [-2, 5]


@pytest.mark.parametrize("n", [1, 3])
def test_streams_add_up_to_the_whole(doors: Doors, tenant: TenantClient, inference: Any, n: int) -> None:
    sampling = pb.SamplingParams(seed=3, max_tokens=6, n=n, logprobs=1, ignore_eos=True)
    messages = [pb.Message(role="system", content="be brief"), pb.Message(role="user", content="the quick")]
    for whole, stream, request in (
        (
            inference.Generate,
            inference.GenerateStream,
            pb.GenerateRequest(model=doors.model, text="the", sampling=sampling),
        ),
        (inference.Chat, inference.ChatStream, pb.ChatRequest(model=doors.model, messages=messages, sampling=sampling)),
    ):
        answer = whole(request, metadata=bearer(tenant.key))
        chunks = list(stream(request, metadata=bearer(tenant.key)))
        for choice in answer.choices:
            parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
            assert "".join(part.text for part in parts) == choice.text
            assert [token for part in parts for token in part.token_ids] == choice.token_ids
            assert [token.token for part in parts for token in part.logprobs] == [t.token for t in choice.logprobs]
            assert parts[-1].finish_reason == choice.finish_reason == pb.FINISH_REASON_LENGTH
        assert len(answer.choices) == n
        usage = chunks[-1].usage
        assert usage.prompt_tokens == answer.usage.prompt_tokens > 0
        assert usage.completion_tokens == answer.usage.completion_tokens == 6 * n
        assert not any(chunk.HasField("usage") for chunk in chunks[:-1])
        assert sum(bool(chunk.choices) for chunk in chunks) > 1  # how many depends on how fast they are read


def test_upload_publishes_and_the_adapter_answers(
    doors: Doors, tenant: TenantClient, adapters: Any, inference: Any, adapter: Path, other_adapter: Path
) -> None:
    key = bearer(tenant.key)
    first = adapters.Upload(_upload("helper", adapter), metadata=key)
    assert (first.ref, first.version, first.rank) == (f"{tenant.id}/helper:1", 1, 4)
    assert adapters.Upload(_upload("helper", other_adapter, alias="next"), metadata=key).version == 2
    got = adapters.Get(pb.GetAdapterRequest(name="helper"), metadata=key)
    assert dict(got.aliases) == {"default": 1, "next": 2}
    assert [version.version for version in got.versions] == [1, 2]
    assert got == adapters.List(pb.ListAdaptersRequest(), metadata=key).adapters[0]
    answer = inference.Generate(
        pb.GenerateRequest(model=f"{tenant.id}/helper@next", text="the", sampling=GREEDY), metadata=key
    )
    assert answer.model == f"{tenant.id}/helper:2"
    moved = adapters.SetAlias(pb.SetAliasRequest(name="helper", version=2), metadata=key)
    assert moved.aliases["default"] == 2
    assert adapters.Rollback(pb.RollbackRequest(name=f"{tenant.id}/helper"), metadata=key).aliases["default"] == 1
    adapters.SetAlias(pb.SetAliasRequest(name="helper", alias="old", version=1), metadata=key)
    left = adapters.DeleteAlias(pb.DeleteAliasRequest(name="helper", alias="old"), metadata=key)
    assert dict(left.aliases) == {"default": 1, "next": 2}
    adapters.SetAlias(pb.SetAliasRequest(name="helper", alias="next", version=1), metadata=key)
    adapters.Delete(pb.DeleteAdapterRequest(name="helper", version=2), metadata=key)
    assert len(adapters.Get(pb.GetAdapterRequest(name="helper"), metadata=key).versions) == 1


def test_what_is_served_with_fewer_ranks_says_how_far_off_it_is_and_is_refused_above_the_limit(
    new_tenant: Callable[..., TenantClient], adapters: Any, base: Path, tmp_path: Path
) -> None:
    tenant = new_tenant(max_rank=32)
    key = bearer(tenant.key)
    rough = make_prompt_adapter(base, tmp_path / "rough", LoKrConfig(target_modules=["q_proj"]))  # of rank 64
    with pytest.raises(grpc.RpcError) as caught:
        adapters.Upload(_upload("rough", rough), metadata=key)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "rank 64, your limit is 32" in caught.value.details()
    faint = torch.tensor([1.0, 0.7, 0.5, 0.3, 1e-3, 1e-3, 1e-3, 1e-3])[:, None]
    smooth = edited_adapter(rough, tmp_path / "smooth", lambda name, tensor: tensor * (faint if "w2" in name else 1))
    uploaded = adapters.Upload(_upload("smooth", smooth), metadata=key)
    assert (uploaded.kind, uploaded.rank) == ("LOKR", 32)
    assert 1e-4 < uploaded.import_error < 0.01
    assert adapters.Get(pb.GetAdapterRequest(name="smooth"), metadata=key).versions[0] == uploaded
    found = tenant.http.get(f"/v1/adapters/{tenant.id}/smooth").json()["versions"][0]
    assert found["import_error"] == uploaded.import_error
    assert tenant.upload("smooth", smooth).json()["import_error"] == uploaded.import_error


def test_tags_are_set_and_taken_away_and_a_version_downloads_as_it_does_over_http(
    tenant: TenantClient, adapters: Any, adapter: Path
) -> None:
    key = bearer(tenant.key)
    uploaded = adapters.Upload(_upload("helper", adapter), metadata=key)
    assert (uploaded.kind, uploaded.num_virtual_tokens, uploaded.import_error) == ("LORA", 0, 0.0)
    adapters.SetTag(pb.SetTagRequest(name="helper", key="team", value="north"), metadata=key)
    tagged = adapters.SetTag(pb.SetTagRequest(name="helper", version=1, key="score", value="0.9"), metadata=key)
    assert (dict(tagged.tags), dict(tagged.versions[0].tags)) == ({"team": "north"}, {"score": "0.9"})
    left = adapters.DeleteTag(pb.DeleteTagRequest(name="helper", version=1, key="score"), metadata=key)
    assert (dict(left.tags), dict(left.versions[0].tags)) == ({"team": "north"}, {})
    chunks = adapters.Download(pb.DownloadAdapterRequest(name="helper", version=1), metadata=key)
    data = b"".join(chunk.data for chunk in chunks)
    assert data == tenant.http.get(f"/v1/adapters/{tenant.id}/helper/versions/1/download").content
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert "helper-1/adapter_model.safetensors" in archive.getnames()


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([], grpc.StatusCode.INVALID_ARGUMENT),
        ([pb.UploadRequest(chunk=b"x")], grpc.StatusCode.INVALID_ARGUMENT),
        ([pb.UploadRequest(start=pb.UploadStart(name="x"))], grpc.StatusCode.INVALID_ARGUMENT),
        (
            [pb.UploadRequest(start=pb.UploadStart(name="x")), pb.UploadRequest(chunk=b"x")],
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        ([pb.UploadRequest(start=pb.UploadStart(name="other-tenant/x"))], grpc.StatusCode.PERMISSION_DENIED),
        (
            [
                pb.UploadRequest(start=pb.UploadStart(name="x")),
                pb.UploadRequest(file=pb.UploadFile(name="../adapter_config.json")),
            ],
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            [
                pb.UploadRequest(start=pb.UploadStart(name="x")),
                pb.UploadRequest(file=pb.UploadFile(name="adapter_model.safetensors")),
                *[pb.UploadRequest(chunk=b"\0" * 60_000)] * 20,
            ],
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        ),
    ],
)
def test_bad_uploads_keep_nothing(
    doors: Doors, tenant: TenantClient, adapters: Any, parts: list[pb.UploadRequest], code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        adapters.Upload(iter(parts), metadata=bearer(tenant.key))
    assert failure.value.code() is code, failure.value  # type: ignore[attr-defined]
    assert not adapters.List(pb.ListAdaptersRequest(), metadata=bearer(tenant.key)).adapters
    assert list((doors.folder / "staging").iterdir()) == []


def test_a_client_that_leaves_an_upload_leaves_nothing(doors: Doors, tenant: TenantClient, adapters: Any) -> None:
    leave = threading.Event()

    def parts() -> Iterator[pb.UploadRequest]:
        yield pb.UploadRequest(start=pb.UploadStart(name="x"))
        yield pb.UploadRequest(file=pb.UploadFile(name="adapter_model.safetensors"))
        yield pb.UploadRequest(chunk=b"\0" * 1000)
        leave.wait(20)

    call = adapters.Upload.future(parts(), metadata=bearer(tenant.key))
    staging = doors.folder / "staging"
    _wait(lambda: staging.exists() and any(staging.iterdir()))
    call.cancel()
    _wait(lambda: not any(staging.iterdir()))
    leave.set()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(model="base"), "prompt"),
        (pb.GenerateRequest(text="x"), "model"),
        (pb.GenerateRequest(model="base", text="x", sampling=pb.SamplingParams(temperature=9)), "temperature"),
        (pb.GenerateRequest(model="base", text="x", sampling=pb.SamplingParams(n=17)), "n"),
        (pb.GenerateRequest(model="base", text="x", sampling=pb.SamplingParams(logit_bias={1: 1000})), "logit_bias"),
        (pb.GenerateRequest(model="base", text="x", priority=-3), "priority"),
        (pb.ChatRequest(model="base"), "messages"),
        (pb.ChatRequest(model="base", messages=[pb.Message(role="user", content="x")], priority=-3), "priority"),
        (pb.ChatRequest(model="base", messages=[pb.Message(role="robot", content="x")]), "messages[0].role"),
    ],
)
def test_bad_fields_are_named_in_the_details(
    doors: Doors, tenant: TenantClient, inference: Any, request_: Any, field: str
) -> None:
    if request_.model:
        request_.model = doors.model
    methods = (
        (inference.Chat, inference.ChatStream)
        if isinstance(request_, pb.ChatRequest)
        else (inference.Generate, inference.GenerateStream)
    )
    for method, read in zip(methods, (lambda answer: answer, list), strict=True):
        with pytest.raises(grpc.RpcError) as failure:
            read(method(request_, metadata=bearer(tenant.key)))
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        found = details(failure.value)
        assert found["BadRequest"].field_violations[0].field == field
        assert found["ErrorInfo"].domain == "patchbay"
        trailing = dict(failure.value.trailing_metadata())  # type: ignore[attr-defined]
        assert trailing["x-request-id"].startswith("req_")


def test_another_tenants_adapter_is_an_absent_one(
    helper: str, tenant: TenantClient, adapters: Any, inference: Any
) -> None:
    owner, own_name = helper.split("/")

    def ask(method: Any, request: Any) -> tuple[Any, str]:
        with pytest.raises(grpc.RpcError) as failure:
            method(request, metadata=bearer(tenant.key))
        error: Any = failure.value
        return error.code(), error.details()

    for name in (own_name, "nothere"):
        ref = f"{owner}/{name}"
        for method, request in (
            (inference.Generate, pb.GenerateRequest(model=ref, text="x")),
            (adapters.Get, pb.GetAdapterRequest(name=ref)),
            (adapters.SetAlias, pb.SetAliasRequest(name=ref, version=1)),
            (adapters.DeleteAlias, pb.DeleteAliasRequest(name=ref, alias="default")),
            (adapters.Rollback, pb.RollbackRequest(name=ref)),
            (adapters.Delete, pb.DeleteAdapterRequest(name=ref, version=1)),
            (adapters.SetTag, pb.SetTagRequest(name=ref, key="a", value="b")),
            (adapters.DeleteTag, pb.DeleteTagRequest(name=ref, key="a")),
            (
                lambda *args, **rest: list(adapters.Download(*args, **rest)),
                pb.DownloadAdapterRequest(name=ref, version=1),
            ),
        ):
            code, text = ask(method, request)
            assert code is grpc.StatusCode.NOT_FOUND
            assert text.replace(":1", "") == (f"The model {ref!r} does not exist or you do not have access to it.")


def test_overload_says_when_to_retry(
    doors: Doors, tenant: TenantClient, inference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(request: Any) -> int:
        raise Overloaded("The queue is full.", retry_after=2.5)

    monkeypatch.setattr(doors.router.engine, "submit", full)
    with pytest.raises(grpc.RpcError) as failure:
        inference.Generate(pb.GenerateRequest(model=doors.model, text="x"), metadata=bearer(tenant.key))
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
    delay = details(failure.value)["RetryInfo"].retry_delay
    assert delay.seconds + delay.nanos / 1e9 == 2.5


def test_an_unexpected_error_shows_no_inside(
    doors: Doors, tenant: TenantClient, adapters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("secret inside")

    monkeypatch.setattr(doors.context.registry, "list", broken)
    with pytest.raises(grpc.RpcError) as failure:
        adapters.List(pb.ListAdaptersRequest(), metadata=bearer(tenant.key))
    assert failure.value.code() is grpc.StatusCode.INTERNAL  # type: ignore[attr-defined]
    assert "secret" not in str(failure.value)


def test_a_replica_lost_in_a_stream_is_its_status(doors: Doors, tenant: TenantClient, inference: Any) -> None:
    stream = inference.GenerateStream(_endless(doors), metadata=bearer(tenant.key))
    next(stream)
    doors.run(doors.router.fail(EngineUnavailable("The replica of this request was lost. Retry.")))
    with pytest.raises(grpc.RpcError) as failure:
        list(stream)
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    assert details(failure.value)["ErrorInfo"].reason == "engine_unavailable"


def test_cancelling_a_stream_cancels_the_generation(doors: Doors, tenant: TenantClient, inference: Any) -> None:
    before = len(doors.router.finished)
    stream = inference.GenerateStream(_endless(doors), metadata=bearer(tenant.key))
    next(stream)
    stream.cancel()
    _wait(lambda: len(doors.router.finished) > before)
    assert doors.router.finished[before].finish_reason == "cancelled"


@pytest.mark.parametrize("streaming", [True, False])
def test_a_deadline_cancels_the_generation(doors: Doors, tenant: TenantClient, inference: Any, streaming: bool) -> None:
    before = len(doors.router.finished)
    method, read = (inference.GenerateStream, list) if streaming else (inference.Generate, lambda answer: answer)
    with pytest.raises(grpc.RpcError) as failure:
        read(method(_endless(doors), metadata=bearer(tenant.key), timeout=1.5))
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    _wait(lambda: len(doors.router.finished) > before)
    assert doors.router.finished[before].finish_reason == "cancelled"


def test_a_message_over_the_limit_is_refused(doors: Doors, tenant: TenantClient, inference: Any) -> None:
    request = pb.GenerateRequest(model=doors.model, text="x" * doors.context.config.limits.max_request_bytes)
    with pytest.raises(grpc.RpcError) as failure:
        inference.Generate(request, metadata=bearer(tenant.key))
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]


def test_jobs(doors: Doors, tenant: TenantClient, fine_tuning: Any, new_tenant: Callable[..., TenantClient]) -> None:
    key = bearer(tenant.key)
    file = tenant.openai.files.create(file=("train.jsonl", TRAINING), purpose="fine-tune")
    request = pb.CreateFineTuningJobRequest(
        model=doors.model,
        training_file=file.id,
        suffix="support",
        seed=7,
        hyperparameters=pb.Hyperparameters(n_epochs=2),
        peft=pb.LoraParams(r=8, target_modules=["q_proj"], alias="prod"),
        metadata={"team": "a"},
    )
    job = fine_tuning.Create(request, metadata=key)
    assert job.status == pb.FINE_TUNING_STATUS_VALIDATING_FILES
    assert (job.hyperparameters.n_epochs, job.hyperparameters.HasField("batch_size")) == (2, False)
    assert (job.peft.r, list(job.peft.target_modules), job.peft.alias, job.seed) == (8, ["q_proj"], "prod", 7)
    assert fine_tuning.Get(pb.GetFineTuningJobRequest(id=job.id), metadata=key) == job
    assert tenant.openai.fine_tuning.jobs.retrieve(job.id).id == job.id
    second = fine_tuning.Create(request, metadata=key)
    page = fine_tuning.List(pb.ListFineTuningJobsRequest(limit=1), metadata=key)
    rest = fine_tuning.List(pb.ListFineTuningJobsRequest(after=page.jobs[0].id), metadata=key)
    assert page.has_more
    assert {page.jobs[0].id, rest.jobs[0].id} == {job.id, second.id}
    with pytest.raises(grpc.RpcError) as failure:
        fine_tuning.Get(pb.GetFineTuningJobRequest(id=job.id), metadata=bearer(new_tenant().key))
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
    with pytest.raises(grpc.RpcError) as failure:
        fine_tuning.Create(pb.CreateFineTuningJobRequest(model=doors.model, training_file="file-x"), metadata=key)
    assert details(failure.value)["BadRequest"].field_violations[0].field == "training_file"


def test_event_stream_follows_the_job_to_its_end(doors: Doors, tenant: TenantClient, fine_tuning: Any) -> None:
    key = bearer(tenant.key)
    file = tenant.openai.files.create(file=("train.jsonl", TRAINING), purpose="fine-tune")
    job = fine_tuning.Create(pb.CreateFineTuningJobRequest(model=doors.model, training_file=file.id), metadata=key)
    events = fine_tuning.StreamEvents(pb.StreamFineTuningEventsRequest(id=job.id), metadata=key, timeout=20)
    first = next(events)
    assert first.message.startswith("Created")
    fine_tuning.Cancel(pb.CancelFineTuningJobRequest(id=job.id), metadata=key)
    rest = list(events)
    assert [event.message for event in rest] == ["Fine-tuning job cancelled"]
    resumed = pb.StreamFineTuningEventsRequest(id=job.id, after=first.id)
    assert list(fine_tuning.StreamEvents(resumed, metadata=key)) == rest


def test_health_serves_every_service(doors: Doors, client: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(client)
    for service in ("", "patchbay.v1.Inference", "patchbay.v1.Adapters", "patchbay.v1.FineTuning"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_calls_are_counted(doors: Doors, tenant: TenantClient, adapters: Any) -> None:
    adapters.List(pb.ListAdaptersRequest(), metadata=bearer(tenant.key))
    text = tenant.http.get("/metrics").text
    assert 'grpc_code="OK",grpc_method="List",grpc_service="patchbay.v1.Adapters"' in text


def _endless(doors: Doors) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=8000, ignore_eos=True)
    return pb.GenerateRequest(model=doors.model, text="the", sampling=sampling)


def _upload(name: str, folder: Path, alias: str = "") -> Iterator[pb.UploadRequest]:
    yield pb.UploadRequest(start=pb.UploadStart(name=name, alias=alias))
    for path in sorted(folder.iterdir()):
        yield pb.UploadRequest(file=pb.UploadFile(name=path.name))
        data = path.read_bytes()
        for start in range(0, len(data), 10_000):
            yield pb.UploadRequest(chunk=data[start : start + 10_000])


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
