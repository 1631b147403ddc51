"""The works whose times benchmarks/predictions.py predicts: how often each loop of their kernels runs.

A loop is named by an instruction that it alone needs, and its number of iterations follows from how many of those the
whole launch runs: the compiler may unroll as it likes. "MUFU.EX2 -STG.16" is the loop with exponentials that stores no
16-bit values. Bytes are those of the arguments, each read or written once, unless a line says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Launch:
    kernel: str                       # its name in kernel_budgets.json
    blocks: int
    bytes_moved: float
    loops: dict[str, float]           # instruction that marks a loop -> how many warp instructions of it are run in all
    dynamic_shared: int = 0           # bytes per block
    wavefronts: dict[str, float] = field(default_factory=dict)   # of shared memory per access, where lanes share words


@dataclass(frozen=True)
class Work:
    name: str
    unit: str                         # what issue slots are counted per
    units: float
    launches: tuple[Launch, ...]
    goal: float = 0                   # seconds on an H200


def rms_norm_gated(rows: int, dim: int) -> Work:
    elements = rows * dim
    forward = Launch(
        "rms_norm_gated_kernel", blocks=rows, bytes_moved=3 * 2 * elements,   # x, z in; y out
        loops={"MUFU.EX2 -STG.16": elements / 32, "STG.16": elements / 32, "MUFU.RSQ": rows * 4},
    )
    return Work(f"rms_norm_gated, {rows} rows of {dim}, gate, bf16", "element", elements, (forward,))


WORKS = (
    rms_norm_gated(16384, 4096),
)
