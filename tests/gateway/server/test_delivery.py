"""The token streams between a replica and a front door, over a real loopback connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import pytest_asyncio

from adapters_store.errors import AdapterLoadFailed, StoreError, StoreUnavailable
from gateway.engine.request import AdapterRef, GenerateRequest, TokenDelta, TokenLogprob, Usage
from gateway.engine.sampling_params import SamplingParams
from gateway.errors import (
    Conflict,
    ContextLengthExceeded,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    Overloaded,
)
from gateway.rpc import delivery_pb2 as pb
from gateway.server.delivery import DeliveryServer
from gateway.server.delivery_client import DeliveryClient, Link, RequestStream
from gateway.server.delivery_codec import (
    decode_delta,
    decode_error,
    decode_request,
    encode_error,
    encode_request,
    encode_step,
)
from gateway.server.mailbox import Mailbox

WAIT = 5.0


def delta(request_id: str, text: str, index: int = 0, **fields: object) -> TokenDelta:
    return replace(TokenDelta(request_id, index, text, [len(text)]), **fields)


async def read_all(mailbox: Mailbox) -> list[TokenDelta]:
    """Everything until the end, one list entry for each delta taken."""
    taken: list[TokenDelta] = []
    while deltas := await asyncio.wait_for(mailbox.take(), WAIT):
        taken += deltas
    return taken


class UploadRefused(StoreError):
    """Of a class that the other end does not know."""


class Replica:
    """A replica's end whose requests run until the test has made their deltas."""

    def __init__(self, name: str = "r1") -> None:
        self.cancelled: list[str] = []
        self.running: list[GenerateRequest] = []
        self.client = DeliveryClient(name, self._run, lambda: f"# metrics of {name}\n".encode())

    async def _run(self, request: GenerateRequest, stream: RequestStream) -> None:
        if request.prompt == "refuse":
            stream.refuse(InvalidRequest("refused", param="prompt"))
            return
        if request.prompt == "defect":
            raise KeyError("secret prompt")
        self.running.append(request)
        try:
            await stream.wait_ended()
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise

    async def runs(self, *request_ids: str) -> None:
        """Wait until these requests have arrived."""
        await until(lambda: set(request_ids) <= {request.request_id for request in self.running})


@asynccontextmanager
async def replica(name: str = "r1") -> AsyncIterator[Replica]:
    made = Replica(name)
    try:
        yield made
    finally:
        await made.client.close()


def request(request_id: str, n: int = 1, prompt: str = "") -> GenerateRequest:
    return GenerateRequest(request_id, SamplingParams(n=n), prompt=prompt)


async def submit(door: DeliveryServer, target: Replica, *requests: GenerateRequest) -> list[Mailbox]:
    """Connect, send the requests and wait until they run."""
    link = await target.client.connect(door.address)
    (connection,) = (c for c in door.connections if c.name == link.name)
    mailboxes = [door.submit(wanted, connection) for wanted in requests]
    await target.runs(*(wanted.request_id for wanted in requests))
    return mailboxes


@pytest_asyncio.fixture
async def door() -> AsyncIterator[DeliveryServer]:
    server = DeliveryServer()
    await server.start()
    yield server
    await server.stop()


async def until(condition: object) -> None:
    """Wait until the callable is true."""
    assert callable(condition)
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_delta_crosses_the_wire_whole() -> None:
    sent = TokenDelta(
        "r", 3, "né", [7, 300_000], [TokenLogprob(7, "n", -0.25, ((9, "m", -1.5), (7, "n", -0.25)))], "length",
        Usage(11, 5, 4, 3, 2),
    )  # fmt: skip
    message = pb.ReplicaMessage.FromString(encode_step([sent]).SerializeToString())
    assert [decode_delta(d) for d in message.step.deltas] == [sent]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ContextLengthExceeded("too long", param="messages"), ContextLengthExceeded),
        (Overloaded("full", retry_after=2.5), Overloaded),
        (StoreUnavailable("no disk"), StoreUnavailable),
        (AdapterLoadFailed("ab" * 32, "blob is missing"), AdapterLoadFailed),
        (UploadRefused("no room"), StoreError),
    ],
)
def test_an_error_keeps_its_type_text_and_data(error: Exception, expected: type[Exception]) -> None:
    decoded = decode_error(encode_error(error))
    assert type(decoded) is expected
    assert str(decoded) == str(error)
    for name in ("param", "retry_after", "digest", "reason"):
        assert getattr(decoded, name, None) == getattr(error, name, None)


