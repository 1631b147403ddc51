"""Why? The hardware counters of the hottest kernels, and times with one part of the work left out.

    python -m benchmarks.gpu.profile [--dry-run] [--results FOLDER] [--seconds 460]
    python -m benchmarks.gpu.profile --run NAME       one work, between the profiler's start and stop: ncu runs this

Counters need Nsight Compute (`ncu`) and a driver that lets it read them; where they do not come, the times of the
variants say which part of a kernel costs what. The card's clocks are left as they are.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import shutil
import statistics
import subprocess
import sys
from functools import partial
from typing import Any

import torch

import pyseq
from pyseq import testing

from .bench import timed
from .check import options
from .device import Cuda, Device, Dry, ops
from .record import NotHere, Record
from .works import Work, _sequence, standard, tiny

HOTTEST = 8   # works of the standard list, which begins with those that the goals are set for
SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats",
    "Occupancy", "LaunchStats",
)
# What is kept of a kernel's counters, by a pattern of the counter's name.
KEPT = {
    "duration": r"gpu__time_duration\.sum",
    "issue active %": r"(smsp|sm)__(issue_active|inst_issued)\..*|sm__instruction_throughput\..*pct.*",
    "pipes %": r"sm__inst_executed_pipe_.*pct.*|sm__pipe_.*pct.*",
    "DRAM %": r"(gpu__dram|dram)__throughput.*pct.*|gpu__dram_throughput.*",
    "L2, L1 %": r"(lts|l1tex)__.*throughput.*pct.*",
    "stalls per issue": r"smsp__average_warps_issue_stalled_.*_per_issue_active\.ratio",
    "occupancy": r"sm__warps_active.*pct.*|launch__occupancy_limit_.*",
    "launch": r"launch__(registers_per_thread|shared_mem_per_block.*|grid_size|block_size|waves_per_multiprocessor)",
    "conflicts": r"l1tex__data_bank_conflicts.*|.*bank_conflict.*\.sum",
}


def parse(text: str) -> list[dict[str, Any]]:
    """ncu's `--csv --page raw`: a row of names, a row of units, a row per kernel; other output may stand before."""
    lines = text.splitlines()
    start = next((i for i, row in enumerate(lines) if row.startswith('"ID"')), None)
    if start is None:
        return []
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    units, kernels = rows[0], rows[1:]
    found = []
    for row in kernels:
        kernel: dict[str, Any] = {"kernel": plain(row["Kernel Name"])}
        for group, pattern in KEPT.items():
            values = {n: _number(v) for n, v in row.items() if n and v and re.fullmatch(pattern, n)}
            kernel[group] = {f"{n} [{units[n]}]" if units.get(n) else n: v for n, v in values.items()}
        found.append(kernel)
    return found


def plain(name: str) -> str:
    """A kernel's name without its return type, template arguments and parameters."""
    return re.sub(r"[<(].*", "", name.replace("(anonymous namespace)::", "").removeprefix("void ")).strip()


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def run_once(device: Device, work: Work) -> None:
    """The call twice; the second time the profiler looks."""
    with testing.on(device.backend):
        call = work.ours(work.draw(*work.shape, dtype=torch.bfloat16, seed=0, device=device.device))
        call()
        device.synchronize()
        if not device.dry:
            torch.cuda.profiler.start()
        call()
        device.synchronize()
        if not device.dry:
            torch.cuda.profiler.stop()


def counters(device: Device, work: Work) -> dict[str, Any]:
    if device.dry:
        run_once(device, work)
        raise NotHere("no GPU: the profiled call ran")
    tool = shutil.which("ncu")
    if tool is None:
        raise NotHere("ncu is not on PATH")
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--kernel-name-base", "demangled", "-k", "regex:pyseq", "-c", "8"]
    for section in SECTIONS:
        command += ["--section", section]
    target = [sys.executable, "-m", "benchmarks.gpu.profile", "--run", work.name]
    ran = subprocess.run([*command, *target], capture_output=True, text=True, timeout=90)
    kernels = parse(ran.stdout)
    if not kernels:
        output = (ran.stdout + ran.stderr).strip()
        refused = re.search(r"ERR_NVGPUCTRPERM|Failed to initialize|not supported|LibraryNotLoaded", output)
        if refused:
            raise NotHere(f"ncu cannot read this device's counters: {refused.group()}")
        raise RuntimeError(f"ncu gave no counters, status {ran.returncode}: {output[-600:]}")
    return {"kernels": kernels, "summary": ", ".join(k["kernel"] for k in kernels)}


