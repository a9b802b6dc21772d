"""Instructions about words and numbers: copy, change case, reverse, count, sort, calculate."""

from __future__ import annotations

from random import Random

from gateway.embedded.vocabulary import ADJECTIVES, ANIMALS, NAMES, NUMBER_WORDS, THINGS

Turn = tuple[str, str]  # (user, assistant)


def phrase(random: Random, words: list[str], low: int = 1, high: int = 8) -> str:
    """Between `low` and `high` random words, half of the time everyday ones."""
    pool = words if random.random() < 0.5 else THINGS + ADJECTIVES + ANIMALS
    return " ".join(random.choices(pool, k=random.randint(low, high)))


def quoted(random: Random, text: str) -> str:
    """`text` as instructions give it: after a colon, bare or in quotes."""
    return random.choice((f": {text}", f': "{text}"', f" '{text}'", f": {text}"))


def repeat(random: Random, words: list[str]) -> Turn:
    text = phrase(random, words)
    style = random.random()
    if style < 0.2:
        text = text.capitalize() + random.choice(".!?")
    elif style < 0.4:
        text = " ".join(random.choice((str(random.randint(0, 9999)), random.choice(NAMES))) for _ in text.split())
    elif style < 0.5:
        text = text.upper()
    ask = random.choice(("Repeat", "Repeat after me", "Say", "Copy", "Copy this text", "Write", "Please repeat"))
    return ask + quoted(random, text), text


def uppercase(random: Random, words: list[str]) -> Turn:
    text = phrase(random, words, 1, 6)
    ask = random.choice(
        ("Write in capital letters", "Uppercase", "Make this uppercase", "Write in upper case", "Put in capitals")
    )
    return ask + quoted(random, text), text.upper()


def lowercase(random: Random, words: list[str]) -> Turn:
    text = phrase(random, words, 1, 6)
    ask = random.choice(("Write in small letters", "Lowercase", "Make this lowercase", "Write in lower case"))
    return ask + quoted(random, text.upper()), text


def reverse(random: Random, words: list[str]) -> Turn:
    text = phrase(random, words, 2, 6)
    ask = random.choice(
        (
            "Reverse the words",
            "Reverse the order of these words",
            "Write the words backwards",
            "Say the words in reverse",
        )
    )
    return ask + quoted(random, text), " ".join(reversed(text.split()))


def count(random: Random, words: list[str]) -> Turn:
    text = phrase(random, words, 1, 8)
    ask = random.choice(("Count the words", "How many words are there", "How many words are in this text"))
    return ask + quoted(random, text), str(len(text.split()))


def pick(random: Random, words: list[str]) -> Turn:
    chosen = phrase(random, words, 2, 6).split()
    place, index = random.choice((("first", 0), ("last", -1), ("second", 1)))
    ask = random.choice((f"What is the {place} word", f"Give the {place} word", f"Say only the {place} word"))
    return ask + quoted(random, " ".join(chosen)), chosen[index]


def sort(random: Random, words: list[str]) -> Turn:
    chosen = random.sample(THINGS + ANIMALS, random.randint(2, 4))
    ask = random.choice(("Sort these words", "Put these words in alphabetical order", "Sort by the alphabet"))
    return f"{ask}: {', '.join(chosen)}", ", ".join(sorted(chosen))


def spell(random: Random, words: list[str]) -> Turn:
    word = random.choice(THINGS + ANIMALS + words[:500])
    ask = random.choice((f"Spell {word}.", f"Spell the word {word}.", f"How do you spell {word}?"))
    return ask, "-".join(word)


def initial(random: Random, words: list[str]) -> Turn:
    word = random.choice(THINGS + ANIMALS + words[:800])
    if random.random() < 0.5:
        return f"What is the first letter of {word}?", word[0]
    return f"What is the last letter of {word}?", word[-1]


def join(random: Random, words: list[str]) -> Turn:
    chosen = phrase(random, words, 2, 5).split()
    name, mark = random.choice((("commas", ", "), ("dashes", "-"), ("plus signs", " + ")))
    return f"Join the words with {name}: {' '.join(chosen)}", mark.join(chosen)


def add(random: Random, words: list[str]) -> Turn:
    high = random.choice((10, 20, 100))
    a, b = random.randint(0, high), random.randint(0, high)
    return _ask_number(random, f"{a} + {b}", f"{a} plus {b}"), str(a + b)


def subtract(random: Random, words: list[str]) -> Turn:
    high = random.choice((10, 20, 100))
    b, a = sorted((random.randint(0, high), random.randint(0, high)))
    return _ask_number(random, f"{a} - {b}", f"{a} minus {b}"), str(a - b)


def multiply(random: Random, words: list[str]) -> Turn:
    a, b = random.randint(0, 10), random.randint(0, 10)
    return _ask_number(random, f"{a} * {b}", f"{a} times {b}"), str(a * b)


def _ask_number(random: Random, signs: str, spoken: str) -> str:
    return random.choice((f"What is {signs}?", f"What is {spoken}?", f"{signs} =", f"Calculate {signs}.", f"{signs}"))


def compare(random: Random, words: list[str]) -> Turn:
    a, b = random.sample(range(100), 2)
    if random.random() < 0.5:
        return f"Which number is larger, {a} or {b}?", str(max(a, b))
    return f"Which number is smaller, {a} or {b}?", str(min(a, b))


def parity(random: Random, words: list[str]) -> Turn:
    number = random.randint(0, 999)
    answer = "even" if number % 2 == 0 else "odd"
    return f"Is {number} even or odd?", f"{number} is {answer}."


def number_word(random: Random, words: list[str]) -> Turn:
    number = random.randint(0, 20)
    if random.random() < 0.5:
        return f"Write {number} as a word.", NUMBER_WORDS[number]
    return f"Write {NUMBER_WORDS[number]} as a number.", str(number)


def count_up(random: Random, words: list[str]) -> Turn:
    start, length = random.randint(0, 20), random.randint(3, 8)
    return (
        random.choice((f"Count from {start} to {start + length}.", f"Count up from {start} to {start + length}.")),
        ", ".join(str(number) for number in range(start, start + length + 1)),
    )


STRING_TASKS = {
    task.__name__: task
    for task in (
        repeat, uppercase, lowercase, reverse, count, pick, sort, spell, initial, join,
        add, subtract, multiply, compare, parity, number_word, count_up,
    )
}  # fmt: skip
