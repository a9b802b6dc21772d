"""The generated data: instructions, messages, packing, and the NF4 round trip of training."""

from __future__ import annotations

from itertools import islice
from random import Random

import pytest
import torch

from gateway.embedded import stories, tenants
from gateway.embedded.instructions import Sources, chats, make_turn, task_names
from gateway.embedded.packing import pack
from gateway.embedded.quantization import round_trip
from gateway.embedded.text import clean
from gateway.embedded.train import Phase, Recipe, learning_rate
from lora_kernels.nf4 import dequantize_nf4, quantize_nf4

SOURCES = Sources(["file", "value", "object"], {"json": "Reads JSON."}, {"len": "Return the length."})


def test_chats_are_reproducible() -> None:
    first, again = (list(islice(chats(5, SOURCES), 50)) for _ in range(2))
    assert first == again
    assert first != list(islice(chats(6, SOURCES), 50))


@pytest.mark.parametrize("task", task_names())
def test_every_task_makes_an_answer_that_ends_cleanly(task: str) -> None:
    random = Random(1)
    for _ in range(50):
        question, answer = make_turn(task, random, SOURCES)
        assert question.strip()
        assert answer == answer.strip() != ""


def test_finishing_tasks_are_kept_out_of_the_main_training() -> None:
    answers = {chat[-1]["content"] for chat in islice(chats(3, SOURCES), 2000)}
    assert stories.UNKNOWN_ANSWER not in answers
    finishing = {chat[-1]["content"] for chat in islice(chats(3, SOURCES, finishing=True), 2000)}
    assert stories.UNKNOWN_ANSWER in finishing


def test_the_tenants_wordings_are_not_the_bases() -> None:
    known = {phrase.lower() for phrases in stories.MESSAGES.values() for phrase in phrases}
    known |= {phrase.lower() for phrase in stories._COMPLAINTS}
    assert not known & {phrase.lower() for phrases in tenants.ISSUES.values() for phrase in phrases}


def test_tickets_are_distinct_and_answered_by_every_tenant() -> None:
    made = tenants.tickets(60, seed=1)
    assert len({ticket.text for ticket in made}) == 60
    answers = [{name: make(ticket) for name, make in tenants.TENANTS.items()} for ticket in made]
    assert all(len(set(given.values())) == 3 for given in answers)


def test_pack_fills_rows_with_whole_examples() -> None:
    examples = [([0, 7, 8], [False, True, True]), ([0, 9], [False, True]), ([0, 5, 5, 5], [False] * 4)]
    rows = pack(examples, length=5, pad=3)
    assert rows.ids.tolist() == [[0, 7, 8, 0, 9], [0, 5, 5, 5, 3]]
    assert rows.trained.tolist() == [[False, True, True, False, True], [False] * 5]


def test_round_trip_is_close_to_what_serving_packs() -> None:
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)) * 0.05
    served = dequantize_nf4(quantize_nf4(weight), torch.float32)
    trained = round_trip(weight)
    assert (served - trained).norm() < 0.02 * (served - weight).norm() + 0.01 * weight.norm()
    assert (trained - weight).norm() < 0.11 * weight.norm()


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    recipe = Recipe(phases=(Phase(100, 256, nf4=False),), warmup_steps=10, decay_share=0.5)
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert rates[0] == pytest.approx(recipe.peak_lr / 10)
    assert max(rates) == recipe.peak_lr
    assert rates[-1] == pytest.approx(recipe.peak_lr / 50)


def test_clean_joins_lines_and_drops_code() -> None:
    text = "This is a line of prose that\nwas wrapped by hand.\n\n>>> x = f(1)\n\n{'a': [1, 2, 3], 'b': (4, 5)} == {}\n"
    assert clean(text) == "This is a line of prose that was wrapped by hand."
