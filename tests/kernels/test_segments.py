import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_kernels.segments import CHUNK_TOKENS, LoRASegments

PAGES = {0: [3], 1: [4, 9], 2: [1, 2, 7, 11], 3: [12]}


@given(st.lists(st.integers(-1, 3), max_size=80))
def test_every_adapter_token_is_in_one_chunk_with_its_own_pages(slots: list[int]) -> None:
    segments = LoRASegments.build(np.array(slots, dtype=np.int32), PAGES, "cpu")
    routed: dict[int, list[int]] = {}
    for start, length, num_pages, *pages in segments.chunks.tolist() if segments else []:
        assert 1 <= length <= CHUNK_TOKENS
        for token in segments.token_order[start : start + length].tolist():
            assert token not in routed
            routed[token] = pages[:num_pages]
    assert routed == {token: PAGES[slot] for token, slot in enumerate(slots) if slot >= 0}


def test_a_step_without_adapters_has_no_segments() -> None:
    assert LoRASegments.build(np.array([-1, -1], dtype=np.int32), PAGES, "cpu") is None


def test_an_unknown_slot_is_an_error() -> None:
    with pytest.raises(KeyError):
        LoRASegments.build(np.array([7], dtype=np.int32), PAGES, "cpu")
