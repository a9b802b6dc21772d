"""What the ranks of one replica exchange on their devices."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final, Self

import torch
import torch.distributed as dist

from adapters_store.shard import Shard

_TIMEOUT: Final = timedelta(minutes=5)  # a rank that has not come to an exchange by then never will


class TensorParallel:
    """This process's rank, its device, and its way to the others: NCCL between GPUs, gloo between CPUs.

    Every rank makes the same calls in the same order. On CUDA they are queued on the current stream, the host does not
    wait, and they may be recorded in a CUDA graph. A rank that dies makes the others' calls raise RuntimeError on the
    CPU; on CUDA they hang until `abort`.
    """

    def __init__(self, shard: Shard, device: torch.device, group: Any) -> None:
        self.shard = shard
        self.device = device
        self._group = group

    @classmethod
    def join(cls, shard: Shard, kind: str, folder: str) -> Self:
        """Meet the other ranks in a folder of this host; where `kind` is "cuda" each is on the GPU of its number."""
        store = dist.FileStore(f"{folder}/store", shard.size)  # type: ignore[attr-defined]
        if kind != "cuda":
            return cls(shard, torch.device(kind), _gloo(store, shard))
        device = torch.device("cuda", shard.rank)
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _TIMEOUT
        ranks = cls(shard, device, dist.ProcessGroupNCCL(store, shard.rank, shard.size, options))
        # The communicator, and its memory, are made by the first exchange: before memory is measured.
        ranks.all_reduce(torch.zeros(1, device=device))
        torch.cuda.synchronize(device)
        return ranks

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x, made the sum over the ranks in place."""
        options = dist.AllreduceOptions()
        options.asyncOp = False
        _finish(self._group.allreduce([x], options))
        return x

    def broadcast(self, x: torch.Tensor) -> None:
        """Make x what it is on rank 0."""
        options = dist.BroadcastOptions()
        options.asyncOp = False
        options.rootRank = options.rootTensor = 0
        _finish(self._group.broadcast([x], options))

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, width] of all ranks side by side, [n, size * width], on rank 0; [n, 0] on the others."""
        options = dist.GatherOptions()
        options.asyncOp = False
        options.rootRank = 0
        if self.shard.rank > 0:
            _finish(self._group.gather([], [x], options))
            return x.new_empty(len(x), 0)
        parts = x.new_empty(self.shard.size, *x.shape)
        _finish(self._group.gather([list(parts)], [x], options))
        return parts.transpose(0, 1).flatten(1)

    def abort(self) -> None:
        """Give up what is under way on the device. Waits for recorded graphs to be dropped: not for a step's thread."""
        if self.device.type == "cuda":
            self._group.abort()


def _gloo(store: Any, shard: Shard) -> dist.ProcessGroupGloo:
    """On the loopback device: nobody else is to reach it."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = _TIMEOUT
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return dist.ProcessGroupGloo(store, shard.rank, shard.size, options)


def _finish(work: dist.Work | None) -> None:
    """On the CPU wait; on CUDA let the current stream wait, where the exchange is not on it already."""
    if work is not None:
        work.wait()
