"""What kernels ask of the memory system: the counts themselves, and a ceiling for every kernel of every op."""

import ctypes
from collections import Counter

import pytest
import torch
from emulated import needs_toolkit, run
from kinds import OPS, computed

from pyseq._library import HAS_SIMT
from pyseq.samples import Sample

if HAS_SIMT:
    from pyseq import _simt

# ---- the counts ------------------------------------------------------------------------------------------------------


def counted(lib, name, *args):
    """Requests, sectors, ideal sectors; the same of shared memory in wavefronts."""
    assert all(a.data_ptr() % 32 == 0 for a in args if isinstance(a, torch.Tensor))
    lib.count_traffic(1)
    try:
        assert run(lib, (2, 0), name, *args) == 0, lib.last_error()
        sums = (ctypes.c_int64 * 6)()
        lib.traffic(sums)
    finally:
        lib.count_traffic(0)
    return tuple(sums)


PATTERNS = [   # width, stride, shift in floats
    ((1, 1, 0), (4, 4), (1, 1)),
    ((1, 1, 3), (5, 4), (1, 1)),
    ((1, 2, 0), (8, 4), (2, 1)),
    ((1, 8, 0), (32, 4), (8, 1)),
    ((1, 32, 0), (32, 4), (32, 1)),
    ((1, 33, 0), (32, 4), (1, 1)),
    ((1, 0, 5), (1, 1), (1, 1)),
    ((2, 2, 0), (8, 8), (2, 2)),
    ((2, 32, 0), (32, 8), (32, 2)),
    ((4, 4, 0), (16, 16), (4, 4)),
    ((4, 4, 4), (17, 16), (4, 4)),
    ((4, 16, 0), (32, 16), (16, 4)),
    ((4, 20, 0), (32, 16), (4, 4)),
    ((4, 32, 0), (32, 16), (32, 4)),
    ((4, 0, 4), (1, 1), (1, 1)),
]


