"""delta_rule against what a user can run today: fla's plain forms, llama.cpp's op.

Shape: one layer of RWKV-7 0.19B over 1024 tokens, H 12, K = V = 64.

Roofline in float32 with AVX-512, per token and head. Token by token every element of the state takes part in five
multiply-adds: the correction read, decay, correction, write, output read; 20.5 k, 0.25 G over all. Zen 4 issues one
512-bit multiply-add a cycle: 7.9 M cycles, 2.1 ms on two cores at 3.7 GHz; Zen 5 issues two: 1.0 ms at 3.9 GHz. Chunks
of 16 tokens need as many: three products of the state, and 16 K and 16 V several times. Bytes: six tensors in, one out,
22 MB: 0.5 ms at 45 GB/s. Backward, in chunks: 11 K V (the states once more, the gradient of the state, and the products
of both that make dq, dk, da, db and dv) and 22 x 16 K within a chunk: 67.6 k, 7.0 ms on Zen 4 and half of it on Zen 5.

A step reads and writes the state, 0.2 MB a sequence: at batch 1 it stays in the second-level caches.
"""

import pytest
import torch

import pyseq
from benchmarks.peers import fla_peer, inputs, llama_cpp_peer

NAMES = ("q", "k", "v", "a", "b", "g")
TARGETS = {
    "forward": {"fla, naive recurrence": 40, "fla, naive chunks": 40, "llama.cpp": 2},
    "forward+backward": {"fla, naive chunks": 28},
}


def ours(x, grad, **options):
    tensors = [getattr(x, name).clone().requires_grad_(grad) for name in NAMES]

    def call():
        y = pyseq.delta_rule(*tensors, **options)
        return torch.autograd.grad(y, tensors, x.dy) if grad else y

    return call


def multiply_adds(batch, time, heads, width, grad):
    forward = 5 * width * width
    return batch * time * heads * (forward + (11 * width * width + 22 * 16 * width if grad else 0))


@pytest.mark.parametrize("direction", TARGETS)
def test_delta_rule(compare, direction):
    grad, shape = direction != "forward", inputs.RWKV7_190M
    x, half = inputs.delta(*shape), inputs.delta(*shape, torch.bfloat16)
    cases = {
        "pyseq": lambda: ours(x, grad),
        "pyseq, exact": lambda: ours(x, grad, exact=True),
        "pyseq, bfloat16": lambda: ours(half, grad),
        "fla, naive chunks": lambda: fla_peer.delta_rule(x, grad, "chunks"),
    }
    if not grad:   # llama.cpp has no backward, and that of the recurrence takes a second
        cases["fla, naive recurrence"] = lambda: fla_peer.delta_rule(x, grad, "recurrence")
        cases["llama.cpp"] = lambda: llama_cpp_peer.delta_rule_forward(x)
    compare(
        f"delta_rule (RWKV-7) {direction}, T 1024, H 12, K 64, V 64", cases, targets=TARGETS[direction],
        bytes=4 * x.q.numel() * (21 if grad else 7), flops=2 * multiply_adds(*shape, grad), rounds=5,
    )


@pytest.mark.parametrize("batch", [1, 8])
def test_delta_rule_step(compare, batch):
    _, _, heads, width = inputs.RWKV7_190M
    x = inputs.delta(batch, 1, heads, width)
    token = [getattr(x, name)[:, 0] for name in NAMES]

    def step(dtype):
        state = torch.zeros(batch, heads, width, width, dtype=dtype)

        @torch.inference_mode()
        def call():
            return pyseq.delta_rule_step(state, *token)

        return call

    cases = {"pyseq": lambda: step(torch.float32), "pyseq, bfloat16 state": lambda: step(torch.bfloat16)}
    if batch == 1:
        cases["llama.cpp"] = lambda: llama_cpp_peer.delta_rule_forward(x)
    compare(
        f"delta_rule_step, H 12, K 64, V 64, batch {batch}", cases,
        bytes=4 * batch * heads * width * (2 * width + 7),
    )
