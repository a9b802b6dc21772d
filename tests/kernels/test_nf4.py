import pytest
import torch
import torch.nn.functional as F

from lora_kernels.nf4 import (
    NF4_CODE,
    NF4Tiles,
    blocks_of,
    nf4_matmul,
    nf4_matmul_ref,
    quantize_nf4,
    unpack_nf4_ref,
)
from lora_kernels.nf4_plans import NarrowPlan, Plan, WidePlan, plan_for
from tests.kernels.error_rule import assert_as_exact

H200, A100, L40S, V100 = (9, 0), (8, 0), (8, 9), (7, 0)


def _weight(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.05
    weight[shape[0] // 2] = 0  # a row of blocks without a scale
    return weight.to(dtype)


def _packed(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    return blocks_of(quantize_nf4(_weight((out_features, in_features), torch.float32)))


def _on(device: str, weight: NF4Tiles) -> NF4Tiles:
    return NF4Tiles(weight.tiles.to(device), weight.scales.to(device), weight.shape)


def test_takes_the_nearest_code() -> None:
    weight = torch.linspace(-1, 1, 64 * 50).view(50, 64)
    weight[:, 0] = 1  # every block's scale is one
    codes = quantize_nf4(weight).packed
    nearest = (weight.view(-1, 1) - NF4_CODE).abs().argmin(1)
    assert torch.equal(codes >> 4, nearest[::2].to(torch.uint8))
    assert torch.equal(codes & 15, nearest[1::2].to(torch.uint8))


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4, 32), torch.zeros(64), torch.zeros(4, 64, dtype=torch.int64)],
    ids=["part of a block", "one dimension", "not floats"],
)
def test_refuses_what_it_cannot_quantize(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="NF4 needs"):
        quantize_nf4(weight)


def test_refuses_an_x_of_another_width() -> None:
    with pytest.raises(ValueError, match="does not fit a weight of 128 columns"):
        nf4_matmul(torch.zeros(2, 64), NF4Tiles.of(*_packed(8, 128)))