@needs_toolkit
@pytest.mark.parametrize(("pattern", "sectors", "wavefronts"), PATTERNS)
def test_sectors_and_wavefronts(watched, pattern, sectors, wavefronts):
    x, y = torch.ones(33 * 32 + 64), torch.zeros(32)
    width, stride, shift = pattern
    stored = (1, 4, 4)   # y
    requests, *found = counted(watched, "read_pattern", x, y, width, 0, stride, shift)
    assert (requests - stored[0], found[0] - stored[1], found[1] - stored[2]) == (1, *sectors)
    assert found[2:] == [0, 0, 0] and torch.equal(y, torch.full((32,), float(width)))
    *_, requests, found, ideal = counted(watched, "read_pattern", x, y, width, 1, stride, shift)
    copies = -(-(32 * stride + width + shift) // 4)   # of 16 bytes, by one lane
    assert (requests - copies, found - copies, ideal - copies) == (1, *wavefronts)


@needs_toolkit
def test_lanes_that_leave_a_loop_early_are_put_together(watched):
    x, y, time = torch.ones(32 * 64), torch.zeros(32), 64
    assert counted(watched, "ragged_rows", x, y, time, 1)[:2] == (1 + time, 4 + 4 * time)
    requests, sectors, ideal, *_ = counted(watched, "ragged_rows", x, y, time, 0)
    assert (requests, sectors) == (1 + time, 4 + 32 * (time - 1) + 16) and ideal == 4 + 4 * (time - 1) + 2


@needs_toolkit
@pytest.mark.parametrize(("stride", "wavefronts"), [(8, 4), (24, 4), (64, 32), (72, 4)])
def test_ldmatrix_reads_eight_rows_at_a_time(watched, stride, wavefronts):
    x, out = torch.zeros(256, dtype=torch.int16), torch.zeros(128, dtype=torch.int32)
    filling = 0
    for first in range(0, 256, 32):   # 32 lanes store two bytes each
        words = {(i // 8 * stride + i % 8) // 2 for i in range(first, first + 32)}
        banks = [w % 32 for w in words]
        filling += max(map(banks.count, banks))
    *_, requests, found, _ = counted(watched, "ldmatrix_4", x, out, stride, 0, 0)
    assert (requests, found) == (8 + 1, filling + wavefronts)


# ---- the kernels -----------------------------------------------------------------------------------------------------


def aligned(name):
    """Arguments whose every row begins at a sector and fills whole warps, large enough for the main loops."""

    def make(generator):
        def normal(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        b, t, d, n = 2, 64, 128, 16
        if name == "rms_norm_gated":
            return {"x": normal(8, 512), "weight": normal(512), "z": normal(8, 512), "residual": normal(8, 512)}
        if name == "causal_conv1d":
            arguments = {"x": normal(b, t, d), "weight": normal(d, 4), "bias": normal(d), "state": normal(b, d, 3)}
            return arguments | {"activation": "silu", "return_state": True}
        if name == "selective_scan":
            arguments = {"u": normal(b, t, d), "dt": normal(b, t, d) - 2, "A": -normal(d, n).exp()}
            arguments |= {"B": normal(b, t, n), "C": normal(b, t, n), "D": normal(d), "z": normal(b, t, d)}
            return arguments | {"state": normal(b, d, n), "dt_softplus": True, "return_state": True}
        if name == "ema":
            arguments = {"x": normal(b, 2 * t, d), "p": normal(b, 2 * t).sigmoid(), "state": normal(b, d)}
            return arguments | {"return_state": True}
        if name == "mamba2_step":
            h, p, n = 4, 64, 128
            arguments = {"conv_state": normal(b, h * p + 2 * n, 3), "state": normal(b, h, p, n), "z": normal(b, h * p)}
            arguments |= {"xBC": normal(b, h * p + 2 * n), "dt": normal(b, h), "conv_weight": normal(h * p + 2 * n, 4)}
            arguments |= {"conv_bias": normal(h * p + 2 * n), "A": -normal(h).exp(), "D": normal(h)}
            return arguments | {"dt_bias": normal(h), "norm_weight": normal(h * p)}
        if name == "ssd":
            arguments = {"x": normal(1, 128, 4, 64), "dt": normal(1, 128, 4) - 2, "A": -normal(4).exp()}
            arguments |= {"B": normal(1, 128, 1, 128), "C": normal(1, 128, 1, 128), "D": normal(4)}
            arguments |= {"z": normal(1, 128, 4, 64), "state": normal(1, 4, 64, 128)}
            return arguments | {"dt_softplus": True, "return_state": True}
        if name == "delta_rule":
            rows, unit = (b, t, 2, 64), torch.nn.functional.normalize(normal(b, t, 2, 64), dim=-1)
            arguments = {"q": normal(*rows), "k": normal(*rows) / 8, "v": normal(*rows), "a": -unit, "b": unit / 2}
            return arguments | {"g": -normal(*rows).sigmoid(), "state": normal(b, 2, 64, 64), "return_state": True}
        if name == "gated_delta_rule":
            h, k, v = 2, 64, 64
            arguments = {"q": normal(1, t, 1, k) / 8, "k": normal(1, t, 1, k) / 8, "v": normal(1, t, h, v)}
            arguments |= {"g": -normal(1, t, h).exp(), "beta": normal(1, t, h).sigmoid(), "state": normal(1, h, k, v)}
            return arguments | {"return_state": True}
        if name == "mamba_step":
            r, b = 8, 4
            arguments = {"conv_state": normal(b, d, 3), "state": normal(b, d, n), "x": normal(b, d), "z": normal(b, d)}
            arguments |= {"conv_weight": normal(d, 4), "conv_bias": normal(d), "A": -normal(d, n).exp(), "D": normal(d)}
            arguments |= {"x_proj_weight": normal(r + 2 * n, d), "dt_proj_weight": normal(d, r), "dt_bias": normal(d)}
            return arguments
        pytest.fail(f"an aligned shape of {name} is missing here")

    return Sample(name, "aligned", make)


# Sectors and wavefronts in units of the fewest that hold the same bytes: what a kernel may take, and those that take
# more, a little above what was counted. They read or write weights or states a row to a lane, once per block or token.
# rms_norm_gated's lanes have 8 channels: of float32 two accesses, which share their sectors.
USUAL = (1.1, 1.1)
CEILINGS = {
    "causal_conv1d_kernel": (1.7, 1.1),
    "causal_conv1d_backward_kernel": (1.4, 1.1),
    "causal_conv1d_sum_kernel": (1.2, 1.1),
    "causal_conv1d_step_kernel": (3.1, 1.1),
    "delta_rule_chunk_kernel": (1.1, 1.5),
    "gated_delta_rule_backward_kernel": (1.15, 1.65),
    "mamba2_step_kernel": (1.4, 1.1),
    "mamba2_step_finish_kernel": (2.7, 1.1),
    "mamba_step_kernel": (1.45, 1.1),
    "mamba_step_project_kernel": (1.75, 1.1),
    "delta_rule_backward_kernel": (1.2, 1.5),
    "rms_norm_gated_kernel": (2.1, 1.1),
    "rms_norm_gated_backward_kernel": (2.1, 1.1),
    "selective_scan_backward_kernel": (1.6, 1.1),
    "selective_scan_reduce_tokens_kernel": (2.6, 1.1),
    "ssd_backward_kernel": (1.85, 1.8),
    "ssd_backward_states_kernel": (2.05, 2.05),
    "ssd_backward_steps_kernel": (1.65, 1.25),
    "ssd_reduce_heads_kernel": (1.4, 1.1),
    "ssd_reduce_steps_kernel": (1.85, 1.2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_kernels_use_what_they_fetch(op, dtype):
    _simt.reset()
    _simt.count_traffic(True)
    try:
        computed(op, aligned(op.name), dtype)
        traffic, launched = _simt.traffic(), _simt.launches()
    finally:
        _simt.reset()
    assert {name.split("<")[0] for name in traffic} == {name.split("<")[0] for name in launched}
    for kernel, lines in traffic.items():
        total = sum(map(Counter, lines.values()), Counter())
        ceilings = CEILINGS.get(kernel.split("<")[0], USUAL)
        for used, ceiling in zip(("sectors", "wavefronts"), ceilings, strict=True):
            worst = sorted(lines, key=lambda line: lines[line]["ideal_" + used] - lines[line][used])[:3]
            rows = ", ".join(f"{line}: {lines[line][used]} of {lines[line]['ideal_' + used]}" for line in worst)
            assert total[used] <= ceiling * total["ideal_" + used], (
                f"{kernel}: {total[used]} {used} where {total['ideal_' + used]} would do; most at {rows}"
            )
