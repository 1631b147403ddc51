"""The works whose times benchmarks/predictions.py predicts: how often each loop of their kernels runs.

A loop is named by an instruction in it, and if need be by some that are not: "MUFU.EX2 -STG.16" is the loop that has
exponentials and stores no 16-bit values. Where several fit, it is the one that issues least for each such instruction:
the main loop, not its remainder. How often all warps together run it is given, or follows from how many of those
instructions are needed, however the compiler unrolls. Bytes are those of the tensors, each read or written once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.cost_model import MACHINES

H200_BANDWIDTH = MACHINES["H200"].bandwidth


@dataclass(frozen=True)
class Launch:
    kernel: str                       # its name in kernel_budgets.json
    blocks: int
    bytes_moved: float
    threads: int = 0                                               # of a block; 0: as many as it may have
    instructions: dict[str, float] = field(default_factory=dict)   # loop -> how many of its instruction all warps run
    iterations: dict[str, float] = field(default_factory=dict)     # loop -> how often all warps run it
    core: tuple[str, ...] = ()                                     # of the loops in `instructions`: the recurrence
    dynamic_shared: int = 0                                        # bytes per block


@dataclass(frozen=True)
class Work:
    name: str
    unit: str                         # what issue slots are counted per
    units: float
    launches: tuple[Launch, ...]
    goal: float = 0                   # seconds on an H200


def rms_norm_gated(rows: int, dim: int) -> Work:
    elements, threads = rows * dim, dim // 16   # a thread has 16 elements, and no loop but to sum over the others
    warps = rows * threads // 32
    forward = Launch(
        "rms_norm_gated_kernel<__nv_bfloat16>", blocks=rows, threads=threads, bytes_moved=3 * 2 * elements,   # x, z, y
        instructions={"SHFL": 5 * warps, "LDS.128": threads // 32 // 4 * warps},
    )
    return Work(f"rms_norm_gated, {rows} rows of {dim}, gate, bf16", "element", elements, (forward,))


def causal_conv1d(batch: int, time: int, dim: int) -> tuple[Work, Work]:
    elements, width, rows, rows_backward = batch * time * dim, 4, 64, 128   # rows: tokens of a thread
    name = f"causal_conv1d, B{batch} T{time} D{dim} W{width}, SiLU, bf16"
    warps = elements // rows // (32 * 8)
    forward = Launch(
        f"causal_conv1d_kernel<__nv_bfloat16, {width}>", blocks=warps // 4, bytes_moved=2 * 2 * elements,   # x, y
        instructions={"MUFU.EX2": elements / 32}, core=("MUFU.EX2",),
        iterations={"LDG.64 -STG.64": warps},
    )
    warps = elements // rows_backward // (32 * 4)
    partial = batch * time // rows_backward * (width + 1) * dim
    backward = Launch(
        f"causal_conv1d_backward_kernel<__nv_bfloat16, {width}>", blocks=(warps + batch * dim // 32) // 4,
        bytes_moved=3 * 2 * elements + 4 * partial,   # x, dy, dx, partial sums of dweight and dbias
        instructions={"MUFU.EX2 STG.64": elements / 32}, core=("MUFU.EX2 STG.64",),
        iterations={"LDG.64 -STG.64": warps},
    )
    total = Launch("causal_conv1d_sum_kernel", blocks=dim // 32 * (width + 1), bytes_moved=4 * partial,
                   instructions={"LDG.32": partial / 32})
    return (Work(f"{name}, forward", "element", elements, (forward,), goal=0.28e-3),
            Work(f"{name}, backward", "element", elements, (backward, total), goal=0.45e-3))


def ema(batch: int, time: int, dim: int) -> tuple[Work, Work]:
    elements, blocks = batch * time * dim, batch * dim // 64
    spans = blocks * 8 * time // 128     # of 16 tokens, by 8 warps a block
    kept, sums = 4 * elements / 16, 4 * batch * time * dim // 64
    name = f"ema, B{batch} T{time} D{dim}, bf16"
    forward = Launch("ema_forward_kernel<__nv_bfloat16>", blocks=blocks, bytes_moved=2 * 2 * elements,
                     iterations={"BAR": spans})
    backward = Launch("ema_backward_kernel<__nv_bfloat16>", blocks=blocks,
                      bytes_moved=3 * 2 * elements + kept + sums, iterations={"BAR": spans})
    total = Launch("ema_sum_kernel", blocks=batch * time // 256, bytes_moved=sums,
                   instructions={"LDG.32": sums / 4 / 32})
    return (Work(f"{name}, forward", "element", elements, (forward,), goal=0.04e-3),
            Work(f"{name}, backward", "element", elements, (backward, total), goal=0.07e-3))


def selective_scan(batch: int, time: int, dim: int) -> tuple[Work, Work]:
    states, elements = 16, batch * time * dim
    each, shared = elements * states / 32, 2 * 2 * batch * time * states   # warp instructions per state; bytes of B, C
    name = f"selective_scan, B{batch} T{time} D{dim} N{states}, softplus, gate, bf16"
    warps = batch * dim // 32
    tiles = warps * time // 16            # of 32 channels and 16 tokens
    forward = Launch(
        "selective_scan_forward_kernel<4, true, __nv_bfloat16>", blocks=warps // 4, dynamic_shared=4 * 12352,
        bytes_moved=4 * 2 * elements + shared,   # u, dt, z, y
        instructions={"MUFU.EX2 SHFL": each,     # the recurrence
                      "MUFU.RCP": elements / 32},   # skip and gate
        core=("MUFU.EX2 SHFL",),
        iterations={"LDGSTS.128 MUFU.EX2": tiles, "STG.128 LDG.32": tiles},   # copies and softplus; checkpoints
    )
    spans = batch * dim // 32 * time // 8        # of 8 tokens: the last of a chunk of 64 keeps no state behind it
    slabs, weights = 4 * 2 * batch * time * states * dim // 128, 4 * batch * dim * (states + 2)
    backward = Launch(
        "selective_scan_backward_kernel<true>", blocks=batch * dim // 128, dynamic_shared=92288,
        bytes_moved=7 * 2 * elements + shared + elements * states * 4 / 64 + slabs + weights,   # with checkpoints
        instructions={"MUFU.EX2 SHFL": each, "MUFU.EX2 STS.128 -SHFL -BAR": each, "MUFU.EX2 -STS.128": each * 7 / 8},
        core=("MUFU.EX2 SHFL", "MUFU.EX2 STS.128 -SHFL -BAR", "MUFU.EX2 -STS.128"),
        iterations={"BAR MUFU.RCP": spans, "BAR SHFL": spans,   # what is staged and what is summed, per span; forward
                    "BAR MUFU.EX2 -MUFU.RCP": spans * 7 / 8, "BAR -SHFL -MUFU.EX2": spans * 7 / 8},
    )
    tokens = Launch("selective_scan_reduce_tokens_kernel", blocks=batch * time * 2 * states // 4 // 256,
                    bytes_moved=slabs + shared, instructions={"LDG.128": slabs / 16 / 32})
    channels = Launch("selective_scan_reduce_channels_kernel", blocks=dim * states // 256, bytes_moved=weights,
                      instructions={"LDG.32": weights / 4 / 32})
    return (Work(f"{name}, forward", "state", elements * states, (forward,), goal=0.35e-3),
            Work(f"{name}, backward", "state", elements * states, (backward, tokens, channels), goal=1.2e-3))


def selective_scan_step(batch: int, dim: int) -> Work:
    states, warps = 16, batch * dim // 32
    size = 4 * (2 * batch + 1) * dim * states + 4 * 2 * batch * dim   # state twice, A; u, dt, z, y
    step = Launch("selective_scan_step_kernel<4, float>", blocks=warps // 4, bytes_moved=size,
                  iterations={"MUFU.EX2": warps})
    name = f"selective_scan_step, B{batch} D{dim} N{states}, float32 state, bf16"
    return Work(name, "state", batch * dim * states, (step,), goal=1.2 * size / H200_BANDWIDTH)


def ssd_backward(batch: int, time: int, heads: int) -> Work:
    width, states = 64, 128
    chunks, elements, shared = batch * time // 64, batch * time * heads * width, 2 * batch * time * states
    kept, slabs = 2 * chunks * heads * width * states, 4 * 2 * batch * time * states * heads // 16   # float16; float32
    per_token = 4 * batch * time * heads
    each = chunks * heads * 8             # warps of a chunk and head
    steps = Launch("ssd_backward_steps_kernel", blocks=chunks * heads // 32, bytes_moved=5 * per_token,
                   iterations={"STG.64": chunks * heads})
    forward, back = (
        Launch(f"ssd_backward_states_kernel<Half, {reverse}>", blocks=batch * heads, dynamic_shared=54272,
               bytes_moved=2 * elements + shared + kept + 3 * per_token,
               iterations={"HMMA.16816": 4 * each, "BAR STG.32": each, "LDGSTS.128 -HMMA.16816": 2 * each,
                           "STS.128 MUFU.EX2": 2 * each})
        for reverse in ("false", "true")
    )
    local = Launch(
        "ssd_backward_kernel<Half>", blocks=chunks * heads // 16, dynamic_shared=99000,
        bytes_moved=3 * 2 * elements + 2 * shared + 2 * kept + slabs + 10 * per_token,   # x, dy, dx
        iterations={"STG.16 HMMA.16816": each, "LDGSTS.128": 8 * each, "HMMA.16816 -BAR -LDS.32": 8 * each},
    )
    reduce = (
        Launch("ssd_reduce_steps_kernel", blocks=chunks * heads // 32, bytes_moved=11 * per_token,
               iterations={"SHFL": chunks * heads}),
        Launch("ssd_reduce_tokens_kernel", blocks=batch * time * 2 * states // 4 // 256,
               bytes_moved=slabs + 2 * shared, instructions={"LDG.128": slabs / 16 / 32}),
        Launch("ssd_reduce_heads_kernel", blocks=heads, bytes_moved=12 * chunks * heads,
               instructions={"LDG.32": 3 * chunks * heads / 32}),
    )
    name = f"ssd, B{batch} T{time} H{heads} P{width} N{states}, bf16, backward"
    return Work(name, "state", elements * states, (steps, forward, back, local, *reduce), goal=0.8e-3)


def mamba_step(batch: int, dim: int, states: int, rank: int) -> Work:
    outputs, width = rank + 2 * states, 4
    conv, weights = 4 * batch * dim * (width - 1), 2 * dim * (width + 1)   # float32 states, bf16 weights
    warps = 240 * 4               # of the first launch: 5 chunks of channels, 8 groups of rows, 6 parts of the outputs
    project = Launch(
        "mamba_step_project_kernel<8>", blocks=warps // 4,
        bytes_moved=conv + weights + 2 * batch * dim + 2 * outputs * dim + 4 * 5 * batch * outputs,
        iterations={"LDG.128 BAR SHFL": warps * 8, "STS.32 MUFU.EX2": warps * 8},
    )
    tiles = 256 * 5 * 8           # of the second: 256 blocks, 5 tiles of 64 channels each, by 8 warps
    step = Launch(
        "mamba_step_kernel<float>", blocks=256, dynamic_shared=4 * 4 * outputs,
        bytes_moved=2 * 4 * batch * dim * states + 2 * conv + weights + 4 * dim * states + 2 * dim * rank
        + 3 * 2 * batch * dim + 4 * 5 * batch * outputs,
        iterations={"BAR SHFL": tiles, "MUFU.EX2 SHFL -BAR": tiles, "LDG.128 LDS.128 -SHFL": tiles * rank / 64,
                    "STS.32 LDG.32 -LDS.32": 256 * 8 * 3, "LDG.32 -STS.32 -LDS.128 -LDG.16": 256 * 8 * 3},
    )
    name = f"mamba_step, B{batch} D{dim} N{states} R{rank}, float32 states, bf16 weights"
    size = step.bytes_moved + 2 * outputs * dim
    return Work(name, "state", batch * dim * states, (project, step), goal=1.2 * size / H200_BANDWIDTH)


def mamba2_step(batch: int, heads: int, width: int, states: int) -> Work:
    channels, rows = heads * width + 2 * states, batch * heads * width
    conv = 4 * batch * channels * 3 * 2 + 2 * channels * 5     # float32 samples twice, bf16 weights
    channels_of_a_block = 2 * states + width                   # that it convolves
    step = Launch(
        "mamba2_step_kernel<8, 4, float>", blocks=batch * heads, dynamic_shared=4 * (2 * states + width),
        bytes_moved=2 * 4 * rows * states + conv + 2 * batch * channels + 2 * rows + 4 * rows,   # xBC, z, v
        iterations={"MUFU.RCP STS.32": batch * heads * channels_of_a_block / 32, "LDS.128": batch * heads * 4},
    )
    finish = Launch("mamba2_step_finish_kernel", blocks=batch + batch * 2 * states // 256,
                    bytes_moved=4 * rows + 2 * rows + 4 * 6 * batch * 2 * states)
    name = f"mamba2_step, B{batch} H{heads} P{width} N{states}, float32 states, bf16 weights"
    return Work(name, "state", rows * states, (step, finish), goal=90e-6)


def ssd(batch: int, time: int, heads: int) -> Work:
    width, states, warps = 64, 128, 8             # of a block: 4 heads
    chunks = batch * heads // 4 * time // 64
    each = chunks * warps
    size = 2 * batch * time * (2 * heads * width + 2 * states + heads)   # x, y; B, C; dt
    forward = Launch(
        "ssd_chunk_kernel<128, true>", blocks=batch * heads // 4, threads=32 * warps, dynamic_shared=139648,
        bytes_moved=size,
        instructions={"LDGSTS.128 -BAR": each * 16,                # copies
                      "HMMA.1688 LDS.64 -BAR": each * 10 * 8},     # y from 10 blocks of scores
        iterations={"BAR STS.32": each, "HMMA.16816 STS.128": each * 10 / 8,   # steps; scores
                    "BAR HMMA.1688": each * 2, "HMMA.16816 -STS.128": each * 4},   # y from the state; the state
    )
    name = f"ssd, B{batch} T{time} H{heads} P{width} N{states} G1, bf16, forward"
    return Work(name, "state", batch * time * heads * width * states, (forward,), goal=0.30e-3)


def ssd_step(batch: int, heads: int, dtype: str) -> Work:
    width, states, each = 64, 128, {"float": 4, "__nv_bfloat16": 2}[dtype]
    size = batch * heads * width * states
    moved = 2 * each * size + 2 * 2 * batch * heads * width + 2 * 2 * batch * states   # state twice; x, y; B, C
    step = Launch(f"ssd_step_kernel<8, 4, {dtype}>", blocks=batch * heads, bytes_moved=moved,
                  iterations={"SHFL": batch * heads * 4})
    name = f"ssd_step, B{batch} H{heads} P{width} N{states}, {8 * each}-bit state, bf16"
    return Work(name, "state", size, (step,), goal={4: 86e-6, 2: 43e-6}[each])


def delta_rule(batch: int, time: int, heads: int) -> tuple[Work, Work]:
    """RWKV-7. A warp has 16 columns of the state forward, 16 of its rows backward."""
    keys = values = 64
    tokens, states = batch * time * heads, batch * time * heads * keys * values
    each, tensor, gates = tokens // 16 * 4, 2 * tokens * keys, 4 * tokens * keys   # chunks of a warp; bf16; float32 g
    kept = 4 * tokens // 64 * keys * values
    name = f"delta_rule, B{batch} T{time} H{heads} K{keys} V{values}, RWKV-7, bf16"
    forward = Launch(
        "delta_rule_chunk_kernel<true, true>", blocks=batch * heads, dynamic_shared=49152,
        bytes_moved=6 * tensor + gates,   # q, k, v, a, b, y
        iterations={"BAR HMMA.1688": each, "HMMA.1688 -BAR": each},
    )
    backward = Launch(
        "delta_rule_backward_kernel<Bf16, Shape<4, 1, 4> >", blocks=batch * heads, dynamic_shared=99328,
        bytes_moved=11 * tensor + 2 * gates + kept,   # q, k, v, a, b, dy, and five gradients; g, dg; states
        iterations={
            "MUFU.EX2 -HMMA.1688": each, "MUFU.EX2 HMMA.1688": each,          # forward again; the gradient
            "HMMA.1688 SHFL -MUFU.EX2": 4 * each, "HMMA.16816 SHFL -MUFU.EX2": 4 * each,   # pairs of tokens, by level
            "HMMA.16816 -SHFL": 4 * each, "HMMA.1688 -SHFL": 4 * each,        # products with the state, and into it
        },
    )
    return (Work(f"{name}, forward", "state", states, (forward,), goal=0.6e-3),
            Work(f"{name}, backward", "state", states, (backward,), goal=1.7e-3))


def delta_rule_step(batch: int, heads: int) -> Work:
    keys = values = 64
    size = batch * heads * keys * values
    moved = 2 * 4 * size + batch * heads * (6 * 2 + 4) * keys
    step = Launch("delta_rule_step_kernel<true, 8, 2, float>", blocks=batch * heads, bytes_moved=moved)
    name = f"delta_rule_step, B{batch} H{heads} K{keys} V{values}, 32-bit state, bf16"
    return Work(name, "state", size, (step,), goal=1.1 * moved / H200_BANDWIDTH)


def gated_delta_rule(batch: int, time: int, heads: int) -> tuple[Work, Work]:
    keys = values = 128
    tokens, states = batch * time * heads, batch * time * heads * keys * values
    chunks, tensor, gates = tokens // 16, 2 * tokens * keys, 2 * 4 * tokens   # bf16; float32 g and beta
    name = f"gated_delta_rule, B{batch} T{time} H{heads} K{keys} V{values}, one decay per head, bf16"
    forward = Launch(
        "gated_delta_rule_chunks_kernel<8>", blocks=batch * heads * 2, dynamic_shared=43424,
        bytes_moved=4 * tensor + gates,   # q, k, v, y
        iterations={"HMMA.16816 STG.128": chunks * 2 * 4, "HMMA.16816 LDGSTS.128": chunks * 2},
    )
    products = 592   # of 16 x 16 x 16, per chunk
    kept, parts = 4 * tokens // 64 * keys * values, 4 * tokens * (keys * 2 + 2 + values)
    backward = Launch(
        "gated_delta_rule_backward_kernel", blocks=batch * heads, dynamic_shared=200320,
        bytes_moved=5 * tensor + gates + kept + parts,   # q, k, v, dy, dv; states; float32 parts, e
        instructions={"HMMA.1688": 12 * products * chunks},
        iterations={"LDS.128 -HMMA.1688": chunks * 8 * 2 * 2},   # scores, forward and backward
    )
    reduce = Launch("gated_delta_rule_reduce_kernel", blocks=tokens * keys // 4 // 128, threads=128,
                    bytes_moved=parts + 2 * tensor + gates, instructions={"LDG.32": 2 * 4 * tokens * keys / 4 / 32})
    return (Work(f"{name}, forward", "state", states, (forward,), goal=0.30e-3),
            Work(f"{name}, backward", "state", states, (backward, reduce), goal=0.9e-3))


def gated_delta_rule_step(batch: int, heads: int) -> Work:
    keys = values = 128
    size = batch * heads * keys * values
    moved = 2 * 4 * size + 2 * 4 * batch * heads * keys
    step = Launch("gated_delta_rule_step_kernel<8, 4, float>", blocks=batch * heads * 2, bytes_moved=moved)
    name = f"gated_delta_rule_step, B{batch} H{heads} K{keys} V{values}, 32-bit state, bf16"
    return Work(name, "state", size, (step,), goal=1.1 * moved / H200_BANDWIDTH)


WORKS = (
    *delta_rule(8, 4096, 64),
    delta_rule_step(64, 64),
    *gated_delta_rule(8, 4096, 16),
    gated_delta_rule_step(64, 16),
    *selective_scan(8, 2048, 4096),
    selective_scan_step(64, 5120),
    *causal_conv1d(8, 4096, 8192),
    mamba_step(64, 5120, 16, 160),
    ssd_backward(8, 4096, 64),
    mamba2_step(64, 80, 64, 128),
    *ema(8, 4096, 1024),
    ssd(8, 4096, 64),
    ssd_step(64, 80, "float"),
    ssd_step(64, 80, "__nv_bfloat16"),
    rms_norm_gated(16384, 4096),
)
