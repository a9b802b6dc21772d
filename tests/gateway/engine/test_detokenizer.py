"""Incremental text against the tokenizers library's decoding of the whole."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gateway.engine.detokenizer import IncrementalDetokenizer, TokenTable
from gateway.engine.sampling_params import SamplingParams
from gateway.errors import BaseModelUnsupported

# Merges that end inside characters, as byte-level BPE learns them from repeated CJK and emoji.
CORPUS = ["hello world, hello there", "中中中中文文中文", "😀😀😃😀 naïve café", "def f(x):\n    return x"] * 4
PLAIN = SamplingParams()


@functools.cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool é>", special=False)])
    return tokenizer


@functools.cache
def llama_two() -> Tokenizer:
    """Llama 2's kind: marked spaces, the first one dropped; characters that it lacks as byte tokens."""
    words = ["▁", "▁hello", "▁h", "he", "llo", "▁▁", "中", "é", *"abdefhlnortwx,.()\n"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = [(token, -float(i)) for i, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, *words])]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@functools.cache
def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@functools.cache
def table(tokenizer: Tokenizer) -> TokenTable:
    return TokenTable(tokenizer)


def stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int], params: SamplingParams = PLAIN) -> list[str]:
    """The deltas of pushing one token at a time, and the flush."""
    detokenizer = IncrementalDetokenizer(table(tokenizer), prompt, params)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


TOKENIZERS = pytest.mark.parametrize("make", [byte_level, llama_two, metaspace])
TEXTS = st.text(max_size=30) | st.lists(
    st.sampled_from([*"中文😀😃👩‍💻é a\n", " ", "  ", "hello", "<|end|>", "<s>", "<tool é>", "▁", "�"]), max_size=12
).map("".join)


@TOKENIZERS
@settings(deadline=None, max_examples=200)
@given(text=TEXTS, data=st.data())
def test_prompt_and_deltas_join_to_the_whole(make: Callable[[], Tokenizer], text: str, data: st.DataObject) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text).ids
    cut = data.draw(st.integers(0, len(ids)))
    whole = tokenizer.decode(ids)
    deltas = stream(tokenizer, ids[:cut], ids[cut:])
    grown = "".join(deltas)
    assert whole.endswith(grown)
    before = whole[: len(whole) - len(grown)]
    if any(before == tokenizer.decode(ids[:k]) for k in range(max(cut - 3, 0), cut + 1)):
        return
    # The prompt's last token ended inside a character, and that character is the deltas'.
    prompt = tokenizer.decode(ids[:cut])
    assert prompt.startswith(before)
    assert set(prompt[len(before) :]) == {"�"}


