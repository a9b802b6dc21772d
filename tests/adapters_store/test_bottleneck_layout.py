"""Bottleneck adapters in pages: every unit at its place, zeros everywhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adapters_store.bottleneck_layout import BottleneckShape
from adapters_store.weights import BottleneckTensors

from .random_adapters import BOTTLENECKS, bottleneck_image, random_bottlenecks


def test_a_shape_has_the_largest_size_of_each_site() -> None:
    tensors = random_bottlenecks({"attention": 3, "output": 20}, layers=[0]).tensors
    tensors = {**tensors, **random_bottlenecks({"output": 33}, layers=[1]).tensors}
    shape = BottleneckShape.of(replace(random_bottlenecks({"output": 1}), tensors=tensors))
    assert (shape.sizes, shape.num_pages) == ({"attention": 3, "output": 33}, 4)


def test_pages_hold_the_units_of_a_site_sixteen_to_a_page() -> None:
    weights = random_bottlenecks({"attention": 5, "output": 20}, layers=[1])
    attention, first, second = (BOTTLENECKS.split(page) for page in bottleneck_image(weights).pages)
    for site, pages, size in (("attention", [attention], 5), ("output", [first, second], 20)):
        own = weights.tensors[1, site]
        down, up, bias = (
            torch.cat(parts)
            for parts in (
                [page.down[1, 0] for page in pages],
                [page.up[1] for page in pages],
                [page.down_bias[1, 0] for page in pages],
            )
        )
        assert torch.equal(down[:size], own.down)
        assert torch.equal(up[:size], own.up.T)
        assert torch.equal(bias[:size], own.down_bias)
        assert torch.equal(pages[0].up_bias[1], own.up_bias)
        assert not any(part[size:].any() for part in (down, up, bias))
    assert not second.up_bias.any()
    assert not any(array[0].any() for page in (attention, first, second) for array in page.arrays)


@pytest.mark.parametrize(
    ("layer", "changes"),
    [(2, {}), (0, {"down": torch.ones(5, 11)}), (0, {"up": torch.ones(12, 4)}), (0, {"up_bias": torch.ones(5)})],
)
def test_what_does_not_fit_the_base_is_refused(layer: int, changes: dict[str, torch.Tensor]) -> None:
    own: BottleneckTensors = random_bottlenecks({"output": 5}).tensors[0, "output"]
    weights = replace(random_bottlenecks({"output": 5}), tensors={(layer, "output"): own._replace(**changes)})
    with pytest.raises(ValueError, match=f"output of layer {layer}"):
        BOTTLENECKS.check(weights)


def test_what_is_infinite_in_float16_is_refused() -> None:
    own = random_bottlenecks({"output": 5}).tensors[0, "output"]
    weights = replace(
        random_bottlenecks({"output": 5}), tensors={(0, "output"): own._replace(up=torch.full((12, 5), 7e4))}
    )
    BOTTLENECKS.check(weights)
    with pytest.raises(ValueError, match="float16"):
        replace(BOTTLENECKS, dtype=torch.float16).check(weights)
