"""How far a kernel may be from the truth."""

from torch import Tensor


def assert_as_exact(kernel: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
    """The kernel's error is at most twice that of the plain PyTorch path in the same dtype.

    truth: fp64, from the same inputs. Added to that, 4e-6 of the largest value: the order of an fp32 sum.
    """
    error = (kernel.cpu().double() - truth).abs().max()
    allowed = 2 * (same_dtype.cpu().double() - truth).abs().max() + 4e-6 * truth.abs().max()
    assert kernel.dtype == same_dtype.dtype
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