@settings(deadline=None, max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_any_byte_level_ids_stream_as_they_decode(data: st.DataObject, skip: bool) -> None:
    tokenizer = byte_level()
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=20))
    params = SamplingParams(skip_special_tokens=skip)
    assert "".join(stream(tokenizer, [], ids, params)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("make", [llama_two, metaspace])
@settings(deadline=None, max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_any_text_tokens_stream_as_they_decode(make: Callable[[], Tokenizer], data: st.DataObject, skip: bool) -> None:
    tokenizer = make()
    textual = [i for token, i in tokenizer.get_vocab().items() if not token.startswith("<0x")]
    ids = data.draw(st.lists(st.sampled_from(textual), max_size=12))
    params = SamplingParams(skip_special_tokens=skip)
    assert "".join(stream(tokenizer, [], ids, params)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("make", [byte_level, llama_two])
@pytest.mark.parametrize("text", ["中文", "😀", "👩‍💻", "é中😀"])
def test_half_a_character_is_never_emitted(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    ids = [token for byte in text.encode() for token in byte_ids(tokenizer, byte)]
    deltas = stream(tokenizer, [], ids)
    assert "".join(deltas) == text
    assert [delta for delta in deltas if delta] == list(text)


def byte_ids(tokenizer: Tokenizer, byte: int) -> list[int]:
    """The id of the token that is this byte alone."""
    wanted = bytes([byte])
    return [i for i in range(tokenizer.get_vocab_size()) if table(tokenizer).piece(i) == wanted][:1]


def test_text_flows_while_tokens_straddle_characters() -> None:
    # 中 is E4 B8 AD; each token but the last ends inside a character.
    char_of = bytes_to_unicode()
    pieces = ["".join(char_of[byte] for byte in piece) for piece in (b"\xe4\xb8", b"\xad\xe4\xb8", b"\xad")]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    assert stream(tokenizer, [], [0, *[1] * 20, 2]) == ["", *["中"] * 21, ""]


def test_a_broken_byte_run_costs_only_itself() -> None:
    tokenizer = llama_two()
    [first], [second] = byte_ids(tokenizer, 0xE4), byte_ids(tokenizer, 0xB8)
    word = tokenizer.encode("hello").ids
    text = "".join(stream(tokenizer, word, [*byte_ids(tokenizer, 0x41), first, second, *word]))
    assert text == "A� hello"


def test_a_prompt_of_special_tokens_alone_begins_the_text() -> None:
    tokenizer = llama_two()
    word = tokenizer.encode("hello").ids
    assert "".join(stream(tokenizer, [1], word)) == "hello"
    assert "".join(stream(tokenizer, [1, *word], word)) == " hello"
    assert "".join(stream(tokenizer, [1], word, SamplingParams(skip_special_tokens=False))) == " hello"


STOPS = st.lists(st.text("ab☃", min_size=1, max_size=4), min_size=1, max_size=3, unique=True).map(tuple)


@settings(deadline=None, max_examples=300)
@given(text=st.text("ab☃", max_size=15), stops=STOPS)
def test_text_ends_before_the_first_stop_string_to_complete(text: str, stops: tuple[str, ...]) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text).ids
    detokenizer = IncrementalDetokenizer(table(tokenizer), [], SamplingParams(stop=stops))
    deltas = [*map(detokenizer.push, ids), detokenizer.flush()]
    ends = [(end, stop) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    end, stop = min(ends, key=lambda found: (found[0], -len(found[1])), default=(len(text), None))
    assert detokenizer.stop_string == stop
    assert "".join(deltas) == text[: end - len(stop or "")]


def test_only_what_may_begin_a_stop_string_is_held() -> None:
    tokenizer = byte_level()
    detokenizer = IncrementalDetokenizer(table(tokenizer), [], SamplingParams(stop=("\n\nQ:",)))
    seen = []
    for char in "A\nB\n\nQx\n\nQ:y":
        seen.append("".join(map(detokenizer.push, tokenizer.encode(char).ids)))
    assert seen == ["A", "", "\nB", "", "", "", "\n\nQx", "", "", "", "", ""]
    assert detokenizer.stop_string == "\n\nQ:"
    assert detokenizer.flush() == ""


def test_flush_gives_what_was_held() -> None:
    tokenizer = byte_level()
    detokenizer = IncrementalDetokenizer(table(tokenizer), [], SamplingParams(stop=("STOP",)))
    assert "".join(map(detokenizer.push, tokenizer.encode("xST").ids)) == "x"
    assert "".join(map(detokenizer.push, byte_ids(tokenizer, 0xE4))) == ""
    assert detokenizer.flush() == "ST�"
    assert detokenizer.flush() == ""
    assert detokenizer.stop_string is None


def test_stop_strings_within_min_tokens_do_not_count() -> None:
    tokenizer = byte_level()
    params = SamplingParams(stop=("aa",), min_tokens=3)
    detokenizer = IncrementalDetokenizer(table(tokenizer), [], params)
    (letter,) = tokenizer.encode("a").ids
    assert "".join(detokenizer.push(letter) for _ in range(3)) == "aa"
    assert detokenizer.push(letter) == ""
    assert detokenizer.stop_string == "aa"


def test_a_long_stop_string_costs_no_more_for_a_long_partial_match() -> None:
    tokenizer = byte_level()
    detokenizer = IncrementalDetokenizer(table(tokenizer), [], SamplingParams(stop=("a" * 20_000 + "b",)))
    (letter,) = tokenizer.encode("a").ids
    # Quadratic work here would be 400 million steps, far over the test's time limit.
    assert "".join(detokenizer.push(letter) for _ in range(30_000)) == "a" * 10_000
    assert detokenizer.flush() == "a" * 20_000


def test_token_text_keeps_spaces_and_specials() -> None:
    spaced = next(i for t, i in llama_two().get_vocab().items() if t.startswith("▁h"))
    assert table(llama_two()).text(spaced).startswith(" h")
    assert table(llama_two()).text(1) == "<s>"
    assert table(byte_level()).text(byte_level().token_to_id("<tool é>")) == "<tool é>"
    assert table(byte_level()).text(byte_ids(byte_level(), 0xE4)[0]) == "�"
    assert table(byte_level()).text(10_000) == ""


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.Sequence([decoders.Fuse(), decoders.CTC()]), None])
def test_other_decoders_are_refused_by_name(decoder: object) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(BaseModelUnsupported, match=type(decoder).__name__ if decoder is not None else "null"):
        TokenTable(tokenizer)
