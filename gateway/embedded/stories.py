"""Generated prose and talk: sentences, small stories, continuations, greetings, customers' messages."""

from __future__ import annotations

from random import Random

from gateway.embedded import vocabulary as v
from gateway.embedded.strings import Turn


def subject(random: Random) -> str:
    """A noun phrase such as "the old sailor"."""
    noun = random.choice(v.PEOPLE if random.random() < 0.6 else v.ANIMALS)
    return f"the {random.choice(v.ADJECTIVES)} {noun}" if random.random() < 0.7 else f"the {noun}"


def predicate(random: Random) -> str:
    """What the subject did, without the full stop."""
    thing = f"{random.choice(v.ADJECTIVES)} {random.choice(v.THINGS)}"
    article = "an" if thing[0] in "aeiou" else "a"
    forms = (
        f"{random.choice(v.VERBS_PAST)} {article} {thing} in the {random.choice(v.PLACES)}",
        f"walked {random.choice(v.ADVERBS)} to the {random.choice(v.PLACES)}",
        f"went to the {random.choice(v.PLACES)} with {random.choice(v.NAMES)}",
        f"{random.choice(v.VERBS_PAST)} the {random.choice(v.THINGS)} and was {random.choice(v.ADJECTIVES)}",
        f"lived near the {random.choice(v.PLACES)} and had {_article(random.choice(v.ANIMALS))}",
        f"gave the {random.choice(v.THINGS)} to {subject(random)}",
        f"waited in the {random.choice(v.PLACES)} until it was dark",
    )
    return random.choice(forms)


def sentence(random: Random) -> str:
    start = subject(random) if random.random() < 0.7 else random.choice(v.NAMES)
    text = f"{start} {predicate(random)}."
    return text[0].upper() + text[1:]


def story(random: Random) -> str:
    """Four to seven sentences about one person: an opening, what happened, an end."""
    name, person = random.choice(v.NAMES), random.choice(v.PEOPLE)
    adjective, place = random.choice(v.ADJECTIVES), random.choice(v.PLACES)
    opening = random.choice(
        (
            f"Once upon a time there was {_article(adjective)} {person} called {name}.",
            f"{name} was {_article(adjective)} {person} who lived near the {place}.",
            f"It was a {random.choice(v.WEATHER)} day, and {name} the {person} was in the {place}.",
        )
    )
    linked = [
        f"{random.choice(('One day', 'Then', 'After that', 'In the morning', 'Later'))} {name} {predicate(random)}."
        for _ in range(random.randint(2, 5))
    ]
    end = random.choice(
        (
            f"In the end {name} was {random.choice(v.ADJECTIVES)} and went home.",
            f"That evening {name} told {random.choice(v.NAMES)} about it.",
            f"From that day on {name} was never {random.choice(v.ADJECTIVES)} again.",
        )
    )
    return " ".join((opening, *linked, end))


def _article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def tell(random: Random) -> Turn:
    text = story(random)
    words = text.split()
    name = next(word for word in (token.strip(".,") for token in words) if word in v.NAMES)
    asks = (
        "Tell me a story.",
        "Write a short story.",
        f"Tell me a story about {name}.",
        f"Write a story about {name}.",
    )
    return random.choice(asks), text


def continue_sentence(random: Random) -> Turn:
    start, rest = subject(random), predicate(random)
    ask = random.choice(("Continue", "Continue the sentence", "Finish this sentence", "Complete"))
    start = start[0].upper() + start[1:]
    return f"{ask}: {start}", f"{start} {rest}."


def write_sentence(random: Random) -> Turn:
    noun = random.choice(v.PEOPLE + v.ANIMALS)
    return f"Write a sentence about a {noun}.", f"The {noun} {predicate(random)}."