def test_a_defects_own_text_stays_in_the_replica() -> None:
    decoded = decode_error(encode_error(KeyError("secret prompt")))
    assert isinstance(decoded, InternalError)
    assert "secret" not in str(decoded)


@pytest.mark.parametrize(
    "sent",
    [
        GenerateRequest("r", SamplingParams(), prompt="né"),
        GenerateRequest(
            "r",
            SamplingParams(
                temperature=0.1, top_p=0.2, top_k=-1, min_p=0.3, repetition_penalty=1.1, presence_penalty=-1.2,
                frequency_penalty=1.3, seed=-(1 << 63), n=2, max_tokens=7, min_tokens=3, stop=("a", "b"),
                stop_token_ids=(1, 2), ignore_eos=True, logprobs=0, logit_bias={5: -1.0}, skip_special_tokens=False,
                num_speculative_tokens=5,
            ),
            prompt=[1, 300_000],
            adapter=AdapterRef("t/a:1", "ab" * 32, 8, num_virtual_tokens=5),
            tenant="t",
            cache_salt="s",
            priority=-3,
            tenant_weight=2.5,
        ),
        GenerateRequest("r", SamplingParams(), messages=[{"role": "user", "content": [{"type": "text"}]}]),
    ],
    ids=["defaults", "every field", "chat"],
)  # fmt: skip
def test_a_request_crosses_the_wire_whole(sent: GenerateRequest) -> None:
    assert decode_request(pb.Request.FromString(encode_request(sent).SerializeToString())) == sent


@pytest.mark.parametrize(
    "bad",
    [
        GenerateRequest("r", SamplingParams(stop_token_ids=(1 << 64,)), prompt=""),
        GenerateRequest("r", SamplingParams(), messages=[{"role": "user", "content": "\ud800"}]),
        GenerateRequest("r", SamplingParams(), prompt="\ud800"),
        GenerateRequest("r", SamplingParams(), prompt=[1 << 70]),
    ],
)
def test_what_cannot_be_sent_is_the_callers_error(bad: GenerateRequest) -> None:
    with pytest.raises(InvalidRequest):
        encode_request(bad)


async def test_tokens_arrive_in_order_and_the_request_ends_once(door: DeliveryServer) -> None:
    async with replica() as target:
        (mailbox,) = await submit(door, target, request("a", n=2))
        target.client.deliver([delta("a", "x0"), delta("a", "y0", 1)])
        target.client.deliver([delta("a", "x1", finish_reason="stop"), delta("a", "y1", 1), delta("other", "lost")])
        assert target.client.num_running == 1
        target.client.deliver([delta("a", "y2", 1, finish_reason="length", usage=Usage(3, 5))])
        taken = await read_all(mailbox)
        assert "".join(d.text for d in taken if d.index == 0) == "x0x1"
        assert "".join(d.text for d in taken if d.index == 1) == "y0y1y2"
        assert {d.index: d.finish_reason for d in taken if d.finish_reason} == {0: "stop", 1: "length"}
        assert await mailbox.take() == []
        await until(lambda: target.client.num_running == 0)
        assert target.cancelled == []


async def test_one_message_carries_a_step_of_all_requests_of_one_front_door(door: DeliveryServer) -> None:
    other = DeliveryServer()
    await other.start()
    messages: dict[str, list[pb.ReplicaMessage]] = {"door": [], "other": []}
    record(door, messages["door"])
    record(other, messages["other"])
    async with replica() as target:
        mailboxes = await submit(door, target, request("a"), request("b"))
        mailboxes += await submit(other, target, request("c"))
        target.client.deliver([delta(name, name, finish_reason="stop") for name in "abc"])
        for mailbox in mailboxes:
            await read_all(mailbox)
    assert [sorted(d.request_id for d in m.step.deltas) for m in messages["door"]] == [["a", "b"]]
    assert [[d.request_id for d in m.step.deltas] for m in messages["other"]] == [["c"]]
    await other.stop()


