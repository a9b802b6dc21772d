"""The sampler: whole batches, seeds, log-probabilities, rows that are bad, ahead or pending."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from gateway.engine.pending import PendingTokens
from gateway.engine.sampler import Sampler, SamplerOutput
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.sampling_row import SamplingRow

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)


def row(params: SamplingParams, prompt: Sequence[int] = (1, 2), outputs: Sequence[int] = (), index: int = 0) -> Any:
    return SamplingRow(params, [*prompt, *outputs], len(prompt), index)


def sample(logits: torch.Tensor, rows: list[SamplingRow], eos: tuple[int, ...] = ()) -> SamplerOutput:
    return Sampler(eos)(logits, rows).result()


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def draws(logits: torch.Tensor, params: SamplingParams, count: int) -> Counter[int]:
    """`count` tokens from the same logits [vocab], ten positions of each of count / 10 sequences of one seed."""
    rows = [row(params, outputs=[0] * (i % 10), index=i // 10) for i in range(count)]
    output = sample(logits.expand(count, -1).clone(), rows)
    return Counter(output.token_ids)


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
