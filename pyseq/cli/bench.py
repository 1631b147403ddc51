"""`pyseq bench`"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.table import Table

from .output import Device, Json, Threads, bar, clear_failures, print_json, results, use_threads


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and best. `bytes` are those of the arguments and results, each counted once."""

    op: str
    work: str
    dtype: str
    median: float
    best: float
    bytes: int

    @property
    def rate(self) -> float:
        """GB/s"""
        return self.bytes / self.median / 1e6


@clear_failures
def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops to time.", show_default="all")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time spent on each measurement.")] = 0.5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Time every op on this machine, beside what its memory can deliver.

    Forward, forward with backward, and one step, at the size of a layer of a 130 M Mamba (D = 1536, N = 16) or Mamba-2
    (H = 24, P = 64, N = 128) over 2048 tokens. An op that moved nothing but its arguments and results at the bandwidth
    shown would be at its limit.
    """
    use_threads(threads)
    import torch

    from pyseq._cuda import usable_device
    from pyseq._library import REGISTRY

    from .workloads import WORKLOADS

    device = usable_device(device)
    names = ops or list(REGISTRY)
    for name in names:
        if name not in REGISTRY:
            raise typer.BadParameter(f"{name!r}: expected some of {', '.join(REGISTRY)}", param_hint="OPS")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype!r}: expected float32, bfloat16 or float16", param_hint="--dtype")
    calls = [(name, work) for name in names for work in WORKLOADS[name](getattr(torch, dtype), device)]
    timings = []
    with bar() as progress:
        before = bandwidth(device)
        for name, work in progress.track(calls, description="timing"):
            median, best = measure(work.call, seconds, device)
            timings.append(Timing(name, work.name, dtype, median, best, work.bytes))
        read = max(before, bandwidth(device))
    if json:
        print_json(
            {
                "threads": torch.get_num_threads(),
                "read_gb_per_s": read,
                "timings": [asdict(t) | {"gb_per_s": t.rate} for t in timings],
            }
        )
        return
    caption = f"memory here reads {read:.0f} GB/s; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    table = Table("op", "work", "median ms", "best ms", "GB/s", caption=caption)
    for column in table.columns[2:]:
        column.justify = "right"
    for t in timings:
        table.add_row(t.op, t.work, f"{t.median:.3f}", f"{t.best:.3f}", f"{t.rate:.1f}")
    results().print(table)


def measure(call: Callable[[], Any], seconds: float, device: str) -> tuple[float, float]:
    """Median and best of a call in milliseconds."""
    import torch

    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)
    call()
    wait()
    spent: list[float] = []
    began = time.perf_counter()
    while len(spent) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        wait()
        spent.append(1e3 * (time.perf_counter() - start))
    return statistics.median(spent), min(spent)


def bandwidth(device: str) -> float:
    """GB/s of reading 256 MB."""
    import torch

    numbers = torch.ones(1 << 26, device=device)
    return 4 * numbers.numel() / measure(numbers.amax, 0.2, device)[1] / 1e6


def tensor_bytes(values: Any) -> int:
    """Bytes of all tensors in a structure."""
    import torch

    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    if isinstance(values, dict):
        values = list(values.values())
    return sum(map(tensor_bytes, values)) if isinstance(values, list | tuple) else 0
