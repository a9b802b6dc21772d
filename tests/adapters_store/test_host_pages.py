"""Frames of host memory come back when nobody holds their image."""

from __future__ import annotations

from adapters_store.bottleneck_layout import BottleneckShape
from adapters_store.host_pages import HostPages
from adapters_store.page_image import PageImage


def test_no_more_frames_are_handed_out_than_fit() -> None:
    memory = HostPages(max_bytes=350, page_bytes=100, pinned=False)
    assert memory.num_pages == memory.num_free == 3
    image = memory.take(PageImage(20, ()))
    assert image is not None
    assert (image.rank, image.num_bytes, memory.num_free) == (20, 200, 1)
    assert memory.take(PageImage(17, ())) is None
    assert memory.num_free == 1


def test_frames_are_free_again_when_the_last_who_holds_their_image_lets_it_go() -> None:
    memory = HostPages(max_bytes=300, page_bytes=100, pinned=False)
    first = second = memory.take(PageImage(40, ()))
    del first
    assert memory.num_free == 0
    del second
    assert memory.num_free == 3


def test_images_share_no_memory() -> None:
    memory = HostPages(max_bytes=400, page_bytes=100, pinned=False)
    images = [memory.take(PageImage(rank, ())) for rank in (16, 32, 16)]
    pages = [page for image in images if image is not None for page in image.pages]
    for value, page in enumerate(pages):
        page.fill_(value)
    assert [page.unique().tolist() for page in pages] == [[0], [1], [2], [3]]


def test_vectors_have_frames_of_their_own() -> None:
    memory = HostPages(max_bytes=3200, page_bytes=100, vector_size=20, pinned=False)
    assert memory.num_pages == 30  # a sixteenth is for two rows of 80 bytes
    images = [memory.take(PageImage(0, ()), has_vectors=True) for _ in range(3)]
    assert [image is not None for image in images] == [True, True, False]
    assert memory.num_free == 30
    assert images[0] is not None
    assert images[0].num_bytes == 80
    del images[0]
    assert memory.take(PageImage(16, ()), has_vectors=True) is not None


def test_a_frame_holds_several_pages_of_bottlenecks() -> None:
    memory = HostPages(max_bytes=300, page_bytes=100, bottleneck_bytes=30, pinned=False)
    shape = BottleneckShape("sum", "relu", {"attention": 16, "output": 33})
    assert memory.num_frames_for(PageImage(0, (), bottleneck=shape)) == 2
    image = memory.take(PageImage(0, (), bottleneck=shape))
    assert image is not None
    assert (image.num_pages, image.num_bottleneck_pages, image.num_bytes, memory.num_free) == (0, 4, 120, 1)
    for value, page in enumerate(image.pages):
        page.fill_(value)
    assert [page.unique().tolist() for page in image.pages] == [[0], [1], [2], [3]]
    assert memory.take(PageImage(0, (), bottleneck=shape)) is None
    del image, page
    assert memory.num_free == 3


def test_pages_of_bottlenecks_larger_than_a_frame_have_no_room() -> None:
    memory = HostPages(max_bytes=300, page_bytes=100, bottleneck_bytes=101, pinned=False)
    shape = BottleneckShape("sum", "relu", {"output": 1})
    assert not memory.may_hold(memory.num_frames_for(PageImage(0, (), bottleneck=shape)), has_vectors=False)
