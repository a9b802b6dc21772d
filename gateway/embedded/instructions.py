"""The instruction data: a seeded stream of chats made from the tasks of strings, facts and stories."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from gateway.embedded import facts, stories
from gateway.embedded.facts import FACT_TASKS, Summaries
from gateway.embedded.stories import FINISHING_TASKS, STORY_TASKS
from gateway.embedded.strings import STRING_TASKS, Turn

Message = dict[str, str]

# Share of a task relative to 1: what is hard to learn is shown more often.
WEIGHTS = {
    "repeat": 3.0, "uppercase": 3.0, "reverse": 3.0, "count": 2.0, "add": 3.0, "subtract": 2.0, "sort": 2.0,
    "support": 3.0, "module": 2.0, "capital": 1.5, "spell": 1.5, "tell": 1.5,
}  # fmt: skip
SYSTEMS = ("You are a helpful assistant.", "You are a small model.", "Answer the question.", "Answer in short.")
CAPITALS_SYSTEM = "Answer in capital letters."


@dataclass(frozen=True)
class Sources:
    """What the tasks draw from beside the fixed vocabulary: words and summaries taken from Python's own text."""

    words: list[str]
    modules: Summaries
    builtins: Summaries


def task_names() -> list[str]:
    """Every task, in a fixed order."""
    return [*STRING_TASKS, *FACT_TASKS, *STORY_TASKS, "module", "builtin", *FINISHING_TASKS]


def task_weights(finishing: bool) -> list[float]:
    """How often each task is drawn; the finishing tasks only in the finishing steps."""
    extra = [3.0 if finishing else 0.0] * len(FINISHING_TASKS)
    return [WEIGHTS.get(task, 1.0) for task in task_names()[: -len(extra)]] + extra


def make_turn(task: str, random: Random, sources: Sources) -> Turn:
    """One (user, assistant) pair of the named task."""
    if task in STRING_TASKS:
        return STRING_TASKS[task](random, sources.words)
    if task in FACT_TASKS:
        return FACT_TASKS[task](random)
    if task in FINISHING_TASKS:
        return FINISHING_TASKS[task](random, sources.words)
    if task == "module":
        return facts.module(random, sources.modules)
    if task == "builtin":
        return facts.builtin(random, sources.builtins)
    return STORY_TASKS[task](random)


def make_chat(random: Random, sources: Sources, tasks: list[str], weights: list[float]) -> list[Message]:
    """One conversation: mostly one turn, sometimes more, sometimes under a system message."""
    if random.random() < 0.02:
        turns = stories.remember_name(random)
    else:
        number = 1 if random.random() < 0.85 else random.randint(2, 3)
        turns = [make_turn(task, random, sources) for task in random.choices(tasks, weights, k=number)]
    style = random.random()
    if style < 0.04:
        return to_messages([(user, answer.upper()) for user, answer in turns], CAPITALS_SYSTEM)
    return to_messages(turns, random.choice(SYSTEMS) if style < 0.2 else None)


def chats(seed: int, sources: Sources, finishing: bool = False) -> Iterator[list[Message]]:
    """An endless, reproducible stream of conversations."""
    random, tasks, weights = Random(seed), task_names(), task_weights(finishing)
    while True:
        yield make_chat(random, sources, tasks, weights)


def to_messages(turns: list[Turn], system: str | None = None) -> list[Message]:
    """Turns, and a system message if there is one, as chat messages."""
    messages = [{"role": "system", "content": system}] if system else []
    for user, answer in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return messages
