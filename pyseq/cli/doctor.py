"""`pyseq doctor`"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from pyseq._library import Op

from .output import Json, clear_failures, print_json, results

LANES = {2: "SSE4: 4 floats at a time", 3: "AVX2: 8 floats at a time", 4: "AVX-512: 16 floats at a time"}


@clear_failures
def doctor(json: Json = False) -> None:
    """Show what is built, which kernels this machine runs, and what is slow and why."""
    found = examine()
    if json:
        print_json(found)
        return
    console = results()
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name in ("pyseq", "torch", "python", "machine", "cpu", "instruction set", "threads", "compiler", "cuda", "gpu"):
        value = found[name]
        facts.add_row(f"[bold]{name}[/bold]", escape("\n".join(value) if isinstance(value, list) else str(value)))
    console.print(facts)
    kernels = Table("kernel", *(kinds := ("forward", "backward", "step")), title=None)
    for op, built in found["kernels"].items():
        kernels.add_row(op, *(", ".join(built.get(kind, ())) or "-" for kind in kinds))
    console.print(kernels)
    for note in found["notes"]:
        console.print(f"[yellow]slow:[/yellow] {escape(note)}", soft_wrap=True)
    if not found["notes"]:
        console.print("Nothing here makes the kernels slower than they could be.")


def examine() -> dict[str, Any]:
    """What `pyseq doctor --json` prints."""
    import torch

    import pyseq
    from pyseq import _C
    from pyseq._library import REGISTRY

    threads, cores = torch.get_num_threads(), usable_cores()
    facts: dict[str, Any] = {
        "pyseq": pyseq.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "instruction set": instruction_set(_C.cpu_level, _C.cpu_level_of_machine),
        "threads": f"{threads} on {cores:g} usable cores",
        "compiler": _C.compiler,
        "cuda": cuda(),
        "gpu": gpu(),
        "kernels": {
            name: {kind: built_for(op) for kind in op.kinds} for name, op in REGISTRY.items()
        },
    }
    return {**facts, "notes": notes(threads, cores)}


def built_for(op: Op) -> list[str]:
    return [b for b in op.backends if b != "simt"] + (["cuda (cuBLAS)"] if op.cublas else [])


def instruction_set(level: int, of_machine: int) -> str:
    if not 2 <= level <= 4:
        return "the compiler's default for this machine"
    why = "the widest this CPU has" if level == of_machine else f"forced by PYSEQ_CPU; this CPU has v{of_machine}"
    return f"v{level} ({LANES[level]}), {why}"


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def usable_cores() -> float:
    """Cores that this process may use: its affinity, or the quota of its container where that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else min(cores, int(quota) / int(period))
    except (OSError, ValueError):
        return cores


def cuda() -> str:
    from pyseq import _C, _cuda

    built = _cuda.summary(_C.cuda_architectures)
    if not _C.cuda_architectures:
        return built
    driver = _C.cuda_driver_version()
    supports = f"driver for CUDA {_cuda.version(driver)}" if driver else "no NVIDIA driver"
    return f"{built}; built with CUDA {_cuda.version(_C.cuda_runtime_version)}; {supports}"


def gpu() -> list[str]:
    from pyseq import _cuda

    cards = [
        f"{card['device']} {card['name']}, {card['architecture']}, {card['memory_gib']} GiB: {card['kernels']}"
        for card in _cuda.cards()
    ]
    absence = _cuda.absence()
    return cards + ([absence] if absence else [])


def notes(threads: int, cores: float) -> list[str]:
    """What is slower here than it could be, and what to do about it."""
    import torch

    from pyseq import _C, _cuda

    found = []
    if _C.cpu_level < _C.cpu_level_of_machine:
        found.append(f"PYSEQ_CPU forces v{_C.cpu_level} kernels on a v{_C.cpu_level_of_machine} CPU: unset it")
    elif _C.cpu_level in (2, 3):
        found.append(f"this CPU has {LANES[_C.cpu_level]}; one with AVX-512 handles 16")
    if threads == 1 and cores > 1:
        found.append(f"torch uses 1 thread of {cores:g} cores: unset OMP_NUM_THREADS or call torch.set_num_threads")
    elif threads > cores:
        found.append(f"{threads} threads share {cores:g} cores and wait for each other: torch.set_num_threads fewer")
    elif threads < cores / 2:
        found.append(f"torch uses {threads} threads of {cores:g} cores")
    if not _C.cpu_has_avx512_bf16 and _C.cpu_level == _C.cpu_level_of_machine:
        found.append("no bfloat16 instructions: products of bfloat16 matrices run through float32")
    absence = _cuda.absence()
    if absence and (torch.cuda.is_available() or Path("/proc/driver/nvidia/version").exists()):
        found.append(f"a GPU is here and everything runs on the CPU: {absence}")
    return found