def timeline(device: Device, work: Work) -> dict[str, Any]:
    """Seconds of each kernel of one call, as torch's profiler sees them, the mean of five."""
    from torch.profiler import ProfilerActivity, profile

    with testing.on(device.backend):
        call = work.ours(work.draw(*work.shape, dtype=torch.bfloat16, seed=0, device=device.device))
        call()
        device.synchronize()
        with profile(activities=[ProfilerActivity.CPU if device.dry else ProfilerActivity.CUDA]) as seen:
            for _ in range(5):
                call()
            device.synchronize()
    kernels: dict[str, float] = {}
    for event in seen.key_averages():
        total = event.self_cpu_time_total if device.dry else event.self_device_time_total
        kernels[plain(event.key)] = kernels.get(plain(event.key), 0.0) + total / 5 * 1e-6
    largest = sorted(kernels, key=lambda name: -kernels[name])[:3]
    return {"kernels": kernels, "summary": ", ".join(f"{n} {kernels[n] * 1e6:.1f} us" for n in largest)}


# ---- variants --------------------------------------------------------------------------------------------------------


def variants(device: Device, work: Work) -> dict[str, Any]:
    """A scan's forward with one part left out: what the rest costs, as medians of seconds."""
    names = ["u", "dt", "A", "B", "C", "D", "z", "dt_bias"]

    def without(left_out: set[str], dt_softplus: bool = True) -> Any:
        def function(*tensors: torch.Tensor) -> Any:
            given: dict[str, Any] = {n: t for n, t in zip(names, tensors, strict=True) if n not in left_out}
            return pyseq.selective_scan(**given, dt_softplus=dt_softplus)

        return _sequence(function, " ".join(names), False)

    cases = {
        "everything": without(set()), "no gate": without({"z"}), "no skip": without({"D"}),
        "no softplus": without({"dt_bias"}, dt_softplus=False),
        "no gate, skip, softplus": without({"z", "D", "dt_bias"}, dt_softplus=False),
    }
    with testing.on(device.backend):
        x = work.draw(*work.shape, dtype=torch.bfloat16, seed=0, device=device.device)
        wide = dataclasses.replace(x, **{k: v.float() for k, v in vars(x).items()})
        positive = dataclasses.replace(x, dt=x.dt.abs() * 0.1)   # without softplus, dt must not be negative
        calls = {name: [make(positive)] for name, make in cases.items()} | {"float32": [cases["everything"](wide)]}
        medians = {name: t["median"] for name, t in timed(device, work, calls).items()}
    parts = ", ".join(f"{name} {seconds * 1e6:.1f} us" for name, seconds in medians.items())
    return {"shape": work.shape, "medians": medians, "summary": parts}


def states(device: Device, work: Work) -> dict[str, Any]:
    """The scan's forward by the number of states: the slope is what a state costs, the rest is everything else."""
    medians = {}
    with testing.on(device.backend):
        for n in (4, 8, 16, 32, 64):
            shape = (*work.shape[:3], n)
            call = work.ours(work.draw(*shape, dtype=torch.bfloat16, seed=0, device=device.device))
            medians[n] = statistics.median(device.time([call], 6, warm_up=1 if device.dry else 10))
    return {"medians": medians, "summary": ", ".join(f"N{n} {s * 1e6:.1f} us" for n, s in medians.items())}


def main() -> int:
    asked = options(__doc__, run={"help": "the name of a work"})
    device: Device = Dry() if asked.dry_run else Cuda()
    works = [w for w in (tiny() if device.dry else standard()) if w.op in {op.name for op in ops(device)}]
    if asked.run:
        run_once(device, next(w for w in works if w.name == asked.run))
        return 0
    record = Record("profile", asked.results, asked.seconds)
    scans = [w for w in works if w.name.startswith("selective_scan forward,")]
    for work in scans[:1]:
        record.item(f"variants of {work.name}", partial(variants, device, work), 60)
        record.item(f"states of {work.name}", partial(states, device, work), 60)
    hot = list(dict.fromkeys(w.name for w in works[:HOTTEST] + [w for w in works if w.step][:3]))
    hottest = [w for w in works if w.name in hot]
    for work in hottest:
        record.item(f"kernels of {work.name}", partial(timeline, device, work), 60)
    for work in hottest:
        record.item(f"counters of {work.name}", partial(counters, device, work), 100)
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
