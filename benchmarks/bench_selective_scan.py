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

import pytest
import torch

import pyseq
from benchmarks.peers import compiled_loop, inputs, llama_cpp_peer, mambapy_peer, transformers_peer

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
TARGETS = {
    "forward": {"transformers": 100, "llama.cpp": 25, "compiled chunk loop": 5},
    # The goal of 20 was set on the loop that slices its chunks; one that splits the sequence has a cheaper backward.
    "forward+backward": {"mambapy": 100, "compiled chunk loop, slices": 20},
}


def ours(x, grad):
    tensors = [getattr(x, name).clone().requires_grad_(grad) for name in NAMES]

    def call():
        y = pyseq.selective_scan(*tensors, dt_softplus=True)
        return torch.autograd.grad(y, tensors, x.dy) if grad else y

    return call


@pytest.mark.parametrize("shape", inputs.SHAPES)
@pytest.mark.parametrize("direction", TARGETS)
def test_selective_scan(compare, direction, shape):
    grad, (batch, time, dim, states) = direction != "forward", inputs.SHAPES[shape]
    x, half = inputs.scan(batch, time, dim, states), inputs.scan(batch, time, dim, states, torch.bfloat16)
    cases = {"pyseq": lambda: ours(x, grad), "pyseq, bfloat16": lambda: ours(half, grad)}
    if grad:   # transformers' backward is quadratic in T, llama.cpp has none
        cases |= {
            "mambapy": lambda: mambapy_peer.selective_scan_forward_backward(x),
            "compiled chunk loop, split": lambda: compiled_loop.selective_scan_forward_backward(x),
            "compiled chunk loop, slices": lambda: compiled_loop.selective_scan_forward_backward(x, cut="slice"),
        }
    else:
        cases |= {
            "transformers": lambda: transformers_peer.selective_scan_forward(x),
            "mambapy": lambda: mambapy_peer.selective_scan_forward(x),
            "llama.cpp": lambda: llama_cpp_peer.ssm_scan_forward(x),
            "compiled chunk loop": lambda: compiled_loop.selective_scan_forward(x),
        }
    compare(
        f"selective_scan {direction}, {shape}", cases, targets=TARGETS[direction] if shape == "A" else None,
        bytes=x.dy.numel() * 4 * (11 if grad else 4), flops=2 * batch * time * dim * states * (32 if grad else 11.5),
        rounds=5,
    )


@pytest.mark.parametrize("batch", [1, 8])
def test_selective_scan_step(compare, batch):
    x = inputs.scan(batch, 1, 1536, 16)
    tensors = [getattr(x, n)[:, 0] if n in ("u", "dt", "B", "C", "z") else getattr(x, n) for n in NAMES]
    state = torch.zeros(batch, 1536, 16)

    @torch.inference_mode()
    def call():
        return pyseq.selective_scan_step(state, *tensors, dt_softplus=True)

    compare(f"selective_scan_step, D 1536, batch {batch}", {"pyseq": lambda: call},
            bytes=(2 * batch + 1) * 1536 * 16 * 4)
