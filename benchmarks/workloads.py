"""The works whose times benchmarks/predictions.py predicts: how often each loop of their kernels runs.

A loop is named by an instruction in it, and if need be by some that are not: "MUFU.EX2 -STG.16" is the loop that has
exponentials and stores no 16-bit values. Where several fit, it is the one that issues least for each such instruction:
the main loop, not its remainder. How often all warps together run it is given, or follows from how many of those
instructions are needed, however the compiler unrolls. Bytes are those of the tensors, each read or written once.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Launch:
    kernel: str                       # its name in kernel_budgets.json
    blocks: int
    bytes_moved: float
    instructions: dict[str, float] = field(default_factory=dict)   # loop -> how many of its instruction all warps run
    iterations: dict[str, float] = field(default_factory=dict)     # loop -> how often all warps run it
    dynamic_shared: int = 0                                        # bytes per block
    wavefronts: dict[str, float] = field(default_factory=dict)   # of shared memory per access, where lanes share words


@dataclass(frozen=True)
class Work:
    name: str
    unit: str                         # what issue slots are counted per
    units: float
    launches: tuple[Launch, ...]
    goal: float = 0                   # seconds on an H200


def rms_norm_gated(rows: int, dim: int) -> Work:
    elements, warps = rows * dim, rows * dim // (32 * 16)   # no loop: a thread has 16 elements
    forward = Launch(
        "rms_norm_gated_kernel<__nv_bfloat16>", blocks=rows, bytes_moved=3 * 2 * elements,   # x, z, y
        instructions={"SHFL": 5 * warps, "LDS.128": 4 * warps},
    )
    return Work(f"rms_norm_gated, {rows} rows of {dim}, gate, bf16", "element", elements, (forward,))


def causal_conv1d(batch: int, time: int, dim: int) -> tuple[Work, Work]:
    elements, width, rows, rows_backward = batch * time * dim, 4, 64, 128   # rows: tokens of a thread
    name = f"causal_conv1d, B{batch} T{time} D{dim} W{width}, SiLU, bf16"
    warps = elements // rows // (32 * 8)
    forward = Launch(
        f"causal_conv1d_kernel<__nv_bfloat16, {width}>", blocks=warps // 4, bytes_moved=2 * 2 * elements,   # x, y
        instructions={"MUFU.EX2": elements / 32},
        iterations={"LDG.64 -STG.64": warps},
    )
    warps = elements // rows_backward // (32 * 4)
    partial = batch * time // rows_backward * (width + 1) * dim
    backward = Launch(
        f"causal_conv1d_backward_kernel<__nv_bfloat16, {width}>", blocks=(warps + batch * dim // 32) // 4,
        bytes_moved=3 * 2 * elements + 4 * partial,   # x, dy, dx, partial sums of dweight and dbias
        instructions={"MUFU.EX2 STG.64": elements / 32},
        iterations={"LDG.64 -STG.64": warps},
    )
    total = Launch("causal_conv1d_sum_kernel", blocks=dim // 32 * (width + 1), bytes_moved=4 * partial,
                   instructions={"LDG.32": partial / 32})
    return (Work(f"{name}, forward", "element", elements, (forward,), goal=0.28e-3),
            Work(f"{name}, backward", "element", elements, (backward, total), goal=0.45e-3))


WORKS = (
    *causal_conv1d(8, 4096, 8192),
    rms_norm_gated(16384, 8192),
)
