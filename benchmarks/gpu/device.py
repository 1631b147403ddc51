"""Streams, graphs and clocks of the GPU, and stand-ins with the same methods for the dry run.

The bodies that use them are thus executed without a GPU too: there a graph is the call itself, a stream is nothing, and
the clock is the processor's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from pyseq import _C, _library
from pyseq._library import REGISTRY, Op

Call = Callable[[], Any]
WARM_UP = 20


class Cuda:
    """The first GPU. Times are seconds between two events on the stream."""

    backend, device, dry = "cuda", "cuda", False

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def faulted(self) -> bool:
        """Whether a kernel has failed in a way that ends the process's use of the device."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def l2_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(0).L2_cache_size)

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def side_stream(self) -> AbstractContextManager[Any]:
        """A new stream, current inside; work enqueued before is not waited for."""
        return torch.cuda.stream(torch.cuda.Stream())

    def delay(self, seconds: float) -> None:
        """Occupies the current stream, so that a kernel on another stream would run too early."""
        torch.cuda._sleep(int(seconds * 2e9))

    def capture(self, call: Call) -> tuple[Call, Any]:
        """A graph of the call, captured after warming it up on a side stream: (replay, what the capture returned)."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return graph.replay, result

    def time(self, calls: Sequence[Call], n: int, warm_up: int = 0) -> list[float]:
        """Seconds of n calls, the callables taking turns. The stream is held back first, so that the processor's work
        of enqueueing does not show, unless it takes longer than the kernels."""
        for i in range(warm_up):
            calls[i % len(calls)]()
        self.synchronize()
        start = time.perf_counter()
        calls[0]()
        enqueueing = time.perf_counter() - start
        self.synchronize()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
        self.delay(min(0.2, 2 * n * enqueueing + 1e-3))
        for i, (before, after) in enumerate(events):
            before.record()
            calls[i % len(calls)]()
            after.record()
        self.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in events]


class Dry:
    """No GPU: the emulator where it was built, else the CPU's kernels."""

    device, dry = "cpu", True

    def __init__(self) -> None:
        self.backend = "simt" if _library.HAS_SIMT else "cpu"

    def synchronize(self) -> None:
        pass

    def faulted(self) -> bool:
        return False

    def l2_bytes(self) -> int:
        return 1 << 12

    def free_bytes(self) -> int:
        return 1 << 26

    def side_stream(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def delay(self, seconds: float) -> None:
        pass

    def capture(self, call: Call) -> tuple[Call, Any]:
        result = call()

        def replay() -> None:
            again = call()
            for kept, new in zip(tensors(result), tensors(again), strict=True):
                kept.detach().copy_(new.detach())

        return replay, result

    def time(self, calls: Sequence[Call], n: int, warm_up: int = 0) -> list[float]:
        seconds = []
        for call in list(calls)[:n]:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds


Device = Cuda | Dry


def ops(device: Device) -> list[Op]:
    """The ops with kernels to run there."""
    return [op for op in REGISTRY.values() if device.backend in op.backends]


def missing_kernels() -> list[str]:
    """Ops that should have CUDA kernels and have none in this build."""
    return [name for name, op in REGISTRY.items() if not op.cublas and name not in _C.cuda_ops]


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, tuple | list) else []
