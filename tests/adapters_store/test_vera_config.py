"""VeRA's shared matrices, made anew where a file leaves them out."""

from __future__ import annotations

import pytest
import torch
from peft import VeraConfig, get_peft_model

from adapters_store.vera_config import draw_projections

from .conftest import tiny_model


@pytest.mark.parametrize("key", [0, 7, 2**31, 2**40 + 3])
def test_they_are_peft_s_to_the_bit(key: int) -> None:
    config = VeraConfig(r=19, target_modules=["q_proj", "down_proj"], projection_prng_key=key)
    model = get_peft_model(tiny_model(), config)
    a, b = (getattr(model.base_model, f"vera_{side}")["default"] for side in "AB")
    drawn = draw_projections({"A": tuple(a.shape), "B": tuple(b.shape)}, key)
    assert torch.equal(torch.from_numpy(drawn["A"]), a)
    assert torch.equal(torch.from_numpy(drawn["B"]), b)
