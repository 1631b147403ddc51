"""Calling one function many times: on CUDA as a graph, so that a step costs its kernels and not their launches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import torch

Function = Callable[[], object]
WARM = 2
WORTH = 16  # replays for which recording pays: by estimate, as nothing of this has been timed on a GPU


class Graphs(Protocol):
    def warm(self, function: Function) -> None:
        """Runs it, in the way that recording it asks for."""

    def record(self, function: Function) -> Function:
        """Runs nothing: returns what will."""


class CudaGraphs:
    """torch's CUDA graphs: all of this file that needs a GPU.

    One per thread and device, for all calls of generate: cuBLAS keeps a workspace for every stream it has ever met. The
    graphs share a pool of memory, as the thread replays one after the other and nothing in it outlives a replay. The
    pool lives as long as one of its graphs: the last is kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.last: torch.cuda.CUDAGraph | None = None

    def warm(self, function: Function) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            function()
        current.wait_stream(self.stream)

    def record(self, function: Function) -> Function:
        try:
            graph = self._capture(function)
        except torch.OutOfMemoryError:  # during a capture the allocator does not give back what it caches
            torch.cuda.empty_cache()
            graph = self._capture(function)
        self.last = graph

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay

    def _capture(self, function: Function) -> torch.cuda.CUDAGraph:
        """As torch.cuda.graph does, which first waits for the device and empties the allocator's cache."""
        graph = torch.cuda.CUDAGraph()
        pool = None if self.last is None else self.last.pool()
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            # thread_local: what other threads of the program do on their devices does not break the capture.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        return graph


class _Made(threading.local):
    def __init__(self) -> None:
        self.by_device: dict[torch.device, CudaGraphs] = {}


_MADE = _Made()


def graphs_for(device: torch.device) -> Graphs | None:
    if device.type != "cuda":
        return None
    if device not in _MADE.by_device:
        _MADE.by_device[device] = CudaGraphs(device)
    return _MADE.by_device[device]


class Replay:
    """`function`, which reads and writes memory that stays where it is, and nothing on the host.

    Of `calls`, the first two run it; they count like all others. The third records it, and from then on the record is
    replayed. Without `graphs`, or where less than 16 replays would follow, every call runs it.
    """

    def __init__(self, function: Function, graphs: Graphs | None, calls: int) -> None:
        self._function = function
        self._graphs = graphs if calls - WARM >= WORTH else None
        self._recorded: Function | None = None
        self._calls = 0

    def __call__(self) -> None:
        if self._graphs is None:
            self._function()
            return
        if self._calls == WARM:
            self._recorded = self._graphs.record(self._function)
        if self._recorded is None:
            self._graphs.warm(self._function)
        else:
            self._recorded()
        self._calls += 1
