"""The sampler against brute force and against transformers' logits processors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gateway.engine.pending import PendingTokens
from gateway.engine.sampler import Sampler, SamplerOutput, SamplingRow, _draw, _Edits, _Filter
from gateway.engine.sampling_params import SamplingParams

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)


def row(params: SamplingParams, prompt: Sequence[int] = (1, 2), outputs: Sequence[int] = (), index: int = 0) -> Any:
    return SamplingRow(params, [*prompt, *outputs], len(prompt), index)


def sample(logits: torch.Tensor, rows: list[SamplingRow], eos: tuple[int, ...] = ()) -> SamplerOutput:
    return Sampler(eos)(logits, rows).result()


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def filtered(logits: torch.Tensor, *params: SamplingParams) -> torch.Tensor:
    probs = logits.softmax(-1)
    _Filter(list(enumerate(params)), len(params), CPU).apply(probs)
    return probs


def edited(logits: torch.Tensor, rows: list[SamplingRow], eos: tuple[int, ...] = ()) -> torch.Tensor:
    logits = logits.clone()
    _Edits(list(enumerate(rows)), logits.shape[1], CPU, eos).apply(logits, None)
    return logits


def draws(logits: torch.Tensor, params: SamplingParams, count: int) -> Counter[int]:
    """`count` tokens from the same logits [vocab], ten positions of each of count / 10 sequences of one seed."""
    rows = [row(params, outputs=[0] * (i % 10), index=i // 10) for i in range(count)]
    output = sample(logits.expand(count, -1).clone(), rows)
    return Counter(output.token_ids)


def reference_filter(logits: torch.Tensor, params: SamplingParams, slack: float = 0.0) -> torch.Tensor:
    """min-p, top-k, top-p of one row [vocab], in fp64 and by their definitions; ties live or die together.

    slack: how far the bounds are moved, outwards where it is positive.
    """
    logits = logits.double()
    if params.min_p > 0:
        logits = logits.where(logits >= logits.max() + math.log(params.min_p) - slack, -torch.inf)
    if 0 < params.top_k < len(logits):
        kth = logits.sort(descending=True).values[params.top_k - 1]
        logits = logits.where(logits >= kth, -torch.inf)
    if params.top_p == 1.0:
        return logits
    mass_before = (logits > logits[:, None]).double() @ logits.softmax(-1)
    return logits.where((mass_before < params.top_p + slack) | (logits == logits.max()), -torch.inf)


@pytest.mark.parametrize("vocab_size", [64, 100, 512])
def test_greedy_takes_the_first_of_the_largest(vocab_size: int) -> None:
    logits = random_logits(5, vocab_size)
    logits[0, [7, 40]] = 50.0
    expected = logits.argmax(-1).tolist()
    output = sample(logits, [row(GREEDY)] * 5)
    assert output.token_ids == expected
    assert output.token_ids[0] == 7
    assert output.logprobs == [None] * 5
    assert output.bad_rows == []


def test_an_empty_batch_gives_an_empty_answer() -> None:
    assert sample(torch.empty(0, 64), []).token_ids == []


FILTERS = st.builds(
    SamplingParams,
    temperature=st.just(1.0),
    top_p=st.sampled_from([0.05, 0.3, 0.7, 0.95, 0.999, 1.0]),
    top_k=st.sampled_from([0, -1, 1, 2, 5, 70, 200, 100_000]),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 0.5, 1.0]),
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    params=st.lists(FILTERS, min_size=1, max_size=5),
    vocab_size=st.sampled_from([3, 64, 150, 700]),
    scale=st.sampled_from([0.0, 0.05, 1.0, 8.0]),
    ties=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_filters_keep_exactly_the_reference_support(
    params: list[SamplingParams], vocab_size: int, scale: float, ties: bool, seed: int
) -> None:
    logits = random_logits(len(params), vocab_size, seed) * scale
    if ties:
        logits = logits.round()
    # Probabilities that fp32 rounds to zero are not drawn, filtered or not.
    visible = logits.double().softmax(-1) > 1e-30
    kept = (filtered(logits, *params) > 0) & visible
    for mine, one, these, seen in zip(logits, params, kept, visible, strict=True):
        least = (reference_filter(mine, one, slack=-1e-5) > -torch.inf) & seen
        most = reference_filter(mine, one, slack=1e-5) > -torch.inf
        assert (these | most).equal(most), one
        assert (these & least).equal(least), one
        if one.top_p == 1.0 and one.min_p in (0.0, 1.0):
            assert these.equal((reference_filter(mine, one) > -torch.inf) & seen), one


@pytest.mark.parametrize(
    ("params", "warper"),
    [
        (SamplingParams(top_k=7), TopKLogitsWarper(7)),
        (SamplingParams(top_p=0.8), TopPLogitsWarper(0.8)),
        (SamplingParams(min_p=0.05), MinPLogitsWarper(0.05)),
    ],
)
def test_filters_agree_with_transformers(params: SamplingParams, warper: Any) -> None:
    logits = random_logits(20, 300)
    assert torch.equal(filtered(logits, *[params] * 20) > 0, warper(None, logits.clone()) > -torch.inf)


def test_filters_leave_unfiltered_rows_alone() -> None:
    logits = random_logits(3, 100)
    kept = filtered(logits, SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=1.0))
    assert torch.equal(kept[[0, 2]], logits.softmax(-1)[[0, 2]])
    assert (kept[1] > 0).sum() == 3


def test_a_row_is_filtered_alike_in_every_company() -> None:
    # Flat neighbours force the wide search; the peaked row must not be cut twice.
    peaked, flat = random_logits(1, 2000)[0] * 2, torch.zeros(2000)
    params = SamplingParams(top_p=0.9)
    alone = filtered(peaked[None], params)[0]
    together = filtered(torch.stack([peaked, flat]), params, SamplingParams(top_p=0.99))[0]
    assert torch.equal(alone, together)


@pytest.mark.parametrize("vocab_size", [30, 64, 130])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.5),
        SamplingParams(seed=3, temperature=1.7, top_k=9),
        SamplingParams(seed=4, top_p=0.6),
        SamplingParams(seed=5, min_p=0.2, top_p=0.9, top_k=12, temperature=1.3),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams, vocab_size: int) -> None:
    count = 10_000
    logits = random_logits(1, vocab_size, seed=vocab_size)[0] / 2
    expected = reference_filter(logits / params.temperature, params).softmax(-1) * count
    seen = draws(logits, params, count)
    assert all(expected[token] > 0 for token in seen), "a token outside the support was drawn"
    # Chi-square over the tokens expected at least 5 times, the rest as one class.
    common = (expected >= 5).nonzero().flatten().tolist()
    observed = [seen[token] for token in common]
    wanted = [float(expected[token]) for token in common]
    if (rest := count - sum(wanted)) >= 5:
        observed.append(count - sum(observed))
        wanted.append(rest)
    statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
    degrees = len(wanted) - 1
    # Wilson-Hilferty's approximation of the 99.9 % point; the seeds are fixed, so this cannot flicker.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < limit


def test_the_ends_of_the_unit_interval_stay_inside_the_support() -> None:
    probs = torch.zeros(4, 200)
    probs[:, 70], probs[:, 130] = 0.125, 0.375
    uniforms = torch.tensor([[0.0], [1.0 - 2.0**-53], [0.2499], [0.25]], dtype=torch.float64)
    assert _draw(probs, uniforms)[0].tolist() == [70, 130, 70, 130]


def test_repetition_penalty_agrees_with_transformers() -> None:
    logits = random_logits(2, 90)
    seen = [5, 6, 7, 7, 80], [9, 9]
    rows = [
        row(SamplingParams(repetition_penalty=1.7), prompt=seen[0], outputs=seen[1]),
        row(SamplingParams(repetition_penalty=0.6), prompt=seen[1], outputs=seen[0]),
    ]
    ids = torch.tensor([[*seen[0], *seen[1]]])
    expected = [
        RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[i : i + 1].clone())[0]
        for i, penalty in enumerate((1.7, 0.6))
    ]
    torch.testing.assert_close(edited(logits, rows), torch.stack(expected), rtol=0, atol=0)


def test_logit_bias_and_min_tokens_agree_with_transformers() -> None:
    logits = random_logits(2, 90)
    params = SamplingParams(logit_bias={3: 4.5, 88: -100.0, 90: 7.0}, min_tokens=3, stop_token_ids=(11, 99))
    rows = [row(params, outputs=[4, 4]), row(params, outputs=[4, 4, 4])]
    bias = SequenceBiasLogitsProcessor({(3,): 4.5, (88,): -100.0})
    shortest = MinNewTokensLengthLogitsProcessor(2, 3, [11, 60])
    ids = torch.tensor([[1, 2, 4, 4]]), torch.tensor([[1, 2, 4, 4, 4]])
    expected = [shortest(ids[i], bias(ids[i], logits[i : i + 1].clone())) for i in range(2)]
    torch.testing.assert_close(edited(logits, rows, eos=(60,)), torch.cat(expected), rtol=0, atol=0)


def test_presence_and_frequency_penalties_weigh_output_tokens_only() -> None:
    logits = random_logits(3, 90)
    outputs = [4, 4, 4, 17]
    rows = [
        row(SamplingParams(presence_penalty=1.5), prompt=[30], outputs=outputs),
        row(SamplingParams(frequency_penalty=-0.5), prompt=[30], outputs=outputs),
        row(SamplingParams(presence_penalty=0.25, frequency_penalty=0.5), prompt=[30], outputs=[]),
    ]
    expected = logits.clone()
    expected[0, [4, 17]] -= 1.5
    expected[1, 4] += 1.5
    expected[1, 17] += 0.5
    torch.testing.assert_close(edited(logits, rows), expected, rtol=1e-6, atol=1e-6)


def test_penalties_follow_the_growing_sequence() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=2.0, repetition_penalty=1.2)
    one = row(params, prompt=[1, 2])
    logits = random_logits(1, 70)
    sampler = Sampler()
    for _ in range(300):
        expected = logits.clone()
        ids = torch.tensor([one.token_ids])
        expected = RepetitionPenaltyLogitsProcessor(1.2)(ids, expected)
        expected -= 2.0 * torch.bincount(torch.tensor(one.token_ids[2:], dtype=torch.int64), minlength=70)
        token = sampler(logits.clone(), [one]).result().token_ids[0]
        # Repeated subtraction rounds otherwise than one product: equal up to that.
        assert expected[0, token] >= expected.max() - 1e-3
        one.token_ids.append(token)
    assert len(set(one.token_ids[2:])) > 30


@pytest.mark.parametrize("outputs", [[], [4, 9, 4]])
def test_a_row_ahead_is_sampled_as_if_its_drafts_were_tokens(outputs: list[int]) -> None:
    params = SamplingParams(
        seed=3, repetition_penalty=1.3, frequency_penalty=0.7, min_tokens=5, stop_token_ids=(7,), logprobs=2
    )
    one = row(params, outputs=outputs)
    sampler = Sampler()
    for drafts in ([7, 30, 7], [8], [9, 9, 9, 9]):
        one.drafts[:] = drafts
        logits = random_logits(len(drafts) + 1, 64, seed=len(one.token_ids)) / 9
        got = sampler(logits.clone(), [one, *(one.ahead(i + 1) for i in range(len(drafts)))]).result()
        alone = [sample(logits[i : i + 1].clone(), [row(params, outputs=one.token_ids[2:] + drafts[:i])])
                 for i in range(len(drafts) + 1)]  # fmt: skip
        assert got.token_ids == [other.token_ids[0] for other in alone]
        assert got.logprobs == [other.logprobs[0] for other in alone]
        one.token_ids.append(drafts[0] + 1)


def test_edits_come_before_the_temperature_and_filters_after() -> None:
    # The bias lifts token 5 to the top, so that top-k 1 keeps it at any temperature.
    params = SamplingParams(temperature=1.9, top_k=1, logit_bias={5: 100.0})
    assert draws(random_logits(1, 64)[0], params, 50) == {5: 50}


def test_seeds_reproduce_and_do_not_depend_on_the_batch() -> None:
    logits = random_logits(1, 1000)[0] / 3
    params = SamplingParams(seed=7)

    def tokens(mates: int) -> list[int]:
        one = row(params, prompt=[1])
        rows = [row(SamplingParams(top_p=0.5)) for _ in range(mates)]
        rows.insert(mates // 2, one)
        sampler = Sampler()
        for _ in range(30):
            output = sampler(torch.stack([logits] * len(rows)), rows).result()
            one.token_ids.append(output.token_ids[mates // 2])
        return one.token_ids

    alone = tokens(0)
    assert alone == tokens(0) == tokens(5)
    assert len(set(alone)) > 10


def test_seed_index_and_position_each_change_the_numbers() -> None:
    logits = torch.zeros(1, 4096)
    variants = [
        row(SamplingParams(seed=seed), outputs=[0] * position, index=index)
        for seed in (0, 1, 2, -1, 1 << 40)
        for index in range(4)
        for position in range(4)
    ]
    tokens = sample(logits.expand(len(variants), -1).clone(), variants).token_ids
    assert len(set(tokens)) > 70  # 80 draws out of 4,096: about one pair meets by chance


def test_sequences_without_a_seed_differ() -> None:
    rows = [row(SamplingParams()) for _ in range(50)]
    assert len(set(sample(torch.zeros(50, 4096), rows).token_ids)) > 40


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(4, 130)
    rows = [
        row(SamplingParams(temperature=0.3, logprobs=3, logit_bias={9: 100.0})),
        row(SamplingParams()),
        row(SamplingParams(temperature=0.0, logprobs=0)),
        row(SamplingParams(top_k=2, logprobs=500, repetition_penalty=2.0)),
    ]
    expected = logits.log_softmax(-1)
    output = sample(logits.clone(), rows)
    assert output.token_ids[0] == 9
    assert output.logprobs[1] is None
    for i, count in ((0, 3), (2, 0), (3, 130)):
        found = output.logprobs[i]
        assert found is not None
        assert found.token_id == output.token_ids[i]
        assert found.logprob == pytest.approx(expected[i, found.token_id].item(), abs=1e-5)
        top = expected[i].topk(count)
        assert found.top_ids == tuple(top.indices.tolist())
        assert found.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_bad_rows_are_named_and_others_unharmed(poison: float) -> None:
    logits = random_logits(5, 128)
    kinds = [GREEDY, SamplingParams(seed=1), SamplingParams(seed=1, top_p=0.5, top_k=5, logprobs=2)]
    rows = [row(kind) for kind in (GREEDY, *kinds, kinds[2])]
    expected = sample(logits.clone(), rows).token_ids
    if poison == -math.inf:
        logits[1:4] = poison
    else:
        logits[1:4, 77] = poison
    output = sample(logits, rows)
    assert output.bad_rows == [1, 2, 3]
    assert [output.token_ids[i] for i in (0, 4)] == [expected[i] for i in (0, 4)]
    assert all(0 <= token < 128 for token in output.token_ids)


def test_every_kind_of_row_shares_a_batch_as_if_alone() -> None:
    kinds = [
        GREEDY,
        SamplingParams(seed=3, temperature=0.7),
        SamplingParams(temperature=0.0, presence_penalty=2.0),
        SamplingParams(seed=4, top_p=0.9, logprobs=2),
        SamplingParams(seed=5, min_tokens=9, top_k=4, min_p=0.01, frequency_penalty=1.0, logit_bias={3: 2.0}),
        SamplingParams(temperature=0.0, logprobs=1, repetition_penalty=1.5),
    ]
    rows = [row(kind, prompt=[8, 9], outputs=[3, 5, 3]) for kind in kinds]
    logits = random_logits(len(rows), 640)
    together = sample(logits.clone(), rows, eos=(2,))
    for i, one in enumerate(rows):
        alone = sample(logits[i : i + 1].clone(), [one], eos=(2,))
        assert alone.token_ids == [together.token_ids[i]]
        assert alone.logprobs == [together.logprobs[i]]


def test_the_plan_is_made_anew_when_the_batch_changes() -> None:
    sampler = Sampler()
    logits = random_logits(2, 64)
    first, second = row(SamplingParams(temperature=0.0, logit_bias={3: 100.0})), row(GREEDY)
    assert sampler(logits.clone(), [first, second]).result().token_ids[0] == 3
    assert sampler(logits.clone(), [second, first]).result().token_ids[1] == 3
    assert sampler(logits[:1].clone(), [second]).result().token_ids == logits[:1].argmax(-1).tolist()


def test_a_row_whose_last_token_is_pending_is_sampled_as_if_it_were_known() -> None:
    kinds = [
        GREEDY,
        SamplingParams(seed=3, temperature=0.7),
        SamplingParams(seed=4, min_tokens=4, stop_token_ids=(5, 6)),
        SamplingParams(temperature=0.0, repetition_penalty=1.9, logit_bias={7: 1.0}),
        SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=-1.0, logprobs=3),
        SamplingParams(seed=5, frequency_penalty=2.0, repetition_penalty=0.5, min_tokens=5),
    ]
    outputs = [[3, 5, 3], [9], [1, 2, 8, 6], [4, 4], [7, 7], [6, 2, 1, 1, 30]]
    known = [row(kind, outputs=tokens) for kind, tokens in zip(kinds, outputs, strict=True)]
    behind = [row(kind, outputs=tokens[:-1]) for kind, tokens in zip(kinds, outputs, strict=True)]
    behind[3] = known[3]  # a mate that has just come in: the host knows all of it
    logits = random_logits(len(kinds), 64) / 9
    logits[4, 7] = logits[4].max() + 0.5  # penalized by 2 - 2 with the pending token, by 2 - 1 without
    previous = torch.tensor([tokens[-1] for tokens in reversed(outputs)])
    pending = PendingTokens(previous, np.array([5, 4, 3, -1, 1, 0]))
    wanted = sample(logits.clone(), known, eos=(2,))
    got = Sampler((2,))(logits.clone(), behind, pending).result()
    assert got == wanted
    forgetful = Sampler((2,))(logits.clone(), behind).result()
    assert all(forgetful.token_ids[i] != wanted.token_ids[i] for i in (1, 2, 4, 5))


@pytest.mark.gpu
def test_cuda_samples_as_the_cpu_does() -> None:
    kinds = [GREEDY, SamplingParams(seed=1), SamplingParams(seed=2, top_p=0.8, repetition_penalty=1.3, logprobs=4)]
    rows = [row(kind, outputs=[3, 4, 3]) for kind in kinds * 8]
    logits = random_logits(len(rows), 128_256)
    host, device = sample(logits.clone(), rows), sample(logits.cuda(), rows)
    assert device.token_ids == host.token_ids
    for mine, other in zip(device.logprobs, host.logprobs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert mine.top_ids == other.top_ids
            assert mine.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-4)