def record(door: DeliveryServer, messages: list[pb.ReplicaMessage]) -> None:
    """Keep every message that `door` receives."""
    receive = door.receive

    def recording(connection: object, message: pb.ReplicaMessage) -> None:
        messages.append(message)
        receive(connection, message)  # type: ignore[arg-type]

    door.receive = recording  # type: ignore[method-assign]


async def test_steps_that_wait_for_a_slow_link_become_one_message(door: DeliveryServer) -> None:
    messages: list[pb.ReplicaMessage] = []
    record(door, messages)
    async with replica() as target:
        (mailbox,) = await submit(door, target, request("a"))
        for step in range(1000):  # the loop runs no writer in between: to it the link is slow
            target.client.deliver([delta("a", f"{step} ", finish_reason="length" if step == 999 else None)])
        taken = await read_all(mailbox)
    assert len(messages) == 1
    assert "".join(d.text for d in taken) == "".join(f"{step} " for step in range(1000))
    assert sum(len(d.token_ids) for d in taken) == 1000


async def test_a_slow_consumers_deltas_are_merged() -> None:
    mailbox = Mailbox("a", 1)
    for text in ("one ", "two ", "three"):
        mailbox.put(delta("a", text, logprobs=[TokenLogprob(1, text, -1.0)]))
    (merged,) = await mailbox.take()
    assert merged.text == "one two three"
    assert merged.token_ids == [4, 4, 5]
    assert [logprob.token for logprob in merged.logprobs] == ["one ", "two ", "three"]


async def test_what_came_before_an_error_is_taken_first() -> None:
    mailbox = Mailbox("a", 1)
    mailbox.put(delta("a", "kept"))
    mailbox.put(delta("a", "", finish_reason="error", error=InternalError("broken")))
    mailbox.put(delta("a", "after the end"))
    assert [d.text for d in await mailbox.take()] == ["kept"]
    with pytest.raises(InternalError, match="broken"):
        await mailbox.take()


async def test_an_abandoned_request_is_cancelled_in_its_replica_and_no_other(door: DeliveryServer) -> None:
    async with replica() as target:
        abandoned, kept = await submit(door, target, request("a"), request("b"))
        door.close(abandoned)
        await until(lambda: target.cancelled == ["a"])
        target.client.deliver([delta("a", "late"), delta("b", "x", finish_reason="stop")])
        assert [d.text for d in await read_all(kept)] == ["x"]


async def test_a_request_abandoned_before_it_ran_leaves_nothing(door: DeliveryServer) -> None:
    async with replica() as target:
        link = await target.client.connect(door.address)
        (connection,) = door.connections
        for number in range(50):
            door.close(door.submit(request(f"q{number}"), connection))
        await door.collect()  # comes after them
        await until(lambda: target.client.num_running == 0)
        assert link.requests == {}
        assert sorted(target.cancelled) == sorted(wanted.request_id for wanted in target.running)


async def test_a_finished_request_is_not_cancelled(door: DeliveryServer) -> None:
    async with replica() as target:
        (mailbox,) = await submit(door, target, request("a"))
        target.client.deliver([delta("a", "x", finish_reason="stop")])
        await read_all(mailbox)
        door.close(mailbox)
        await door.collect()  # comes after any cancel
        assert target.cancelled == []
        assert door.num_running == 0


async def test_a_refusal_ends_all_sequences_at_once(door: DeliveryServer) -> None:
    async with replica() as target:
        await target.client.connect(door.address)
        mailbox = door.submit(request("a", n=3, prompt="refuse"), door.connections[0])
        with pytest.raises(InvalidRequest, match="refused") as caught:
            await read_all(mailbox)
        assert caught.value.param == "prompt"
        await until(lambda: target.client.num_running == 0)


async def test_a_defect_in_the_replica_is_an_internal_error_without_its_text(door: DeliveryServer) -> None:
    async with replica() as target:
        await target.client.connect(door.address)
        mailbox = door.submit(request("a", prompt="defect"), door.connections[0])
        with pytest.raises(InternalError) as caught:
            await read_all(mailbox)
        assert "secret" not in str(caught.value)


async def test_a_lost_replica_ends_its_own_requests_only(door: DeliveryServer) -> None:
    async with replica("r1") as lost, replica("r2") as survivor:
        (ended,) = await submit(door, lost, request("a"))
        (kept,) = await submit(door, survivor, request("b"))
        await lost.client.close()
        with pytest.raises(EngineUnavailable):
            await read_all(ended)
        assert [c.replica for c in door.connections] == ["r2"]
        survivor.client.deliver([delta("b", "x", finish_reason="stop")])
        assert [d.text for d in await read_all(kept)] == ["x"]


