"""What a kernel's machine code costs on a card: blocks that fit on a multiprocessor, and a bound of its time.

A multiprocessor has four schedulers. Each issues one warp instruction a cycle, and an instruction holds its pipe for
some cycles; a kernel cannot be faster than its fullest pipe, nor than its bytes at the memory's bandwidth. The bound
leaves out latency, caches, launches and everything that waits: a real kernel takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    card: str
    arch: str
    multiprocessors: int
    clock: float             # Hz
    bandwidth: float         # bytes/s of a copy, reads and writes together
    fp32: float              # cycles that a warp instruction holds its pipe of one scheduler
    integer: float
    warps: int               # per multiprocessor, at most
    blocks: int
    shared: int              # bytes per multiprocessor
    shared_per_block: int
    source: str


# The H200 reached 0.9 of its nominal 4.8 TB/s; the two cards that were not measured are taken to do as well.
MACHINES = {
    "H200": Machine("H200", "sm_90a", 132, 1.98e9, 4.3e12, 1, 2, 64, 32, 228 << 10, 227 << 10,
                    "clock and copy bandwidth measured on a card, the rest NVIDIA's"),
    "A100": Machine("A100 80 GB", "sm_80", 108, 1.41e9, 0.9 * 2.04e12, 2, 2, 64, 32, 164 << 10, 163 << 10,
                    "NVIDIA's figures, bandwidth times 0.9"),
    "RTX 5090": Machine("RTX 5090", "sm_120", 170, 2.41e9, 0.9 * 1.79e12, 1, 1, 48, 24, 100 << 10, 99 << 10,
                        "NVIDIA's figures, bandwidth times 0.9"),
}
SCHEDULERS = 4
REGISTERS = 65536            # per multiprocessor
SYSTEM_SHARED = 1024         # bytes of shared memory that every block takes besides its own
SPECIAL = 8                  # cycles: 16 lanes a cycle and multiprocessor for exponentials, reciprocals, conversions
SHARED_WAVEFRONT = 4         # cycles: 128 bytes a cycle and multiprocessor; shuffles go the same way
MATRIX = 6.4                 # cycles of an m16n8k16 product in bfloat16 by mma.sync on sm_90


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def occupancy(machine: Machine, registers: int, threads: int, shared: int) -> int:
    """Blocks that are resident on a multiprocessor at a time; `shared` is static plus dynamic, in bytes."""
    warps = -(-threads // 32)
    if shared > machine.shared_per_block or threads > 1024:
        return 0
    by_warps = machine.warps // warps
    warps_of_scheduler = REGISTERS // SCHEDULERS // (_up(registers, 8) * 32)
    by_registers = warps_of_scheduler * SCHEDULERS // warps
    by_shared = machine.shared // _up(shared + SYSTEM_SHARED, 128)
    return min(machine.blocks, by_warps, by_registers, by_shared)


def pipes(machine: Machine, counts: Mapping[str, float]) -> dict[str, float]:
    """Cycles that the counted warp instructions keep each pipe of a scheduler busy.

    An access to shared memory is taken to have as many wavefronts as words per lane: no lane reads another's words.
    """
    def total(*starts: str) -> float:
        return sum(n for kind, n in counts.items() if kind.startswith(starts))

    shared = {kind: n for kind, n in counts.items() if kind.startswith(("LDS.", "STS."))}
    wavefronts = sum(n * max(1, int(kind.split(".")[1]) // 32) for kind, n in shared.items())
    return {
        "issue": counts["issued"],
        "fp32": machine.fp32 * counts["fma"],
        "integer": machine.integer * counts["alu"],
        "special functions": SPECIAL * total("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC"),
        "shared memory": SHARED_WAVEFRONT * (wavefronts + total("SHFL")),
        "matrix": MATRIX * total("HMMA", "IMMA"),
    }


def seconds(machine: Machine, busy: Mapping[str, float], blocks: int, bytes_moved: float) -> tuple[float, str]:
    """A bound of the time, and what sets it. `busy`: pipe -> cycles, summed over all warps of the kernel's `blocks`."""
    schedulers = SCHEDULERS * machine.multiprocessors
    uneven = math.ceil(blocks / machine.multiprocessors) * machine.multiprocessors / blocks   # some run a block more
    bounds = {pipe: cycles / schedulers / machine.clock * uneven for pipe, cycles in busy.items()}
    bounds["memory"] = bytes_moved / machine.bandwidth
    limit = max(bounds, key=lambda pipe: bounds[pipe])
    return bounds[limit], limit
