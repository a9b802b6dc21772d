"""Filters against their definitions and transformers' warpers, draws against the distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gateway.engine.draws import TopFilter, draw_tokens
from gateway.engine.sampling_params import SamplingParams
from tests.gateway.engine.test_sampler import CPU, draws, random_logits


def filtered(logits: torch.Tensor, *params: SamplingParams) -> torch.Tensor:
    probs = logits.softmax(-1)
    TopFilter(list(enumerate(params)), len(params), CPU).apply(probs)
    return probs


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
    assert draw_tokens(probs, uniforms)[0].tolist() == [70, 130, 70, 130]
