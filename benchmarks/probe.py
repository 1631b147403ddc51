"""What the machine allows at this moment, with torch alone: memory bandwidth, float32 peak, cost of fresh memory.

Memory bandwidth of a virtual machine can change by a factor of two within minutes, so a decode figure means little
without `read_bandwidth()` taken just before and just after it (25 ms a call; `timing.measure(probe=...)` does it).

    python benchmarks/probe.py            prints everything as JSON
"""

import json
import time
from collections.abc import Callable
from functools import cache

import torch

FLOATS = 80_000_000  # 320 MB: ten times a 32 MB last-level cache


def _best(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        t = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - t)
    return min(seconds)


@cache
def _buffer(which: str) -> torch.Tensor:
    del which  # only names the buffer
    return torch.ones(FLOATS)


def read_bandwidth(repeats: int = 3) -> float:
    """GB/s of reading 320 MB of float32 with torch's current number of threads, best of `repeats`.

    The reduction is `amax`: it does less work per byte than `sum`, which does not reach the bandwidth on two threads.
    """
    x = _buffer("source")
    return x.nbytes / _best(x.amax, repeats) / 1e9


def copy_bandwidth(repeats: int = 3) -> float:
    """GB/s of `copy_`, read plus written bytes (without the read of the line that a store causes)."""
    x, y = _buffer("source"), _buffer("target")
    return 2 * x.nbytes / _best(lambda: y.copy_(x), repeats) / 1e9


def float32_peak(repeats: int = 5, size: int = 2048) -> float:
    """GFLOP/s of a square float32 product through oneDNN with a packed weight: the FMA peak, from below."""
    x, w = torch.randn(size, size), torch.randn(size, size)
    packed = torch.ops.mkldnn._reorder_linear_weight(w, size)

    def call() -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    call()
    return 2 * size**3 / _best(call, repeats) / 1e9


def fresh_memory_rate(repeats: int = 3, megabytes: int = 256) -> float:
    """GB/s of writing memory for the first time: allocation, page faults and the store, as any new output does.

    The block is larger than the largest block that glibc's malloc would keep (32 MB), so that each one is new.
    """
    n = megabytes * 1_000_000 // 4
    return 4 * n / _best(lambda: torch.empty(n).fill_(1.0), repeats) / 1e9


def reused_memory_rate(repeats: int = 3) -> float:
    """GB/s of writing memory that is already there: what `fresh_memory_rate` would be without page faults."""
    y = _buffer("target")
    return y.nbytes / _best(lambda: y.fill_(1.0), repeats) / 1e9


def probe() -> dict[str, float | int]:
    """All of the above for the current number of threads."""
    return {
        "threads": torch.get_num_threads(),
        "read GB/s": round(read_bandwidth(), 1),
        "copy GB/s": round(copy_bandwidth(), 1),
        "write, fresh memory GB/s": round(fresh_memory_rate(), 1),
        "write, reused memory GB/s": round(reused_memory_rate(), 1),
        "float32 GFLOP/s (packed oneDNN)": round(float32_peak(), 1),
    }


if __name__ == "__main__":
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(json.dumps(probe()))
