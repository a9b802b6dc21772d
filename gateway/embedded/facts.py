"""Instructions that ask for a fact: capitals, colours, opposites, days, categories, Python's modules."""

from __future__ import annotations

from random import Random

from gateway.embedded import vocabulary as v
from gateway.embedded.strings import Turn

Summaries = dict[str, str]


def capital(random: Random) -> Turn:
    country = random.choice(list(v.CAPITALS))
    city = v.CAPITALS[country]
    if random.random() < 0.2:
        return f"{city} is the capital of which country?", _name(country)
    ask = random.choice(
        (f"What is the capital of {country}?", f"Name the capital of {country}.", f"Capital of {country}?")
    )
    full = f"The capital of {country} is {city}."
    return ask, full if ask.startswith("What") else city


def _name(country: str) -> str:
    return country[0].upper() + country[1:]


def colour(random: Random) -> Turn:
    thing = random.choice(list(v.COLOUR_OF))
    ask = random.choice((f"What colour is {thing}?", f"Which colour is {thing}?"))
    return ask, f"{thing[0].upper()}{thing[1:]} is {v.COLOUR_OF[thing]}."


def opposite(random: Random) -> Turn:
    word = random.choice(list(v.OPPOSITES))
    ask = random.choice((f"What is the opposite of {word}?", f"Opposite of {word}?", f"Give the opposite of {word}."))
    return ask, v.OPPOSITES[word]


def day(random: Random) -> Turn:
    return _neighbour(random, v.DAYS, "day")


def month(random: Random) -> Turn:
    return _neighbour(random, v.MONTHS, "month")


def _neighbour(random: Random, cycle: list[str], noun: str) -> Turn:
    index, step = random.randrange(len(cycle)), random.choice((1, -1))
    side = "after" if step == 1 else "before"
    ask = random.choice((f"What {noun} comes {side} {cycle[index]}?", f"Which {noun} is {side} {cycle[index]}?"))
    return ask, f"{cycle[(index + step) % len(cycle)]}."


def sound(random: Random) -> Turn:
    animal = random.choice(list(v.SOUNDS))
    ask = random.choice((f"What does a {animal} say?", f"What sound does a {animal} make?"))
    return ask, f"A {animal} says {v.SOUNDS[animal]}."


def legs(random: Random) -> Turn:
    animal = random.choice(list(v.LEGS))
    article = "An" if animal[0] in "aeiou" else "A"
    return f"How many legs does {article.lower()} {animal} have?", f"{article} {animal} has {v.LEGS[animal]} legs."


def plural(random: Random) -> Turn:
    word = random.choice(v.THINGS + v.ANIMALS + v.TOOLS)
    many = v.IRREGULAR_PLURALS.get(word, f"{word}s")
    return random.choice((f"What is the plural of {word}?", f"Plural of {word}?")), many


def category(random: Random) -> Turn:
    name = random.choice(list(v.CATEGORIES))
    word = random.choice(v.CATEGORIES[name])
    style = random.random()
    if style < 0.4:
        other = random.choice([key for key in v.CATEGORIES if key != name])
        first, second = random.sample((name, other), 2)
        return f"Is {word} {_article(first)} or {_article(second)}?", f"{word.capitalize()} is {_article(name)}."
    if style < 0.7:
        asked = random.choice(list(v.CATEGORIES)) if random.random() < 0.5 else name
        answer = f"Yes, {word} is {_article(asked)}." if asked == name else f"No, {word} is {_article(name)}."
        return f"Is {word} {_article(asked)}?", answer
    return f"What kind of thing is {word}?", f"{word.capitalize()} is {_article(name)}."


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def listing(random: Random) -> Turn:
    kind = random.choice(list(v.PLURAL_CATEGORIES))
    number = random.randint(2, 5)
    ask = random.choice(
        (f"Name {v.NUMBER_WORDS[number]} {kind}.", f"List {number} {kind}.", f"Give me {number} {kind}.")
    )
    return ask, ", ".join(random.sample(v.PLURAL_CATEGORIES[kind], number))


def odd_one(random: Random) -> Turn:
    name, other = random.sample(list(v.CATEGORIES), 2)
    same, odd = random.sample(v.CATEGORIES[name], 3), random.choice(v.CATEGORIES[other])
    words = [*same, odd]
    random.shuffle(words)
    return f"Which word is not {_article(name)}: {', '.join(words)}?", odd


def module(random: Random, summaries: Summaries) -> Turn:
    name = random.choice(list(summaries))
    ask = random.choice(
        (
            f"What is the Python module {name} for?",
            f"What does the Python module {name} do?",
            f"Describe the Python module {name}.",
            f"Define the Python module {name} in one line.",
        )
    )
    return ask, f"{name}: {summaries[name]}"


def builtin(random: Random, summaries: Summaries) -> Turn:
    name = random.choice(list(summaries))
    ask = random.choice((f"What does {name} do in Python?", f"Describe the Python builtin {name}."))
    return ask, f"{name}: {summaries[name]}"


FACT_TASKS = {
    task.__name__: task
    for task in (capital, colour, opposite, day, month, sound, legs, plural, category, listing, odd_one)
}