@pytest.mark.parametrize("shape", [(64, 64), (3, 64), (130, 192)])
def test_tiles_give_the_bitsandbytes_order_back_bit_for_bit(shape: tuple[int, int]) -> None:
    packed, absmax = _packed(*shape)
    tiles = NF4Tiles.of(packed, absmax)
    again = tiles.blocks()
    assert torch.equal(again[0], packed)
    assert torch.equal(again[1], absmax)
    assert tiles.tiles.shape == (-(-shape[0] // 64), shape[1] // 64, 2048)


def test_a_lane_s_bytes_are_its_fragment_of_the_matrix_unit() -> None:
    packed, absmax = _packed(64, 128)
    tiles = NF4Tiles.of(packed, absmax)
    strip, lane, block = 2, 4 * 5 + 3, 1  # rows 32 + 5 and 32 + 13, pairs of columns 3, 7, ...
    own = tiles.tiles[0, block].view(4, 32, 16)[strip, lane]
    assert own[:8].tolist() == packed[37, block, 3::4].tolist()
    assert own[8:].tolist() == packed[45, block, 3::4].tolist()
    assert tiles.scales[0, block].view(8, 4, 2)[5, strip].tolist() == absmax[[37, 45], block].tolist()


@pytest.mark.parametrize("shape", [(3, 64), (33, 192)])
def test_unpack_kernel_gives_the_bits_of_the_plain_path(
    shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    from lora_kernels.triton_nf4 import unpack_nf4_triton

    packed, absmax = _packed(*shape)
    unpacked = unpack_nf4_triton(packed.to(device), absmax.to(device), dtype)
    assert torch.equal(unpacked.cpu(), unpack_nf4_ref(packed, absmax, dtype))


def test_the_plain_product_is_that_of_the_unpacked_weight() -> None:
    packed, absmax = _packed(40, 128)
    x, bias = torch.randn(3, 128), torch.randn(40)
    expected = F.linear(x, unpack_nf4_ref(packed, absmax, torch.float32), bias)
    assert torch.equal(nf4_matmul(x, NF4Tiles.of(packed, absmax), bias), expected)


SHAPES = [(4096, 4096), (28672, 4096), (4096, 14336), (1152, 896), (4096, 11008), (65, 192), (24, 64)]


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 1024])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_fits_what_it_is_for(num_tokens: int, shape: tuple[int, int]) -> None:
    plans = {card: plan_for(num_tokens, *shape, card) for card in (H200, A100, L40S, V100)}
    assert plans[V100] is None
    for plan in (plans[H200], plans[A100], plans[L40S]):
        if isinstance(plan, NarrowPlan):
            assert num_tokens <= plan.tokens
            assert (shape[1] // 64) % plan.warps == 0
        elif isinstance(plan, WidePlan):
            assert (shape[1] // 64) % (plan.in_groups * plan.span) == 0
    assert not isinstance(plans[A100], WidePlan)
    assert shape[0] % 8 == 0 or not isinstance(plans[H200], WidePlan)
    assert shape[0] % 8 or isinstance(plans[H200], NarrowPlan | WidePlan)


def test_a_few_rows_have_a_plan_on_every_card_since_ampere() -> None:
    assert all(isinstance(plan_for(4, 4096, 4096, card), NarrowPlan) for card in (H200, A100, L40S, (12, 0)))
    assert isinstance(plan_for(64, 4096, 4096, H200), WidePlan)
    assert plan_for(1 << 20, 4096, 4096, H200) is None


PLANS: list[Plan] = [
    NarrowPlan(8, 8, 1, 2, 4),
    NarrowPlan(16, 4, 2, 2, 0),
    NarrowPlan(32, 1, 1, 2, 2),
    WidePlan(16, 1, 4, 2, 4, share=False),
    WidePlan(16, 2, 1, 2, 6, share=True),
    WidePlan(32, 2, 1, 2, 5, share=True),
    WidePlan(64, 1, 2, 2, 3, share=True),
    WidePlan(128, 2, 1, 1, 5, share=False),
    WidePlan(256, 2, 1, 1, 4, share=True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "out_features", "in_features"),
    [(1, 4096, 512), (3, 1000, 1024), (7, 136, 2048), (16, 4096, 4096), (70, 72, 512), (300, 1000, 1024)],
)
def test_every_plan_is_as_exact_as_the_plain_path_and_gives_equal_bits(
    plan: Plan, num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    from lora_kernels.cuda_nf4 import nf4_matmul_by

    plan = plan.fitted(in_features // 64)
    if isinstance(plan, NarrowPlan) and num_tokens > plan.tokens:
        pytest.skip("more rows than the plan is for")
    torch.manual_seed(0)
    weight = _on("cuda", NF4Tiles.of(*_packed(out_features, in_features)))
    x, bias = torch.randn(num_tokens, in_features).to(dtype).cuda(), torch.randn(out_features).to(dtype).cuda()
    truth = F.linear(x.double(), unpack_nf4_ref(*weight.blocks(), torch.float32).double(), bias.double())
    y = nf4_matmul_by(plan, x, weight, bias)
    assert_as_exact(y, nf4_matmul_ref(x, weight, bias), truth.cpu())
    assert all(torch.equal(nf4_matmul_by(plan, x, weight, bias), y) for _ in range(4))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 16, 40, 100, 260, 700])
@pytest.mark.parametrize("shape", [(1001, 320), (6144, 4096), (13000, 1024), (1152, 896), (2048, 11008)])
def test_the_product_on_a_gpu_is_as_exact_as_the_plain_path(
    num_tokens: int, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(0)
    weight = _on(device, NF4Tiles.of(*_packed(*shape)))
    x = torch.randn(num_tokens, 2 * shape[1])[:, 8 : 8 + shape[1]].to(dtype).to(device)  # rows that lie apart
    truth = F.linear(x.double(), unpack_nf4_ref(*weight.blocks(), torch.float32).double())
    y = nf4_matmul(x, weight)
    assert y.shape == (num_tokens, shape[0])
    if num_tokens:
        assert_as_exact(y, nf4_matmul_ref(x, weight), truth.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 64), (40, 192), (1000, 4096)])
def test_tiles_unpack_to_the_bits_of_the_plain_path(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    from lora_kernels.cuda_nf4 import unpack_nf4_tiles

    packed, absmax = _packed(*shape)
    unpacked = unpack_nf4_tiles(_on(device, NF4Tiles.of(packed, absmax)), dtype)
    assert torch.equal(unpacked.cpu(), unpack_nf4_ref(packed, absmax, dtype))


@pytest.mark.gpu
def test_a_gpu_quantizes_to_the_bits_of_a_cpu() -> None:
    weight = _weight((512, 2048), torch.bfloat16)
    here, there = quantize_nf4(weight), quantize_nf4(weight.cuda())
    for name in ("packed", "absmax_u8", "nested_absmax", "nested_offset", "nested_code"):
        assert torch.equal(getattr(here, name), getattr(there, name).cpu()), name
