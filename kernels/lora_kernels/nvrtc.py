"""CUDA C++ kernels compiled for the card at hand by NVRTC, which every CUDA build of PyTorch brings along."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from cuda.bindings import driver, nvrtc

# A tensor or None for a pointer, an int of 32 bits, or what is passed by value.
Argument = torch.Tensor | None | int | ctypes.Array[Any]


class CudaKernel:
    """One `extern "C"` kernel of a source file beside this module, compiled with some macros.

    shared_bytes: dynamic shared memory a thread block. Raises RuntimeError with the compiler's words when it refuses.
    """

    def __init__(
        self,
        source: str,
        name: str,
        macros: Mapping[str, int],
        device: torch.device,
        shared_bytes: int,
    ) -> None:
        cubin = compile_cubin(source, macros, _architecture(device))
        (library,) = _checked(driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0))
        (kernel,) = _checked(driver.cuLibraryGetKernel(library, name.encode()))
        if shared_bytes > 48 << 10:  # more than every card grants unasked
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, driver.CUdevice(device.index or 0)))
        self._function = driver.CUfunction(int(kernel))
        self._config = driver.CUlaunchConfig()
        self._config.sharedMemBytes = shared_bytes
        self._config.blockDimY = self._config.blockDimZ = self._config.gridDimY = self._config.gridDimZ = 1
        if torch.cuda.get_device_capability(device) >= (9, 0):
            # The kernel may start before the one ahead of it has ended; it waits for it by itself.
            overlap = driver.CUlaunchAttribute()
            overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            overlap.value.programmaticStreamSerializationAllowed = 1
            self._config.attrs, self._config.numAttrs = [overlap], 1

    def __call__(self, num_blocks: int, num_threads: int, arguments: Sequence[Argument]) -> None:
        """Launch on the current stream."""
        values = [_c_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self._config.gridDimX, self._config.blockDimX = num_blocks, num_threads
        self._config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        _checked(driver.cuLaunchKernelEx(self._config, self._function, ctypes.addressof(pointers), 0))


def tensor_map(x: torch.Tensor, rows: int, columns: int) -> ctypes.Array[ctypes.c_uint64]:
    """How the copy engine finds boxes [rows, columns] of x [n, width] in bf16 or fp16: swizzled by 128 bytes."""
    kinds = driver.CUtensorMapDataType
    kind = (
        kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if x.dtype == torch.bfloat16 else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    )
    to_u64, to_u32 = driver.cuuint64_t, driver.cuuint32_t
    (encoded,) = _checked(
        driver.cuTensorMapEncodeTiled(
            kind,
            2,
            x.data_ptr(),
            [to_u64(x.shape[1]), to_u64(x.shape[0])],
            [to_u64(x.stride(0) * x.element_size())],
            [to_u32(columns), to_u32(rows)],
            [to_u32(1), to_u32(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return (ctypes.c_uint64 * 16)(*map(int, encoded.opaque))


def compile_cubin(source: str, macros: Mapping[str, int], architecture: str) -> bytes:
    """The machine code of a source file beside this module, for instance for "sm_90a"; needs no GPU."""
    return _compile(source, tuple(sorted(macros.items())), architecture)


@cache
def _compile(source: str, macros: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    text = (files("lora_kernels") / source).read_bytes()
    (program,) = _checked(nvrtc.nvrtcCreateProgram(text, source.encode(), 0, [], []))
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{name}={value}" for name, value in macros)]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        (size,) = _checked(nvrtc.nvrtcGetProgramLogSize(program))
        log = bytes(size)
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"NVRTC refuses {source} for {architecture}: {log.decode(errors='replace')}")
    (size,) = _checked(nvrtc.nvrtcGetCUBINSize(program))
    cubin = bytes(size)
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return cubin


def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major == 9 else "")


def _c_value(argument: Argument) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int(argument) if isinstance(argument, int) else argument


def _checked(results: tuple[Any, ...]) -> tuple[Any, ...]:
    error, *values = results
    if int(error) != 0:
        raise RuntimeError(f"CUDA answered {error.name}")
    return tuple(values)
