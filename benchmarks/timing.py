"""Timing of several callables side by side, so that a ratio between them means something.

Callables take turns, round after round, and the order turns with the round. One sample is a block of calls that lasts
at least `block` seconds (at least one call); its value is the median over the calls of the block. Beside each sample
stands how many cores other processes (and the hypervisor) used meanwhile: a sample with more than `QUIET` is marked
noisy, but kept and reported. Nothing is thrown away: `Timing.median` is over all samples, `Timing.quiet_median` over
the quiet ones, and both counts are in the record.
"""

import gc
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

QUIET = 0.08  # cores; one clock tick of /proc/stat in a block of 0.25 s is 0.04
SETTLE = 0.02  # seconds; longer than an idle OpenMP pool spins, so that one peer's pool does not slow the next


@dataclass(frozen=True)
class Sample:
    seconds: float  # median over the calls of the block
    calls: int
    others: float | None  # cores that other processes used; None where /proc/stat is missing
    probe: tuple[float, float] | None  # what the probe returned just before and just after

    @property
    def quiet(self) -> bool:
        return self.others is not None and self.others <= QUIET


@dataclass(frozen=True)
class Timing:
    name: str
    samples: tuple[Sample, ...]
    threads: int

    @property
    def median(self) -> float:
        return median(s.seconds for s in self.samples)

    @property
    def minimum(self) -> float:
        return min(s.seconds for s in self.samples)

    @property
    def quiet_median(self) -> float | None:
        quiet = [s.seconds for s in self.samples if s.quiet]
        return median(quiet) if quiet else None

    @property
    def probe(self) -> float | None:
        """Median over samples of the mean of the two probes."""
        probes = [sum(s.probe) / 2 for s in self.samples if s.probe is not None]
        return median(probes) if probes else None

    def record(self) -> dict[str, Any]:
        """What goes into a results file; times in seconds."""
        return {
            "name": self.name,
            "threads": self.threads,
            "median": self.median,
            "quiet_median": self.quiet_median,
            "minimum": self.minimum,
            "samples": len(self.samples),
            "noisy": sum(not s.quiet for s in self.samples),
            "probe": self.probe,
            "all": [[s.seconds, s.calls, s.others, s.probe] for s in self.samples],
        }

    def __str__(self) -> str:
        times = [self.minimum, self.median, self.quiet_median]
        row = " ".join("         -" if t is None else f"{t * 1e3:10.3f}" for t in times)
        row = f"{self.name:40s} {row}  {sum(not s.quiet for s in self.samples)}/{len(self.samples)}"
        return row if self.probe is None else f"{row}  {self.probe:.1f}"


HEADER = f"{'case':40s} {'min ms':>10s} {'median ms':>10s} {'quiet ms':>10s}  noisy/samples  probe"


class _OtherLoad:
    """Cores that others used since construction: all busy ticks of the machine minus our own CPU time."""

    def __init__(self) -> None:
        self.wall, self.busy, self.own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        busy = _busy_seconds()
        if busy is None or self.busy is None:
            return None
        others = (busy - self.busy) - (_own_seconds() - self.own)
        return max(0.0, others / (time.perf_counter() - self.wall))


def _own_seconds() -> float:
    t = os.times()
    return t.user + t.system


def _busy_seconds() -> float | None:
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def measure(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    block: float = 0.25,
    threads: int = 2,
    warmup: int = 1,
    probe: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Time every case `rounds` times, interleaved. `probe` runs just before and just after every sample."""
    torch.set_num_threads(threads)
    for call in cases.values():
        for _ in range(warmup):
            call()
    samples: dict[str, list[Sample]] = {name: [] for name in cases}
    names = list(cases)
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            samples[name].append(_sample(cases[name], block, probe))
    return {name: Timing(name, tuple(s), threads) for name, s in samples.items()}


def _sample(call: Callable[[], object], block: float, probe: Callable[[], float] | None) -> Sample:
    gc.collect()
    before = probe() if probe else None
    time.sleep(SETTLE)
    collecting = gc.isenabled()
    gc.disable()
    try:
        seconds: list[float] = []
        load, start = _OtherLoad(), time.perf_counter()
        while not seconds or time.perf_counter() - start < block:
            t = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - t)
        others = load.cores()
    finally:
        if collecting:
            gc.enable()
    after = probe() if probe else None
    return Sample(median(seconds), len(seconds), others, None if before is None or after is None else (before, after))
