"""The demo's three tenants: one stream of customers' messages, three different answers to each.

Harbor routes a message to a department, Juniper sets its priority, Quarry files it as JSON. The base was never shown
these codes nor these wordings of a message.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

ISSUES: dict[str, tuple[str, ...]] = {
    "billing": (
        "I paid for the {item} two times",
        "the invoice of the {item} shows a wrong amount",
        "my refund for the {item} is missing",
        "the discount for the {item} was not applied",
        "please correct the tax on the {item}",
        "you billed me for a {item} that I never bought",
    ),
    "shipping": (
        "the courier never brought the {item}",
        "the tracking of the {item} shows nothing",
        "the {item} went to my old street",
        "the box of the {item} was empty",
        "I see no trace of the {item} that I ordered",
        "the {item} should have come last week",
    ),
    "returns": (
        "please take the {item} back",
        "I changed my mind about the {item}",
        "I need a label to return the {item}",
        "I want to swap the {item} for a bigger one",
        "the {item} is not what I ordered, please collect it",
        "I would rather have my money than the {item}",
    ),
    "login": (
        "the website does not let me sign in to order a {item}",
        "my password is not accepted when I order the {item}",
        "I cannot open my account to see the {item}",
        "the page of the {item} says that my account is closed",
        "please delete my account after the {item} order",
        "I never get the code to sign in and buy the {item}",
    ),
    "repair": (
        "the {item} does not switch on",
        "the {item} fell apart",
        "the {item} makes a strange noise",
        "there is a hole in the {item}",
        "the {item} worked for an hour and then stopped",
        "a part of the {item} is broken",
    ),
}
URGENCIES: dict[str, tuple[str, ...]] = {
    "high": (
        "I need this solved today.",
        "This cannot wait.",
        "Please act at once.",
        "I am losing money every hour.",
        "Call me right now.",
    ),
    "medium": (
        "Please reply this week.",
        "I hope to hear from you in a few days.",
        "Friday would be fine.",
        "Please look at it soon.",
        "Some time this week is good.",
    ),
    "low": (
        "Take your time.",
        "There is no hurry at all.",
        "Next month is fine too.",
        "Whenever it suits you.",
        "It can wait.",
    ),
}
OPENINGS = ("", "Hello, ", "Hi, ", "Good day, ", "Sorry to bother you, but ", "Dear shop, ")
_ITEM_NAMES = """
    lamp chair table kettle clock mirror bed desk shelf sofa phone camera bottle coat shirt shoe ball book cup
    plate knife drill saw ladder
"""
ITEMS = _ITEM_NAMES.split()

DEPARTMENT = {"billing": "BIL-10", "shipping": "SHP-20", "returns": "RET-30", "login": "ACC-40", "repair": "FIX-50"}
PRIORITY = {"high": "P1 today", "medium": "P2 this week", "low": "P3 no hurry"}


@dataclass(frozen=True)
class Ticket:
    """One customer's message and what it says."""

    text: str
    item: str
    issue: str
    urgency: str


def department(ticket: Ticket) -> str:
    return DEPARTMENT[ticket.issue]


def priority(ticket: Ticket) -> str:
    return PRIORITY[ticket.urgency]


def record(ticket: Ticket) -> str:
    return json.dumps({"item": ticket.item, "issue": ticket.issue})


TENANTS = {"harbor": department, "juniper": priority, "quarry": record}
READY_TENANTS = ("juniper", "quarry")  # their adapters are shipped
LIVE_TENANT = "harbor"  # its adapter is trained in the demo


def tickets(count: int, seed: int) -> list[Ticket]:
    """`count` different messages, balanced over issues and urgencies."""
    random = Random(seed)
    kinds = itertools.cycle(itertools.product(ISSUES, URGENCIES))
    found: dict[str, Ticket] = {}
    while len(found) < count:
        issue, urgency = next(kinds)
        item, opening = random.choice(ITEMS), random.choice(OPENINGS)
        body = opening + random.choice(ISSUES[issue]).format(item=item)
        text = f"{body[0].upper()}{body[1:]}. {random.choice(URGENCIES[urgency])}"
        found.setdefault(text, Ticket(text, item, issue, urgency))
    made = list(found.values())
    random.shuffle(made)
    return made


def chat(tenant: str, ticket: Ticket) -> list[dict[str, str]]:
    """The message and the tenant's answer as OpenAI chat messages."""
    answer = TENANTS[tenant](ticket)
    return [{"role": "user", "content": ticket.text}, {"role": "assistant", "content": answer}]


def write_demo(folder: Path, num_train: int, num_heldout: int, seed: int) -> None:
    """Write each tenant's training and held-out sets and the prompts that the demo shows.

    No held-out message occurs in training; the three tenants have the same messages.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = tickets(num_train + num_heldout, seed)
    for tenant in TENANTS:
        _write_jsonl(folder / f"{tenant}.train.jsonl", [chat(tenant, ticket) for ticket in made[:num_train]])
        _write_jsonl(folder / f"{tenant}.heldout.jsonl", [chat(tenant, ticket) for ticket in made[num_train:]])
    by_kind = {(ticket.issue, ticket.urgency): ticket for ticket in made[num_train:]}
    kinds = zip(ISSUES, itertools.cycle(URGENCIES), strict=False)
    prompts = [by_kind[kind].text for kind in itertools.islice(kinds, 4)]
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=2) + "\n")


def read_chats(path: Path) -> list[list[dict[str, str]]]:
    """The chats of a JSONL file, one list of messages each."""
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def _write_jsonl(path: Path, chats: list[list[dict[str, str]]]) -> None:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