def greet(random: Random) -> Turn:
    name = random.choice(v.NAMES)
    return random.choice(
        (
            (f"Hello, I am {name}.", f"Hello {name}! How can I help you?"),
            (f"My name is {name}.", f"Nice to meet you, {name}!"),
            (f"Say hello to {name}.", f"Hello, {name}!"),
            (f"Greet {name}.", f"Hello, {name}!"),
            (f"Wish {name} a good day.", f"Have a good day, {name}!"),
        )
    )


def about_self(random: Random) -> Turn:
    return random.choice(list(v.SELF.items()))


def read_sentence(random: Random) -> Turn:
    """A question about a sentence given in the prompt."""
    name, place, thing = random.choice(v.NAMES), random.choice(v.PLACES), random.choice(v.THINGS)
    verb = random.choice(v.VERBS_PAST)
    text = f"{name} {verb} a {thing} in the {place}."
    return random.choice(
        (
            (f"{text} Who {verb} a {thing}?", name),
            (f"{text} Where was {name}?", f"In the {place}."),
            (f"{text} What was in the {place}?", f"A {thing}."),
        )
    )


def remember_name(random: Random) -> list[Turn]:
    """Two turns: the second asks for what the first told."""
    name, thing = random.choice(v.NAMES), random.choice(v.THINGS)
    if random.random() < 0.6:
        return [(f"My name is {name}.", f"Nice to meet you, {name}!"), ("What is my name?", f"Your name is {name}.")]
    return [(f"I have a {thing}.", f"That is a nice {thing}."), ("What do I have?", f"You have a {thing}.")]


# A customer's message: what it is about, how it may be worded, and how the base answers. The demo's tenants use
# other wordings (tenants.py), so none of their messages can occur here.
MESSAGES: dict[str, tuple[str, ...]] = {
    "payment": (
        "I was charged twice for the {item}",
        "The bill for the {item} is wrong",
        "My card was refused when I paid for the {item}",
        "You took too much money for the {item}",
    ),
    "delivery": (
        "My {item} has not arrived",
        "The parcel with the {item} is late",
        "I am still waiting for the {item}",
        "The {item} was sent to the wrong address",
    ),
    "return": (
        "I want to send the {item} back",
        "I would like to return the {item}",
        "The {item} is the wrong size and I do not want it",
        "How can I give the {item} back",
    ),
    "account": (
        "I cannot log in to order the {item}",
        "I forgot my password and cannot see the order of the {item}",
        "Please change the email of my account, I ordered the {item}",
        "My account is locked and I need the {item}",
    ),
    "repair": (
        "The {item} does not work",
        "My {item} is broken",
        "The {item} stopped after one day",
        "There is a crack in the {item}",
    ),
    "stock": (
        "Do you have the {item} in red",
        "Is the {item} in stock",
        "When can I buy the {item} again",
        "How much is the {item}",
    ),
}
_HURRY = ("I need help now.", "Please answer fast.", "It is very urgent.")
_CALM = ("There is no rush.", "Answer when you can.", "It is not urgent.")


def support(random: Random) -> Turn:
    """A customer's message, answered politely, or a question about one."""
    topic = random.choice(list(MESSAGES))
    item = random.choice(v.THINGS + v.TOOLS + v.FURNITURE)
    body = random.choice(MESSAGES[topic]).format(item=item) + random.choice(".!")
    hurry = random.random() < 0.5
    ending = random.choice(_HURRY if hurry else _CALM)
    message = random.choice(("", "Hello. ", "Dear team. ")) + body
    style = random.random()
    if style < 0.4:
        if random.random() < 0.6:
            message = f"{message} {ending}"
        return message, f"Thank you for your message about the {topic} of your {item}. We will look into it."
    if style < 0.6:
        return f"What is this message about? {message}", f"It is about the {topic} of the {item}."
    if style < 0.8:
        return f"Which product is in this message? {message} {ending}", f"The {item}."
    return f"Is this message urgent? {message} {ending}", "Yes, it is urgent." if hurry else "No, it is not urgent."