async def test_a_lost_front_door_cancels_its_requests_in_the_replica(door: DeliveryServer) -> None:
    async with replica() as target:
        (mailbox,) = await submit(door, target, request("a"))
        await door.stop()
        with pytest.raises(EngineUnavailable):
            await read_all(mailbox)
        await until(lambda: target.cancelled == ["a"] and target.client.num_running == 0)


async def test_a_draining_replica_finishes_what_it_has_and_gets_no_more(door: DeliveryServer) -> None:
    async with replica() as target:
        (mailbox,) = await submit(door, target, request("a"))
        drained = asyncio.create_task(target.client.drain(WAIT))
        await until(lambda: not door.connections)
        assert not drained.done()
        target.client.deliver([delta("a", "x", finish_reason="stop")])
        assert [d.text for d in await read_all(mailbox)] == ["x"]
        await asyncio.wait_for(drained, WAIT)


async def test_a_replica_that_has_withdrawn_gets_nothing_from_any_front_door(door: DeliveryServer) -> None:
    other = DeliveryServer()
    await other.start()
    async with replica("failed") as failed, replica("works") as works:
        (mailbox,) = await submit(door, failed, request("a"))
        await works.client.connect(door.address)
        failed.client.withdraw()
        await until(lambda: [c.replica for c in door.connections] == ["works"])
        failed.client.deliver([delta("a", "x", finish_reason="stop")])
        assert [d.text for d in await read_all(mailbox)] == ["x"]
        await failed.client.connect(other.address)
        await until(lambda: not other.connections)
    await other.stop()


async def test_a_replica_connects_again_after_its_link_broke(door: DeliveryServer) -> None:
    async with replica() as target:
        first: Link = await target.client.connect(door.address)
        await first.close()
        second = await target.client.connect(door.address)
        await until(lambda: [c.name for c in door.connections] == [second.name])
        assert second.name != first.name


async def test_a_wrong_token_is_refused(door: DeliveryServer) -> None:
    async with replica() as target:
        with pytest.raises(EngineUnavailable):
            await target.client.connect(replace(door.address, token="guess"))
    assert not door.connections


async def test_an_id_in_use_is_refused_here_and_across_front_doors(door: DeliveryServer) -> None:
    other = DeliveryServer()
    await other.start()
    async with replica() as target:
        (mailbox,) = await submit(door, target, request("a"))
        with pytest.raises(Conflict):
            door.submit(request("a"), door.connections[0])
        (again,) = await submit(other, target, request("a"))
        with pytest.raises(Conflict):
            await read_all(again)
        target.client.deliver([delta("a", "x", finish_reason="stop")])
        assert [d.text for d in await read_all(mailbox)] == ["x"]
    await other.stop()


async def test_metrics_of_all_replicas_are_collected(door: DeliveryServer) -> None:
    async with replica("r1") as first, replica("r2") as second:
        await first.client.connect(door.address)
        await second.client.connect(door.address)
        reports, is_whole = await door.collect()
        assert sorted(report.metrics for report in reports) == [b"# metrics of r1\n", b"# metrics of r2\n"]
        assert is_whole


async def test_a_replica_tells_every_front_door_which_adapters_it_has_requests_for(door: DeliveryServer) -> None:
    async with replica() as target:
        base, adapted = request("a"), replace(request("b"), adapter=AdapterRef("acme/x:3", "0" * 64, 8))
        await submit(door, target, base, adapted)
        other = DeliveryServer()
        await other.start()
        await target.client.connect(other.address)
        for each in (door, other):
            reports, _ = await each.collect()
            assert [list(report.adapters) for report in reports] == [["acme/x:3"]]
        target.client.deliver([delta("b", "x", finish_reason="stop")])
        await until(lambda: target.client.num_running == 1)
        reports, _ = await other.collect()
        assert [list(report.adapters) for report in reports] == [[]]
        await other.stop()


async def test_a_replica_that_does_not_answer_is_missed(door: DeliveryServer) -> None:
    async with replica() as target:
        await target.client.connect(door.address)
        assert await door.collect(timeout_s=0.0) == ([], False)
