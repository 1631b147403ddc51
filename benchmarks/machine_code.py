"""Machine code of CUDA kernels, read back from an object file or the extension module with NVIDIA's cuobjdump.

A loop is a natural loop of the control flow graph. What is counted for it is one iteration along its longest path:
where a branch picks one of several dtypes, one of them is run. Loops inside it are left out: they are counted apart.
Calls into the compiler's slow paths (denormal quotients, 64-bit division) are counted as the call alone.

Code that accesses global memory 8 or 16 bytes at a time, if it may, is shorter than what it does otherwise. The path of
that code is counted as well: the longest of those with the fewest accesses of less than 8 bytes.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.control_flow import Instruction, blocks, longest_path, natural_loops

INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")

# A float atomicAdd on shared memory is a loop around a compare-and-swap.
FLOAT_ATOMIC = re.compile(r"(REDG?|ATOM[GS]?)\b.*\.(B?F16(x2|_V2)?|F32|F64|CAST?)\b")
FLOAT64 = re.compile(r"D(ADD|FMA|MUL|SETP|MNMX|MMA)\b|.*(\bF64|64H)\b")
LOCAL_MEMORY = re.compile(r"(LDL|STL)\b")

FMA = re.compile(r"(FFMA|FMUL|FADD|IMAD|HFMA2|HMUL2|HADD2)\b")
SPECIAL = re.compile(r"(MUFU|I2F|F2I|F2F|FRND|POPC)\b")
MATRIX = re.compile(r"(HMMA|IMMA|HGMMA|IGMMA)\b")
MEMORY = re.compile(r"(LDS|STS|LDG|STG|LDGSTS|LDSM|LDL|STL|LD|ST)\b")
GLOBAL = re.compile(r"(LDG|STG|LD|ST)\b")
WIDE = re.compile(r"(LDG|STG|LD|ST)\b.*\.(64|128)\b")
NAMED = re.compile(r"(SHFL|BAR|REDUX)\b")
OTHER = re.compile(r"(U[A-Z]|BRA|BS|BMOV|EXIT|CALL|RET|R2UR|S2|CS2R|LDC|VOTE|ELECT|MEMBAR|YIELD|WARPSYNC|\w*DEPBAR)")


@dataclass(frozen=True)
class Loop:
    depth: int                    # 1: not inside another loop
    innermost: bool
    counts: dict[str, int]        # of the longest path, see `histogram`
    wide: dict[str, int]          # of the path with wide accesses; empty where it is the longest, or there is none


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int
    shared: int                   # static shared memory, bytes
    stack: int                    # bytes per thread
    threads: int = 0              # of __launch_bounds__; 0 where it has none
    toolkit: str = ""             # version of the compiler
    opcodes: Counter[str] = field(default_factory=Counter)      # of all its instructions
    outside: dict[str, int] = field(default_factory=dict)       # of the longest path outside loops
    loops: list[Loop] = field(default_factory=list)             # in order of address

    def matching(self, pattern: re.Pattern[str]) -> dict[str, int]:
        return {opcode: n for opcode, n in sorted(self.opcodes.items()) if pattern.match(opcode)}


def histogram(opcodes: Iterable[str]) -> dict[str, int]:
    """Issue slots, instructions of the pipes FMA and ALU, and each kind of the others that a budget is about."""
    counts: Counter[str] = Counter()
    for opcode in opcodes:
        first, *modifiers = opcode.split(".")
        if first == "NOP":
            continue
        counts["issued"] += 1
        if FMA.match(opcode):
            counts["fma"] += 1
        elif SPECIAL.match(opcode) or MATRIX.match(opcode):
            counts[".".join([first, *modifiers[:1]])] += 1
        elif MEMORY.match(opcode):
            width = next((m.lstrip("US") for m in modifiers if re.fullmatch(r"[US]?(8|16|64|128)", m)), "32")
            counts[f"{first}.{width}"] += 1
        elif NAMED.match(opcode):
            counts[first] += 1
        elif not OTHER.match(opcode):
            counts["alu"] += 1
    return {k: counts.pop(k, 0) for k in ("issued", "fma", "alu")} | dict(sorted(counts.items()))


def wide_path(*loop: Any) -> list[str]:
    def weight(opcode: str) -> int:
        return -100000 if GLOBAL.match(opcode) and not WIDE.match(opcode) else 1

    opcodes = longest_path(*loop, weight)
    return opcodes if any(WIDE.match(opcode) for opcode in opcodes) else []


def count(kernel: Kernel, code: list[Instruction]) -> None:
    graph = blocks(code)
    loops = natural_loops(graph)
    kernel.opcodes = Counter(i.opcode for i in code)
    kernel.outside = histogram(longest_path(graph, set(range(len(graph))), 0, loops))
    for first, body in sorted(loops.items()):
        inner = {f: b for f, b in loops.items() if b < body}
        longest, wide = longest_path(graph, body, first, inner), wide_path(graph, body, first, inner)
        kernel.loops.append(Loop(
            depth=sum(first in other for other in loops.values()),
            innermost=not inner,
            counts=histogram(longest),
            wide=histogram(wide) if wide and wide != longest else {},
        ))


# ---- the tool and its text ------------------------------------------------------------------------------------------


def cuobjdump() -> str:
    """The one of NVIDIA's package on PyPI, whose version pyproject.toml pins, before that of the toolkit."""
    package = importlib.util.find_spec("nvidia")
    folders = [Path(f) / "cu13" / "bin" for f in package.submodule_search_locations or []] if package else []
    toolkit = [Path(nvcc).resolve().parent] if (nvcc := shutil.which("nvcc")) else []
    tool = shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders + toolkit))) or shutil.which("cuobjdump")
    if tool is None:
        raise FileNotFoundError("no cuobjdump; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return tool


@functools.cache
def readable(symbol: str) -> str:
    """Mangled name -> name with its template arguments, without namespaces, result and parameters."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|\b_GLOBAL__N__\w+::|\b\w+::", "", name)
    name = re.sub(r"\((int|unsigned int|bool|long)\)", "", name).removeprefix("void ")
    depth = 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:i]
    return name


def _dump(what: str, path: Path) -> list[str]:
    run = subprocess.run([cuobjdump(), what, path], capture_output=True, text=True)
    if run.returncode and "does not contain device code" not in run.stdout + run.stderr:
        raise RuntimeError(f"cuobjdump {what} {path}: {(run.stdout + run.stderr)[-500:]}")
    return run.stdout.splitlines()


def _resources(path: Path) -> dict[tuple[str, str], Kernel]:
    kernels = {}
    arch = symbol = ""
    for line in _dump("--dump-resource-usage", path):
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            symbol = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            system = 1024 if shared and int(re.sub(r"\D", "", arch)) >= 90 else 0   # counted in from sm_90 on
            kernels[symbol, arch] = Kernel(readable(symbol), arch, registers, shared - system, stack + local)
    return kernels


def _attributes(path: Path, kernels: dict[tuple[str, str], Kernel]) -> None:
    arch = toolkit = attribute = ""
    kernel = None
    for line in _dump("--dump-elf", path):
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.search(r"\btoolkit=([\d.]+)", line):
            toolkit = found[1]
        elif found := re.match(r"\.nv\.info\.(\S+)", line):
            kernel = kernels[found[1], arch]
            kernel.toolkit = toolkit
        elif found := re.search(r"Attribute:\s*(\w+)", line):
            attribute = found[1]
        elif kernel and attribute == "EIATTR_MAX_THREADS" and (sizes := re.findall(r"0x\w+", line)):
            x, y, z = (int(size, 16) for size in sizes)
            kernel.threads = x * y * z
            attribute = ""


def read(path: Path) -> list[Kernel]:
    """Every kernel for every architecture in `path`, by name and architecture."""
    kernels = _resources(path)
    _attributes(path, kernels)
    code: dict[tuple[str, str], list[Instruction]] = {}
    arch = symbol = ""
    for line in _dump("--dump-sass", path):
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            symbol = found[1]
        elif found := INSTRUCTION.match(line):
            instruction = Instruction(int(found[1], 16), found[2] or "", found[3], found[4])
            code.setdefault((symbol, arch), []).append(instruction)
    for key, instructions in code.items():
        try:
            count(kernels[key], instructions)
        except ValueError as error:
            raise ValueError(f"{kernels[key].name}, {kernels[key].arch}: {error}") from error
    result = sorted(kernels.values(), key=lambda k: (k.name, k.arch))
    for one, other in pairwise(result):
        if (one.name, one.arch) == (other.name, other.arch):
            raise ValueError(f"two kernels are called {one.name}: give each a name of its own")
    return result
