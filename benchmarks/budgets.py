"""`make check-kernels`: the machine code of every CUDA kernel against benchmarks/kernel_budgets.json.

    python -m benchmarks.budgets             exits 1 if a kernel grew over its budget, or has none
    python -m benchmarks.budgets --update    writes the budgets anew from the kernels that are built

No budget allows spills, float atomics, float64 arithmetic or a kernel without launch bounds. Registers, shared memory
and stack may not grow; in an innermost loop, neither may memory accesses, shuffles, barriers or special functions, and
its issue slots only by SLACK. Counts hold for one release of nvcc: under another, growth is a warning.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine_code import FLOAT64, FLOAT_ATOMIC, LOCAL_MEMORY, Kernel, read

BUDGETS = Path(__file__).parent / "kernel_budgets.json"
SLACK = 0.02
FORBIDDEN = (
    (LOCAL_MEMORY, "registers spilled to local memory"),
    (FLOAT_ATOMIC, "float atomics, whose order of additions changes from run to run"),
    (FLOAT64, "float64 arithmetic"),
)
RESOURCES = {"registers": "registers", "shared": "bytes of static shared memory", "stack": "bytes of stack"}

PLAIN = {"depth", "innermost", "wide", "issued", "fma", "alu"}   # of a loop's entries; the others may not grow at all


@dataclass
class Verdict:
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)


def budget_of(kernel: Kernel) -> dict[str, Any]:
    loops = [{"depth": loop.depth, "innermost": loop.innermost, **loop.counts,
              **({"wide": loop.wide} if loop.wide else {})} for loop in kernel.loops]
    resources = {name: getattr(kernel, name) for name in [*RESOURCES, "threads"]}
    return resources | {"outside": kernel.outside, "loops": loops}


def budgets_of(kernels: list[Kernel]) -> dict[str, Any]:
    named: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        named.setdefault(kernel.name, {})[kernel.arch] = budget_of(kernel)
    return {"nvcc": "/".join(sorted({k.toolkit for k in kernels})), "kernels": named}


def text(budgets: dict[str, Any]) -> str:
    """JSON with one line per loop, so that a diff shows which loop changed."""
    lines = []
    for name, archs in sorted(budgets["kernels"].items()):
        entries = []
        for arch, budget in sorted(archs.items()):
            resources = json.dumps({k: budget[k] for k in [*RESOURCES, "threads"]})[1:-1]
            outside = json.dumps(budget["outside"])
            loops = "".join(f"\n    {json.dumps(loop)}," for loop in budget["loops"]).removesuffix(",")
            entries.append(f'  "{arch}": {{{resources},\n   "outside": {outside},\n   "loops": [{loops}]}}')
        lines.append(f' {json.dumps(name)}: {{\n' + ",\n".join(entries) + "}")
    return f'{{"nvcc": "{budgets["nvcc"]}",\n"kernels": {{\n' + ",\n".join(lines) + "}}\n"


def _of(what: str, path: dict[str, Any]) -> dict[str, int]:
    """The counts of one kind of instruction, whatever the width: four narrow loads are more than one wide one."""
    return {kind: n for kind, n in path.items() if kind.split(".")[0] == what}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in counts.items())


Say = Callable[[str], None]


def _compare_loops(where: str, came: list[dict[str, Any]], allowed: list[dict[str, Any]], grew: Say,
                   shrank: Say) -> None:
    shape = [[(loop["depth"], loop["innermost"]) for loop in loops] for loops in (came, allowed)]
    if shape[0] != shape[1]:
        grew(f"{where}: its loops are nested otherwise than in the budget ({len(came)} loops, {len(allowed)} there), so"
             " their counts cannot be compared; if this is meant, --update and read the diff")
        return
    for number, (now, before) in enumerate(zip(came, allowed, strict=True)):
        if now["innermost"]:
            _compare_paths(f"{where}, loop {number}", now, before, grew, shrank)
        if now["innermost"] and ("wide" in now or "wide" in before):
            paths = (loop.get("wide", loop) for loop in (now, before))
            _compare_paths(f"{where}, loop {number}, with wide accesses", *paths, grew, shrank)


def _compare_paths(where: str, now: dict[str, Any], before: dict[str, Any], grew: Say, shrank: Say) -> None:
    limit = math.floor(before["issued"] * (1 + SLACK))
    if now["issued"] > limit:
        grew(f"{where}: {now['issued']} issue slots an iteration, {limit} allowed")
    elif now["issued"] < before["issued"]:
        shrank(f"{where}: {now['issued']} issue slots an iteration, {before['issued']} in the budget")
    for what in sorted({kind.split(".")[0] for kind in now.keys() - PLAIN}):
        more, most = (_of(what, path) for path in (now, before))
        if sum(more.values()) > sum(most.values()):
            grew(f"{where}: {_listed(more)} an iteration, {_listed(most) or 'no ' + what} allowed")


def check(kernels: list[Kernel], budgets: dict[str, Any]) -> Verdict:
    verdict = Verdict()
    for kernel in kernels:
        where = f"{kernel.name}, {kernel.arch}"
        for pattern, what in FORBIDDEN:
            if found := kernel.matching(pattern):
                verdict.failures.append(f"{where}: {what}: {_listed(found)}; 0 allowed")
        if not kernel.threads:
            verdict.failures.append(f"{where}: has no __launch_bounds__")
        allowed = budgets["kernels"].get(kernel.name, {}).get(kernel.arch)
        if allowed is None:
            verdict.failures.append(f"{where}: has no budget; --update writes one")
            continue
        same = kernel.toolkit == budgets["nvcc"]
        grew = (verdict.failures if same else verdict.warnings).append
        shrank = verdict.hints.append if same else lambda _: None
        came = budget_of(kernel)
        for resource, unit in RESOURCES.items():
            if came[resource] > allowed[resource]:
                grew(f"{where}: {came[resource]} {unit}, {allowed[resource]} allowed")
            elif came[resource] < allowed[resource]:
                shrank(f"{where}: {came[resource]} {unit}, {allowed[resource]} in the budget")
        _compare_loops(where, came["loops"], allowed["loops"], grew, shrank)
    built = {(k.name, k.arch) for k in kernels}
    budgeted = {(name, arch) for name, archs in budgets["kernels"].items() for arch in archs}
    verdict.failures += [f"{n}, {arch}: has a budget, but is not in the build" for n, arch in sorted(budgeted - built)]
    return verdict


def report(verdict: Verdict, kernels: list[Kernel], nvcc: str) -> None:
    for kind in ("failures", "warnings", "hints"):
        for line in getattr(verdict, kind):
            print(f"{kind[:-1]}: {line}")
    if verdict.warnings:
        print(f"Built by nvcc {kernels[0].toolkit}, budgets are for {nvcc}: counts over them are warnings only.")
    if verdict.hints:
        print("Kernels got smaller: python -m benchmarks.budgets --update keeps it so.")
    archs = ", ".join(sorted({k.arch for k in kernels}))
    result = f"{len(verdict.failures)} failures" if verdict.failures else "no spills, float atomics or float64"
    print(f"{len({k.name for k in kernels})} kernels for {archs}: {result}, {len(verdict.warnings)} warnings")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the budgets anew")
    parser.add_argument("binary", nargs="?", type=Path, help="an object file or library; without it, pyseq's module")
    arguments = parser.parse_args()
    if arguments.binary is None:
        from pyseq import _C

        arguments.binary = Path(_C.__file__)
    kernels = read(arguments.binary)
    if not kernels:
        print(f"no CUDA kernels in {arguments.binary}")
        return int(shutil.which("nvcc") is not None)
    if arguments.update:
        before = BUDGETS.read_text() if BUDGETS.exists() else ""
        BUDGETS.write_text(text(budgets_of(kernels)))
        print(f"{BUDGETS}: {'unchanged' if BUDGETS.read_text() == before else 'written'}")
    budgets = json.loads(BUDGETS.read_text())
    verdict = check(kernels, budgets)
    report(verdict, kernels, budgets["nvcc"])
    return int(bool(verdict.failures))


if __name__ == "__main__":
    sys.exit(main())
