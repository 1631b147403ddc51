"""selective_scan against what a user can run today: transformers, mambapy, llama.cpp's op, a hand-compiled loop.

Shapes: A (B 1, T 2048, D 1536, N 16) is one layer of mamba-130m, B (B 4, T 1024, D 512, N 16). All with softplus, bias,
skip and gate.

Roofline of A in float32 with AVX-512. An element is one state of one channel at one token; a vector holds 16 of them:
3.15 M vectors. Forward: 9 instructions per vector on the multiply ports (argument of the decay 1, exp2 5, state 2,
output 1), and about 40 per token for softplus and gate, 2.5 per vector. Zen 4 issues one 512-bit multiply-add a cycle:
36 M cycles, 4.9 ms on two cores at 3.7 GHz; Zen 5 issues two: 2.3 ms. Bytes: u, dt, z in, y out, 50 MB: 1.1 ms at
45 GB/s. Backward: 9 per vector to recompute, 8 to walk back, 3.5 for softplus and gate: 65 M cycles, 8.7 ms on Zen 4;
the sums of dB and dC over channels run on the add and shuffle ports. Bytes: 88 MB, 2.0 ms.
"""

import importlib

import pytest
import torch
from peers import PeerMissing, inputs

import pyseq

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
PEERS = {
    "transformers": ("transformers_peer", "selective_scan_forward", None),   # its backward is quadratic in T
    "mambapy": ("mambapy_peer", "selective_scan_forward", "selective_scan_forward_backward"),
    "llama.cpp": ("llama_cpp_peer", "ssm_scan_forward", None),
    "compiled chunk loop": ("compiled_loop", "selective_scan_forward", "selective_scan_forward_backward"),
}


def ours(x, grad):
    tensors = [getattr(x, name).clone().requires_grad_(grad) for name in NAMES]

    def call():
        y = pyseq.selective_scan(*tensors, dt_softplus=True)
        return torch.autograd.grad(y, tensors, x.dy) if grad else y

    return call


def theirs(who, x, grad):
    module, forward, both = PEERS[who]
    if grad and both is None:
        pytest.skip(f"{who} has no backward here")
    try:
        return getattr(importlib.import_module(f"peers.{module}"), both if grad else forward)(x)
    except PeerMissing as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("shape", inputs.SHAPES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("who", ["pyseq", "pyseq bfloat16", *PEERS])
def test_selective_scan(timed, who, direction, shape):
    grad, (batch, time, dim, states) = direction != "forward", inputs.SHAPES[shape]
    x = inputs.scan(batch, time, dim, states, torch.bfloat16 if who == "pyseq bfloat16" else torch.float32)
    call = ours(x, grad) if who.startswith("pyseq") else theirs(who, x, grad)
    vectors = batch * time * dim * states / 16
    timed(call, work=f"selective_scan {shape}, {direction}", who=who, rounds=15 if who.startswith("pyseq") else 3,
          bytes=x.dy.numel() * x.dy.element_size() * (11 if grad else 4),
          multiply_adds=vectors * (32 if grad else 11.5))


@pytest.mark.parametrize("batch", [1, 8])
def test_selective_scan_step(timed, batch):
    x = inputs.scan(batch, 1, 1536, 16)
    tensors = [getattr(x, n)[:, 0] if n in ("u", "dt", "B", "C", "z") else getattr(x, n) for n in NAMES]
    state = torch.zeros(batch, 1536, 16)

    def call():
        with torch.inference_mode():
            pyseq.selective_scan_step(state, *tensors, dt_softplus=True)

    timed(call, work=f"selective_scan_step, D 1536, batch {batch}", rounds=300, bytes=(2 * batch + 1) * 1536 * 16 * 4)
