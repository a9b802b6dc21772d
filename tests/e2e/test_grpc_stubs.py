"""Generated stubs, reflection and health against the whole system."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from gateway.rpc import patchbay_pb2 as pb
from gateway.rpc import patchbay_pb2_grpc as rpc
from tests.e2e.conftest import Patchbay


@pytest.fixture
def channel(patchbay: Patchbay) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(patchbay.grpc_address) as channel:
        yield channel


def key(patchbay: Patchbay, who: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {patchbay.keys[who]}"),)


def chat(model: str, max_tokens: int = 24) -> pb.ChatRequest:
    return pb.ChatRequest(
        model=model,
        messages=[pb.Message(role="user", content="What is the capital of France?")],
        sampling=pb.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True),
    )


def test_chat_streams_what_it_answers_at_once(patchbay: Patchbay, channel: grpc.Channel) -> None:
    stub = rpc.InferenceStub(channel)
    whole = stub.Chat(chat("acme/one"), metadata=key(patchbay, "acme"))
    chunks = list(stub.ChatStream(chat("acme/one"), metadata=key(patchbay, "acme")))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == pb.FINISH_REASON_LENGTH


def test_both_wires_give_the_same_answer(patchbay: Patchbay, channel: grpc.Channel) -> None:
    over_grpc = rpc.InferenceStub(channel).Chat(chat("globex/two"), metadata=key(patchbay, "globex"))
    over_http = patchbay.openai("globex").chat.completions.create(
        model="globex/two",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=24,
        extra_body={"ignore_eos": True},
    )
    assert over_http.choices[0].message.content == over_grpc.choices[0].text


def test_errors_carry_the_status_of_the_table(patchbay: Patchbay, channel: grpc.Channel) -> None:
    stub = rpc.InferenceStub(channel)
    for metadata, request, status in (
        ((), chat("acme/one"), grpc.StatusCode.UNAUTHENTICATED),
        (key(patchbay, "acme"), chat("globex/two"), grpc.StatusCode.NOT_FOUND),
        (key(patchbay, "acme"), chat("acme/one", max_tokens=100_000), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Chat(request, metadata=metadata)
        assert caught.value.code() is status  # type: ignore[attr-defined]


def test_a_cancelled_stream_leaves_the_engine(patchbay: Patchbay, channel: grpc.Channel) -> None:
    stream = rpc.InferenceStub(channel).ChatStream(chat("acme/one", 900), metadata=key(patchbay, "acme"))
    next(stream)
    stream.cancel()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with patchbay.http("admin") as http:
            lines = http.get("/metrics").text.splitlines()
        running = [float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith("vllm:num_requests_running{")]
        if sum(running) == 0:
            return
        time.sleep(0.1)
    pytest.fail("the cancelled request still runs")


def test_adapters_are_uploaded_listed_aliased_and_deleted(
    patchbay: Patchbay, channel: grpc.Channel, adapter_folders: list[Path]
) -> None:
    stub, metadata = rpc.AdaptersStub(channel), key(patchbay, "acme")

    def parts(folder: Path) -> Iterator[pb.UploadRequest]:
        yield pb.UploadRequest(start=pb.UploadStart(name="acme/streamed"))
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            yield pb.UploadRequest(file=pb.UploadFile(name=file))
            data = (folder / file).read_bytes()
            for i in range(0, len(data), 65536):
                yield pb.UploadRequest(chunk=data[i : i + 65536])

    versions = [stub.Upload(parts(folder), metadata=metadata) for folder in adapter_folders[:2]]
    assert [v.ref for v in versions] == ["acme/streamed:1", "acme/streamed:2"]
    stub.SetAlias(pb.SetAliasRequest(name="acme/streamed", alias="prod", version=1), metadata=metadata)
    listed = {a.name: a for a in stub.List(pb.ListAdaptersRequest(), metadata=metadata).adapters}
    assert dict(listed["streamed"].aliases) == {"default": 2, "prod": 1}
    with pytest.raises(grpc.RpcError) as caught:
        stub.Delete(pb.DeleteAdapterRequest(name="acme/streamed", version=1), metadata=metadata)
    assert "prod" in caught.value.details()  # type: ignore[attr-defined]
    with pytest.raises(grpc.RpcError) as foreign:
        stub.Get(pb.GetAdapterRequest(name="acme/streamed"), metadata=key(patchbay, "globex"))
    assert foreign.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


def test_reflection_names_the_services_and_health_is_serving(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    services = {"patchbay.v1.Inference", "patchbay.v1.Adapters", "patchbay.v1.FineTuning", "grpc.health.v1.Health"}
    assert services <= set(database.get_services())
    method = DescriptorPool(database).FindServiceByName("patchbay.v1.Inference").methods_by_name["ChatStream"]
    assert method.input_type.full_name == "patchbay.v1.ChatRequest"
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="patchbay.v1.Inference"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
