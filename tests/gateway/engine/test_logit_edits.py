"""Bias, minimum length and penalties against transformers' logits processors."""

from __future__ import annotations

import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from gateway.engine.logit_edits import LogitEdits
from gateway.engine.sampler import Sampler
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.sampling_row import SamplingRow
from tests.gateway.engine.test_sampler import CPU, random_logits, row


def edited(logits: torch.Tensor, rows: list[SamplingRow], eos: tuple[int, ...] = ()) -> torch.Tensor:
    logits = logits.clone()
    LogitEdits(list(enumerate(rows)), logits.shape[1], CPU, eos).apply(logits, None)
    return logits


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
