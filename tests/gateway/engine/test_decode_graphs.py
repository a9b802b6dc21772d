import pytest

from gateway.engine.decode_graphs import page_limits


@pytest.mark.parametrize(
    ("size", "max_pages", "limits"),
    [(1, 1, [0, 1]), (8, 16, [0, 16, 64, 128]), (64, 1, [0, 16, 64]), (256, 1, [0, 16, 64, 256])],
)
def test_there_is_a_graph_for_no_few_some_and_many_pages(size: int, max_pages: int, limits: list[int]) -> None:
    assert page_limits(size, max_pages) == limits
