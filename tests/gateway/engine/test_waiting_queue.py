"""The order of those that wait, against a list that is searched from its start."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.engine.detokenizer import IncrementalDetokenizer, TokenTable
from gateway.engine.request import GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.sampling_row import SamplingRow
from gateway.engine.sequence import RunningRequest, Sequence
from gateway.engine.waiting_queue import WaitingQueue
from tests.tiny import make_tokenizer

Make = Callable[..., Sequence]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    table = TokenTable(make_tokenizer(tmp_path_factory.mktemp("tok")).backend_tokenizer)
    params, clock = SamplingParams(), count()

    def sequence(tenant: str = "a", priority: int = 0, weight: float = 1.0) -> Sequence:
        request = GenerateRequest("r", params, prompt=[1], tenant=tenant, priority=priority, tenant_weight=weight)
        running = RunningRequest(request, 1, 16, arrived_at=next(clock))
        return Sequence(running, 0, [1], b"", SamplingRow(params, [1], 1), IncrementalDetokenizer(table, [1], params))

    return sequence


def taken(queue: WaitingQueue, number: int = 1000, cost: float = 0) -> list[Sequence]:
    """Take so many, each of which is charged when it is taken."""
    order = []
    while len(order) < number and (sequence := queue.next()) is not None:
        queue.take(sequence)
        sequence.tenant.charge(cost)
        order.append(sequence)
    queue.rewind()
    return order


def queue_of(*sequences: Sequence) -> WaitingQueue:
    queue = WaitingQueue()
    for sequence in sequences:
        queue.add(sequence)
    return queue


def test_lower_priorities_come_first_and_equals_as_they_arrived(make: Make) -> None:
    late, first, second, early = make(priority=3), make(), make(), make(priority=-2)
    assert taken(queue_of(late, first, second, early)) == [early, first, second, late]


def test_who_was_served_least_comes_first(make: Make) -> None:
    many, few = [make("many") for _ in range(6)], [make("few") for _ in range(2)]
    order = taken(queue_of(*many, *few), cost=10)
    assert [s.request.request.tenant for s in order] == ["many", "few"] * 2 + ["many"] * 4


def test_a_weight_is_a_share(make: Make) -> None:
    queue = queue_of(*(make("small") for _ in range(40)), *(make("big", weight=3.0) for _ in range(40)))
    order = [s.request.request.tenant for s in taken(queue, 40, cost=10)]
    assert order.count("big") == 30


@pytest.mark.parametrize("priority", [0, 9], ids=["away", "with_less_urgent_requests_alone"])
def test_nobody_saves_up_service_while_away(make: Make, priority: int) -> None:
    queue = queue_of(*(make("busy") for _ in range(20)), make("idle", priority=priority))
    taken(queue, 10, cost=10)
    for _ in range(10):
        queue.add(make("idle"))
    order = [s.request.request.tenant for s in taken(queue, 6, cost=10)]
    assert order.count("idle") == 3


def test_a_less_urgent_request_costs_a_tenant_no_place(make: Make) -> None:
    served, busy = make("served", priority=1), make("busy")
    queue = queue_of(served, busy, make("modest"))
    served.tenant.charge(100)
    busy.tenant.charge(10)
    queue.add(make("modest", priority=1))
    assert [s.request.request.tenant for s in taken(queue, 2)] == ["modest", "busy"]


def test_soon_is_one_of_each_tenant_in_turn_the_least_served_first(make: Make) -> None:
    many, other, low = [make("many") for _ in range(40)], make("other"), make("other", priority=1)
    queue = queue_of(*many, other, low)
    many[0].tenant.charge(10)
    assert list(queue.soon(100)) == [other, *many, low]
    assert list(queue.soon(3)) == [other, *many[:2]]
    other.tenant.charge(20)
    assert list(queue.soon(3)) == [many[0], other, many[1]]
    assert set(queue) == {other, *many, low}


def test_what_a_tenant_was_served_is_remembered_while_it_is_away(make: Make) -> None:
    queue = queue_of(make("greedy"), make("modest"))
    for sequence, cost in zip(taken(queue), (1000, 10), strict=True):
        sequence.tenant.charge(cost)
    for tenant in ("modest", "greedy"):
        for _ in range(3):
            queue.add(make(tenant))
    assert [s.request.request.tenant for s in taken(queue, cost=10)] == ["modest"] * 3 + ["greedy"] * 3


def test_what_goes_back_is_the_first_of_its_tenant(make: Make) -> None:
    preempted, waits = make(), make()
    queue = queue_of(waits)
    queue.add(preempted, first=True)
    assert taken(queue) == [preempted, waits]


def test_what_keeps_its_place_is_next_whatever_its_tenant_is_served(make: Make) -> None:
    big, small, urgent = make("big"), make("small"), make("small", priority=-1)
    queue = queue_of(big, small)
    assert queue.next() is big
    queue.pass_over(big, keeps_place=True)
    assert queue.next() is small
    queue.rewind()
    big.tenant.charge(1000)
    queue.add(urgent)
    assert taken(queue) == [urgent, big, small]


def test_one_tenant_in_vain_does_not_hide_the_others(make: Make) -> None:
    queue = queue_of(*(make("stuck") for _ in range(500)), make("other"))
    looked_at = []
    while (sequence := queue.next()) is not None:
        queue.pass_over(sequence)
        looked_at.append(sequence)
    assert looked_at[-1].request.request.tenant == "other"
    assert len(looked_at) == 17


def test_a_step_looks_at_a_bounded_number(make: Make) -> None:
    queue = queue_of(*(make(str(i)) for i in range(1000)))
    looked_at = 0
    while (sequence := queue.next()) is not None:
        queue.pass_over(sequence)
        looked_at += 1
    assert looked_at == 256
    queue.rewind()
    assert len(taken(queue)) == 1000


def test_only_what_is_more_urgent_is_asked_for(make: Make) -> None:
    plain = make(priority=1)
    queue = queue_of(plain)
    assert queue.next(before=1) is None
    assert queue.next(before=2) is plain


class Model:
    """The same order, by search."""

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []  # as they lie in their tenants' lines
        self.heads: dict[int, Sequence] = {}
        self.passed: set[Sequence] = set()

    def may_be_next(self) -> set[Sequence]:
        for priority in sorted({s.priority for s in self.waiting}):
            head = self.heads.get(priority)
            if head is not None and head not in self.passed:
                return {head}
            firsts: dict[object, Sequence] = {}
            for s in self.waiting:
                if s.priority == priority and s is not head and s not in self.passed:
                    firsts.setdefault(s.tenant, s)
            if firsts:
                least = min(s.tenant.served for s in firsts.values())
                return {s for s in firsts.values() if s.tenant.served == least}
        return set()

    def remove(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        if self.heads.get(sequence.priority) is sequence:
            del self.heads[sequence.priority]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_use_gives_the_order_of_the_search(make: Make, data: st.DataObject) -> None:
    queue, model, gone = WaitingQueue(), Model(), [make()]
    for _ in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["add", "add", "first", "cancel", "walk"]))
        if action in ("add", "first"):
            sequence = make(data.draw(st.sampled_from("abc")), data.draw(st.integers(0, 2)))
            queue.add(sequence, first=action == "first")
            model.waiting.insert(0 if action == "first" else len(model.waiting), sequence)
        elif action == "cancel":
            sequence = data.draw(st.sampled_from(model.waiting or gone))
            queue.discard(sequence)
            if sequence in model.waiting:
                model.remove(sequence)
        else:
            for outcome in data.draw(st.lists(st.sampled_from(["take", "pass", "hold"]), max_size=8)):
                found = queue.next()
                assert found in (model.may_be_next() or {None})
                if found is None:
                    break
                if outcome == "take":
                    queue.take(found)
                    model.remove(found)
                    found.tenant.charge(data.draw(st.sampled_from([0, 1, 5])))
                else:
                    queue.pass_over(found, keeps_place=outcome == "hold")
                    model.passed.add(found)
                    if outcome == "hold":
                        model.heads.setdefault(found.priority, found)
            queue.rewind()
            model.passed.clear()
        assert len(queue) == len(model.waiting)
        assert sorted(map(id, queue)) == sorted(map(id, model.waiting))
