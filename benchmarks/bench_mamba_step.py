"""mamba_step against the same step an op at a time, as Mamba.stepper runs it on a CPU, projections packed.

Roofline, a layer of a 130 M Mamba (D 1536, N 16, R 48) in float32: at batch 1 the weights of the two projections are
0.79 MB and the state, read and written, 0.20 MB; all of it stays in the caches between calls, unlike in a model.
"""

import pytest
import torch

import pyseq
from pyseq._library import REGISTRY

D, N, R, W = 1536, 16, 48, 4


def made(batch):
    torch.manual_seed(0)
    return {
        "conv_state": torch.zeros(batch, D, W - 1),
        "state": torch.zeros(batch, D, N),
        "x": torch.randn(batch, D),
        "z": torch.randn(batch, D),
        "conv_weight": torch.randn(D, W),
        "conv_bias": torch.randn(D),
        "x_proj_weight": torch.randn(R + 2 * N, D) / D**0.5,
        "dt_proj_weight": torch.randn(D, R) / R**0.5,
        "dt_bias": torch.randn(D) - 4,
        "A": -torch.arange(1.0, N + 1).repeat(D, 1),
        "D": torch.randn(D),
    }


def fused(a):
    kernel, arguments = REGISTRY["mamba_step"].active.step, tuple(a.values())
    return lambda: kernel(*arguments, None)


def by_ops(a):
    conv, scan, linear = (REGISTRY[n].active for n in ("causal_conv1d", "selective_scan", "linear"))
    wide, narrow = (pyseq.pack_linear(a[n]).panels for n in ("x_proj_weight", "dt_proj_weight"))

    def call():
        u = conv.step(a["conv_state"], a["x"], a["conv_weight"], a["conv_bias"], True)
        low, B, C = linear.forward(u, wide, None, R + 2 * N).split_with_sizes([R, N, N], -1)
        dt = linear.forward(low, narrow, None, D)
        return scan.step(a["state"], u, dt, a["A"], B, C, a["D"], a["z"], a["dt_bias"], True)

    return call


@pytest.mark.parametrize("batch", [1, 8])
def test_mamba_step(compare, batch):
    moved = sum(t.numel() * 4 for t in made(batch).values()) + batch * D * (N + W) * 4
    with torch.inference_mode():
        compare(f"mamba_step, batch {batch}, float32",
                {"pyseq": lambda: fused(made(batch)), "pyseq, op by op": lambda: by_ops(made(batch))}, bytes=moved)