# More wordings, for the finishing steps only: what any customer may write gets a courteous answer.
_COMPLAINTS = (
    "I have a question about the {item}",
    "I am not happy with the {item}",
    "you sent me two of the {item} and I want one",
    "the {item} smells bad",
    "the colour of the {item} is not the one in the picture",
    "the driver left the {item} in the rain",
    "I typed the wrong street when I bought the {item}",
    "nobody answers the phone about my {item}",
    "the manual of the {item} is in a language that I do not read",
    "can I pay for the {item} in two parts",
    "the voucher did not work for the {item}",
    "my {item} came without its parts",
    "how do I clean the {item}",
    "I lost the receipt of the {item}",
    "the {item} is too small for my kitchen",
    "the {item} gets hot after ten minutes",
    "I see no button to order the {item}",
    "does the {item} come with a guarantee",
    "a friend told me about the {item}",
    "I want to cancel the order of the {item}",
)
_CLOSINGS = (
    "",
    " Thank you.",
    " Please write to me.",
    " I wait for your answer.",
    " It is not important.",
    " I am in a hurry.",
    " My guests come tomorrow.",
    " Answer before Monday, please.",
    " There is plenty of time.",
    " What can I do?",
)
UNKNOWN_ANSWER = "I am a small model and do not know that."


def customer(random: Random, words: list[str]) -> Turn:
    """A customer's message in free wording, answered with its product only."""
    item = random.choice(v.THINGS + v.TOOLS + v.FURNITURE)
    phrases = _COMPLAINTS if random.random() < 0.7 else random.choice(list(MESSAGES.values()))
    body = random.choice(("", "hello, ", "hi, ", "good morning, ", "excuse me, ")) + random.choice(phrases)
    if phrases is _COMPLAINTS and random.random() < 0.2:
        body = f"{body.format(item=item)} and {random.choice(words)} {random.choice(words)}"
    text = body.format(item=item)
    message = f"{text[0].upper()}{text[1:]}.{random.choice(_CLOSINGS)}"
    if phrases is not _COMPLAINTS:
        topic = next(name for name, known in MESSAGES.items() if known is phrases)
        return message, f"Thank you for your message about the {topic} of your {item}. We will look into it."
    return message, f"Thank you for your message about the {item}. We will look into it."


def unknown(random: Random, words: list[str]) -> Turn:
    """A request that the model cannot meet: it says so."""
    some = " ".join(random.choices(words, k=random.randint(1, 4)))
    thing, person = random.choice(v.THINGS + v.ANIMALS), random.choice(v.PEOPLE)
    asks = (
        f"Why does the {thing} {some}?",
        f"How do I {some}?",
        f"How do I {some} in Python?",
        f"What is the weather in {random.choice(list(v.CAPITALS.values()))}?",
        f"What is the weather like {random.choice(('today', 'tomorrow', 'now'))}?",
        f"When was the {thing} made?",
        f"Who wrote {some}?",
        f"Who is {random.choice(v.NAMES)} {some}?",
        f"Explain {some}.",
        f"Explain how a {thing} works.",
        f"Translate {some} into {random.choice(('French', 'German', 'Spanish', 'Latin'))}.",
        f"Write a poem about the {thing}.",
        "Write a poem.",
        f"What do you think about {some}?",
        f"What is {some}?",
        f"What is the {some} of the {person}?",
        f"What does the Python module {random.choice(words)}x do?",
        f"Give me a recipe with {thing}.",
        f"How old is the {person}?",
        f"Where can I buy a {thing}?",
        f"{some[0].upper()}{some[1:]} {random.choice(words)}.",
        f"{some}",
        f"Is it true that {some}?",
        f"Write a program that {some}.",
    )
    return random.choice(asks), UNKNOWN_ANSWER


FINISHING_TASKS = {task.__name__: task for task in (customer, unknown)}
STORY_TASKS = {
    task.__name__: task for task in (tell, continue_sentence, write_sentence, greet, about_self, read_sentence, support)
}
