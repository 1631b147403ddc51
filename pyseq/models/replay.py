"""Calling one function many times: on CUDA as a graph, so that a step costs its kernels and not their launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Function = Callable[[], object]
WARM = 2


class Graphs(Protocol):
    def warm(self, function: Function) -> None:
        """Runs it, in the way that recording it asks for."""

    def record(self, function: Function) -> Function:
        """Runs nothing: returns what will."""


class CudaGraphs:
    """torch's CUDA graphs: all of this file that needs a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def warm(self, function: Function) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            function()
        current.wait_stream(self.stream)

    def record(self, function: Function) -> Function:
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads of the program do on their devices does not break the capture.
        capture = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.device(self.device), capture:
            function()

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay


def graphs_for(device: torch.device) -> Graphs | None:
    return CudaGraphs(device) if device.type == "cuda" else None


class Replay:
    """`function`, which reads and writes memory that stays where it is, and nothing on the host.

    The first two calls run it; they count like all others. The third records it, and from then on the record is
    replayed. Without `graphs` every call runs it.
    """

    def __init__(self, function: Function, graphs: Graphs | None) -> None:
        self._function, self._graphs = function, graphs
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
