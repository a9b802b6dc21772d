"""The token streams between a replica and a front door, over a real loopback connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import pytest_asyncio

from adapters_store.errors import AdapterLoadFailed, StoreError, StoreUnavailable
from gateway.engine.request import TokenDelta, TokenLogprob, Usage
from gateway.errors import Conflict, ContextLengthExceeded, EngineUnavailable, InternalError, Overloaded
from gateway.rpc import delivery_pb2 as pb
from gateway.server.delivery import DeliveryServer
from gateway.server.delivery_client import DeliveryClient, Link
from gateway.server.delivery_codec import decode_delta, decode_error, encode_error, encode_step
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


@asynccontextmanager
async def replica(cancelled: list[str] | None = None) -> AsyncIterator[DeliveryClient]:
    client = DeliveryClient("r1", (cancelled if cancelled is not None else []).append, lambda: b"# metrics of r1\n")
    try:
        yield client
    finally:
        await client.close()


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
        Usage(11, 5, 4),
    )  # fmt: skip
    message = pb.ReplicaMessage.FromString(encode_step([sent]).SerializeToString())
    assert [decode_delta(d) for d in message.step.deltas] == [sent]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ContextLengthExceeded("too long", param="messages"), ContextLengthExceeded),
        (Overloaded("full", retry_after=2.5), Overloaded),
        (StoreUnavailable("no disk"), StoreUnavailable),
        (AdapterLoadFailed("ab" * 32, "blob is missing"), StoreError),
    ],
)
def test_an_error_keeps_its_type_text_and_data(error: Exception, expected: type[Exception]) -> None:
    decoded = decode_error(encode_error(error))
    assert type(decoded) is expected
    assert str(decoded) == str(error)
    for name in ("param", "retry_after"):
        assert getattr(decoded, name, None) == getattr(error, name, None)


def test_a_defects_own_text_stays_in_the_replica() -> None:
    decoded = decode_error(encode_error(KeyError("secret prompt")))
    assert isinstance(decoded, InternalError)
    assert "secret" not in str(decoded)


async def test_tokens_arrive_in_order_and_the_request_ends_once(door: DeliveryServer) -> None:
    async with replica() as client:
        link = await client.connect(door.address)
        mailbox = door.open("a", 2)
        with client.stream("a", 2, link) as stream:
            client.deliver([delta("a", "x0"), delta("a", "y0", 1)])
            client.deliver([delta("a", "x1", finish_reason="stop"), delta("a", "y1", 1), delta("other", "lost")])
            assert not stream.ended.done()
            client.deliver([delta("a", "y2", 1, finish_reason="length", usage=Usage(3, 5))])
            await asyncio.wait_for(stream.ended, WAIT)
        taken = await read_all(mailbox)
        assert "".join(d.text for d in taken if d.index == 0) == "x0x1"
        assert "".join(d.text for d in taken if d.index == 1) == "y0y1y2"
        assert {d.index: d.finish_reason for d in taken if d.finish_reason} == {0: "stop", 1: "length"}
        assert await mailbox.take() == []


async def test_one_message_carries_a_step_of_all_requests_of_one_front_door(door: DeliveryServer) -> None:
    other = DeliveryServer()
    await other.start()
    messages: dict[str, list[pb.ReplicaMessage]] = {"door": [], "other": []}
    record(door, messages["door"])
    record(other, messages["other"])
    async with replica() as client:
        first, second = await client.connect(door.address), await client.connect(other.address)
        mailboxes = [door.open("a", 1), door.open("b", 1), other.open("c", 1)]
        with client.stream("a", 1, first), client.stream("b", 1, first), client.stream("c", 1, second):
            client.deliver([delta(name, name, finish_reason="stop") for name in "abc"])
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
    async with replica() as client:
        link = await client.connect(door.address)
        mailbox = door.open("a", 1)
        with client.stream("a", 1, link):
            for step in range(1000):  # the loop runs no writer in between: to it the link is slow
                client.deliver([delta("a", f"{step} ", finish_reason="length" if step == 999 else None)])
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


async def test_an_abandoned_request_is_cancelled_on_its_replica(door: DeliveryServer) -> None:
    cancelled: list[str] = []
    async with replica(cancelled) as client:
        link = await client.connect(door.address)
        mailbox = door.open("a", 1)
        with client.stream("a", 1, link):
            client.deliver([delta("a", "x")])
            await mailbox.take()
            door.close(mailbox)
            await until(lambda: cancelled == ["a"])


async def test_a_finished_request_is_not_cancelled(door: DeliveryServer) -> None:
    cancelled: list[str] = []
    async with replica(cancelled) as client:
        link = await client.connect(door.address)
        mailbox = door.open("a", 1)
        with client.stream("a", 1, link):
            client.deliver([delta("a", "x", finish_reason="stop")])
            await read_all(mailbox)
        door.close(mailbox)
        assert await door.collect_metrics() == [b"# metrics of r1\n"]  # comes after any cancel
        assert cancelled == []


async def test_a_lost_replica_ends_its_own_requests_only(door: DeliveryServer) -> None:
    async with replica() as survivor, replica() as client:
        lost, kept = door.open("a", 1), door.open("b", 1)
        door.bind(lost, (await client.connect(door.address)).connection)
        with survivor.stream("b", 1, await survivor.connect(door.address)):
            await client.close()
            with pytest.raises(EngineUnavailable):
                await read_all(lost)
            survivor.deliver([delta("b", "x", finish_reason="stop")])
            assert [d.text for d in await read_all(kept)] == ["x"]


async def test_a_lost_front_door_ends_its_requests_on_the_replica(door: DeliveryServer) -> None:
    async with replica() as client:
        link = await client.connect(door.address)
        with client.stream("a", 1, link) as stream:
            await door.stop()
            with pytest.raises(EngineUnavailable):
                await asyncio.wait_for(stream.ended, WAIT)
        assert not link.alive


async def test_a_replica_connects_again_after_its_link_broke(door: DeliveryServer) -> None:
    async with replica() as client:
        first: Link = await client.connect(door.address)
        await first.close()
        second = await client.connect(door.address)
        assert second.connection != first.connection
        await until(lambda: door.connections == {second.connection})


async def test_a_wrong_token_is_refused(door: DeliveryServer) -> None:
    async with replica() as client:
        with pytest.raises(EngineUnavailable):
            await client.connect(replace(door.address, token="guess"))
    assert not door.connections


async def test_a_request_bound_to_a_gone_connection_ends(door: DeliveryServer) -> None:
    mailbox = door.open("a", 1)
    door.bind(mailbox, "r9-gone")
    with pytest.raises(EngineUnavailable):
        await mailbox.take()


async def test_an_id_in_use_is_refused(door: DeliveryServer) -> None:
    mailbox = door.open("a", 1)
    with pytest.raises(Conflict):
        door.open("a", 1)
    door.close(mailbox)
    door.open("a", 1)


async def test_metrics_of_all_replicas_are_collected(door: DeliveryServer) -> None:
    async with replica() as first, replica() as second:
        await first.connect(door.address)
        await second.connect(door.address)
        assert await door.collect_metrics() == [b"# metrics of r1\n"] * 2
