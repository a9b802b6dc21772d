"""A page image is its adapter's rows and zeros; what does not fit the base or the dtype is refused before."""

from __future__ import annotations

import pytest
import torch

from adapters_store.page_image import PageImage, check_weights
from adapters_store.weights import AdapterWeights
from lora_kernels.segments import PAGE_RANK

from .random_adapters import LAYOUT, make_image, random_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def rows_of(image: PageImage, dtype: torch.dtype, layer: int, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A [pages * 16, in] and B^T [pages * 16, out] of one linear, in fp32."""
    index = next(i for i, group in enumerate(LAYOUT.groups) if linear in group.linears)
    group = LAYOUT.groups[index]
    pages = [LAYOUT.split(page, dtype)[index] for page in image.pages]
    place = group.linears.index(linear)
    a = torch.cat([page.a[layer, place] for page in pages]).float()
    b = torch.cat([page.b[layer, :, group.columns(linear)] for page in pages]).float()
    if dtype == torch.int8:
        a *= torch.cat([page.a_scales[layer, place] for page in pages if page.a_scales is not None])[:, None]
        b *= torch.cat([page.b_scales[layer, place] for page in pages if page.b_scales is not None])[:, None]
    return a, b


@pytest.mark.parametrize("rank", [1, 16, 17, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_has_the_rows_of_every_linear_and_zeros(dtype: torch.dtype, rank: int) -> None:
    weights = random_weights(rank, seed=rank, linears=["q_proj", "v_proj", "up_proj", "down_proj"])
    image = make_image(weights, dtype)
    assert image.rank == rank
    assert image.num_bytes == -(-rank // PAGE_RANK) * LAYOUT.page_bytes(dtype)
    for layer in range(LAYOUT.num_layers):
        for linear in (linear for group in LAYOUT.groups for linear in group.linears):
            a, b = rows_of(image, dtype, layer, linear)
            if (pair := weights.tensors.get((layer, linear))) is None:
                assert not a.any()
                assert not b.any()
                continue
            for held, wanted in ((a, pair[0]), (b, pair[1].T)):
                if dtype == torch.int8:  # to half a step of each rank's own scale
                    step = wanted.abs().amax(1, keepdim=True) / 127
                    assert ((held[:rank] - wanted).abs() <= 0.501 * step).all()
                else:
                    assert torch.equal(held[:rank], wanted.to(dtype).float())
                assert not held[rank:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_is_a_function_of_weights_layout_and_dtype(dtype: torch.dtype) -> None:
    first, second = (make_image(random_weights(20, seed=1), dtype) for _ in range(2))
    assert all(map(torch.equal, first.pages, second.pages))


def test_ranks_may_differ_between_linears() -> None:
    low, high = random_weights(2, seed=1, linears=["q_proj"]), random_weights(30, seed=2, linears=["v_proj"])
    image = make_image(AdapterWeights(30, {**low.tensors, **high.tensors}))
    a, b = rows_of(image, torch.float32, 1, "q_proj")
    assert torch.equal(a[:2], low.tensors[1, "q_proj"][0])
    assert torch.equal(b[:2], low.tensors[1, "q_proj"][1].T)
    assert not a[2:].any()
    assert torch.equal(rows_of(image, torch.float32, 1, "v_proj")[0][:30], high.tensors[1, "v_proj"][0])


@pytest.mark.parametrize(
    "key_and_pair",
    [
        ((2, "q_proj"), (torch.zeros(4, 12), torch.zeros(10, 4))),
        ((0, "lm_head"), (torch.zeros(4, 12), torch.zeros(10, 4))),
        ((0, "q_proj"), (torch.zeros(4, 13), torch.zeros(10, 4))),
        ((0, "q_proj"), (torch.zeros(4, 12), torch.zeros(11, 4))),
        ((0, "q_proj"), (torch.zeros(4, 12), torch.zeros(10, 5))),
        ((0, "q_proj"), (torch.zeros(9, 12), torch.zeros(10, 9))),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    key_and_pair: tuple[tuple[int, str], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    weights = AdapterWeights(8, dict([key_and_pair]))
    with pytest.raises(ValueError, match=f"{key_and_pair[0][1]}"):
        check_weights(weights, LAYOUT, torch.float32)


def test_a_b_that_is_infinite_in_float16_is_refused_there() -> None:
    weights = AdapterWeights(4, {(0, "q_proj"): (torch.zeros(4, 12), torch.full((10, 4), 7e4))})
    with pytest.raises(ValueError, match="q_proj in layer 0 is infinite in float16"):
        check_weights(weights, LAYOUT, torch.float16)
    check_weights(weights, LAYOUT, torch.bfloat16)
