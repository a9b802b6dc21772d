"""CUDA C++ kernels compiled for the card at hand by NVRTC, which every CUDA build of PyTorch brings along."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from importlib.resources import files
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from cuda.bindings import driver, nvrtc

from lora_kernels.launch import begun, is_rehearsal

# A tensor or None for a pointer, an int of 32 bits, or what is passed by value.
Argument = torch.Tensor | None | int | ctypes.Array[Any] | ctypes.Structure


class CudaKernel:
    """One `extern "C"` kernel of a source file beside this module, compiled with some macros.

    shared_bytes: dynamic shared memory a thread block. Compiled when it is first launched, or by a thread when it is
    made in a rehearsal (`lora_kernels.launch`). Raises RuntimeError with the compiler's words when it refuses.
    """

    def __init__(
        self,
        source: str,
        name: str,
        macros: Mapping[str, int],
        device: torch.device,
        shared_bytes: int,
    ) -> None:
        self._cubin = begun(partial(compile_cubin, source, macros, _architecture(device)))
        self._name, self._device, self._shared_bytes = name, device, shared_bytes

    def __call__(self, num_blocks: int, num_threads: int, arguments: Sequence[Argument]) -> None:
        """Launch on the current stream; nothing in a rehearsal."""
        if is_rehearsal():
            return
        values = [_c_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        function, config = self._loaded
        config.gridDimX, config.blockDimX = num_blocks, num_threads
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        _checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0))

    @cached_property
    def _loaded(self) -> tuple[driver.CUfunction, driver.CUlaunchConfig]:
        """The function on the device, and how it is launched."""
        (library,) = _checked(driver.cuLibraryLoadData(self._cubin(), [], [], 0, [], [], 0))
        (kernel,) = _checked(driver.cuLibraryGetKernel(library, self._name.encode()))
        if self._shared_bytes > 48 << 10:  # more than every card grants unasked
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            ordinal = driver.CUdevice(self._device.index or 0)
            _checked(driver.cuKernelSetAttribute(attribute, self._shared_bytes, kernel, ordinal))
        config = driver.CUlaunchConfig()
        config.sharedMemBytes = self._shared_bytes
        config.blockDimY = config.blockDimZ = config.gridDimY = config.gridDimZ = 1
        if torch.cuda.get_device_capability(self._device) >= (9, 0):
            # The kernel may start before the one ahead of it has ended; it waits for it by itself.
            overlap = driver.CUlaunchAttribute()
            overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            overlap.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [overlap], 1
        return driver.CUfunction(int(kernel)), config


def tensor_map(x: torch.Tensor, rows: int, columns: int) -> ctypes.Array[ctypes.c_uint64]:
    """How the copy engine finds boxes [rows, columns] of x [n, width] in bf16 or fp16: swizzled by their width."""
    return _tensor_map(x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), x.dtype, rows, columns)


# A step's activations lie where those of steps before did, and weights where they always are.
@lru_cache(maxsize=2048)
def _tensor_map(
    address: int, n: int, width: int, stride: int, dtype: torch.dtype, rows: int, columns: int
) -> ctypes.Array[ctypes.c_uint64]:
    kinds, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    swizzle = {64: swizzles.CU_TENSOR_MAP_SWIZZLE_128B, 16: swizzles.CU_TENSOR_MAP_SWIZZLE_32B}[columns]
    is_bf16 = dtype == torch.bfloat16
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if is_bf16 else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    to_u64, to_u32 = driver.cuuint64_t, driver.cuuint32_t
    (encoded,) = _checked(
        driver.cuTensorMapEncodeTiled(
            kind,
            2,
            address,
            [to_u64(width), to_u64(n)],
            [to_u64(stride * dtype.itemsize)],
            [to_u32(columns), to_u32(rows)],
            [to_u32(1), to_u32(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return (ctypes.c_uint64 * 16)(*map(int, encoded.opaque))


def compile_cubin(source: str, macros: Mapping[str, int], architecture: str) -> bytes:
    """The machine code of a source file beside this module, for instance for "sm_90a"; needs no GPU.

    It is kept in the user's cache folder: a dozen kernels take ten seconds to compile.
    """
    text = (files("lora_kernels") / source).read_bytes()
    headers = _headers()
    macro_options = (f"-D{name}={value}" for name, value in sorted(macros.items()))
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *macro_options]
    version = _checked(nvrtc.nvrtcVersion())
    key = hashlib.sha256(
        b"\0".join([text, *headers.values(), *map(str.encode, options), str(version).encode()])
    ).hexdigest()
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchbay" / f"{key}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    cubin = _compile(source, text, headers, options, architecture)
    with suppress(OSError):  # a home that cannot be written to costs time only
        _keep(kept, cubin)
    return cubin


def _headers() -> dict[bytes, bytes]:
    """The headers beside this module by name, as an #include finds them."""
    found = (entry for entry in files("lora_kernels").iterdir() if entry.name.endswith(".cuh"))
    return {entry.name.encode(): entry.read_bytes() for entry in sorted(found, key=lambda entry: entry.name)}


def _compile(
    source: str, text: bytes, headers: Mapping[bytes, bytes], options: Sequence[str], architecture: str
) -> bytes:
    contents, names = list(headers.values()), list(headers)
    (program,) = _checked(nvrtc.nvrtcCreateProgram(text, source.encode(), len(headers), contents, names))
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


def _keep(path: Path, cubin: bytes) -> None:
    """Written beside its place and moved there, so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}-{get_ident()}")
    part.write_bytes(cubin)
    part.replace(path)


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
