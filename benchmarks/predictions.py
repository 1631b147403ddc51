"""Times of the CUDA kernels, predicted from their budgets: docs/gpu.md.

    python -m benchmarks.predictions            prints the table
    python -m benchmarks.predictions --write    writes docs/gpu.md anew

It needs neither a GPU nor nvcc: benchmarks/kernel_budgets.json holds what an iteration of each loop issues,
benchmarks/workloads.py how many there are, benchmarks/cost_model.py what they cost on a card.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.budgets import BUDGETS
from benchmarks.cost_model import MACHINES, Machine, occupancy, pipes, seconds
from benchmarks.workloads import WORKS, Launch, Work

PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"
HEAD = """# GPU kernels: budgets and predictions

No time on this page was measured. Every build compiles the CUDA kernels for three architectures, the tests run them
on an emulator, and what follows is read from their machine code. `make check-kernels` fails when a kernel grows over
these budgets, spills registers, adds with float atomics or computes in float64; `make predictions` writes this page.

## Predicted times

A multiprocessor has four schedulers, each of which issues one warp instruction a cycle. A launch cannot be faster than
its fullest pipe (issue slots; float32; integers; special functions at 8 cycles of a scheduler each; shared memory at 4
cycles a wavefront or shuffle), nor than its bytes at the bandwidth of the card. The prediction is the largest of these,
summed over the launches of a work; in brackets what bounds the longest of them. Loops count with the longest path that
accesses memory 8 or 16 bytes at a time where it can; issue slots are those of the H200. Latency, caches, the time to
launch and all waiting are left out, so that a real kernel takes longer.
"""
CARDS = """
| card | architecture | multiprocessors | clock | bandwidth | taken from |
|---|---|---|---|---|---|"""
KERNELS = """
## Budgets

Threads of a block, its bytes of shared memory (static, and dynamic where a work above uses the kernel), registers of a
thread, and how many blocks fit on a multiprocessor of the cards above, as far as these decide: one figure for all, or
those of {archs}.
Last, for sm_90a, the issue slots of one iteration of the three longest innermost loops.
`benchmarks/kernel_budgets.json` holds every loop for each architecture, by kind of instruction.

| kernel | threads | shared | registers | blocks | inner loops |
|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Prediction:
    seconds: float
    limit: str                   # what sets the time of its longest launch
    slots: float                 # issue slots per unit of the work and lane
    core: float                  # those of the loops that compute it


def loop_with(name: str, loops: list[dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """The loop of that name, see benchmarks/workloads.py, and how many it has of the first instruction in its name."""
    kind, *others = name.split()

    def fits(path: dict[str, Any]) -> bool:
        return kind in path and all((other.lstrip("-") in path) != other.startswith("-") for other in others)

    found = [p for p in (loop.get("wide", loop) for loop in loops) if fits(p)] or [p for p in loops if fits(p)]
    if not found:
        raise KeyError(f"no loop has {name}")
    path = min(found, key=lambda path: path["issued"] / path[kind])
    return path, path[kind]


def executed(budget: Mapping[str, Any], launch: Launch) -> Counter[str]:
    """Warp instructions of the whole launch, by kind."""
    counts: Counter[str] = Counter()
    warps = launch.blocks * -(-(launch.threads or budget["threads"]) // 32)
    parts = [(budget["outside"], warps)]
    for name, total in launch.instructions.items():
        loop, each = loop_with(name, budget["loops"])
        parts.append((loop, total / each))
    parts += [(loop_with(name, budget["loops"])[0], times) for name, times in launch.iterations.items()]
    for part, times in parts:
        for kind, n in part.items():
            if kind not in ("depth", "innermost", "wide"):
                counts[kind] += n * times
    return counts


def predict(work: Work, machine: Machine, budgets: Mapping[str, Any]) -> Prediction:
    times, issued, core = [], 0.0, 0.0
    for launch in work.launches:
        try:
            budget = budgets["kernels"][launch.kernel][machine.arch]
            counts = executed(budget, launch)
        except KeyError as error:
            raise KeyError(f"{work.name}: {launch.kernel}, {machine.arch}: {error}") from error
        for name in launch.core:
            loop, each = loop_with(name, budget["loops"])
            core += launch.instructions[name] / each * loop["issued"]
        times.append(seconds(machine, pipes(machine, counts), launch.blocks, launch.bytes_moved))
        issued += counts["issued"]
    lanes = 32 / work.units
    return Prediction(sum(time for time, _ in times), max(times)[1], issued * lanes, core * lanes)


def _time(value: float) -> str:
    return f"{value * 1e6:.1f} us" if value < 1e-4 else f"{value * 1e3:.3f} ms"


def table(budgets: Mapping[str, Any]) -> list[str]:
    cards = list(MACHINES.values())
    lines = ["| work | bytes | issue slots | " + " | ".join(f"{card.card}" for card in cards) + " | goal on H200 |",
             "|---" * (4 + len(cards)) + "|"]
    for work in WORKS:
        predictions = [predict(work, card, budgets) for card in cards]
        times = [f"{_time(p.seconds)} ({p.limit})" for p in predictions]
        size = sum(launch.bytes_moved for launch in work.launches)
        slots = f"{predictions[0].slots:.1f} per {work.unit}"
        slots += f", {predictions[0].core:.1f} in its inner loops" if predictions[0].core else ""
        lines.append(f"| {work.name} | {size / 1e6:.0f} MB | {slots} | "
                     + " | ".join(times) + f" | {_time(work.goal) if work.goal else ''} |")
    return lines


def kernels(budgets: Mapping[str, Any]) -> list[str]:
    dynamic = {launch.kernel: launch.dynamic_shared for work in WORKS for launch in work.launches}

    def row(name: str, archs: Mapping[str, Any]) -> str:
        def three(figure: Callable[[Machine, Mapping[str, Any]], int]) -> str:
            figures = [str(figure(machine, archs[machine.arch])) for machine in MACHINES.values()]
            return figures[0] if len(set(figures)) == 1 else ", ".join(figures)

        def shared(_: Machine, budget: Mapping[str, Any]) -> int:
            return int(budget["shared"] + dynamic.get(name, 0))

        def blocks(machine: Machine, budget: Mapping[str, Any]) -> int:
            return occupancy(machine, budget["registers"], budget["threads"], shared(machine, budget))

        issued = {loop.get("wide", loop)["issued"] for loop in archs["sm_90a"]["loops"] if loop["innermost"]}
        loops = ", ".join(map(str, sorted(issued, reverse=True)[:3]))
        cells = (three(lambda _, b: b["threads"]), three(shared), three(lambda _, b: b["registers"]), three(blocks))
        return f"| `{name}` | {' | '.join(cells)} | {loops} |"

    return [row(name, archs) for name, archs in sorted(budgets["kernels"].items())]


def page(budgets: Mapping[str, Any]) -> str:
    cards = [f"| {m.card} | {m.arch} | {m.multiprocessors} | {m.clock / 1e9:.2f} GHz | {m.bandwidth / 1e12:.2f} TB/s | "
             f"{m.source} |" for m in MACHINES.values()]
    head = KERNELS.format(archs=", ".join(m.arch for m in MACHINES.values()))
    return "\n".join([HEAD, *table(budgets), CARDS, *cards, head, *kernels(budgets), ""])


def main() -> int:
    budgets = json.loads(BUDGETS.read_text())
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(budgets))
    else:
        print("\n".join(table(budgets)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
