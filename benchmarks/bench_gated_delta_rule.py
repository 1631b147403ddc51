"""gated_delta_rule against what a user can run today: transformers, fla's plain form, llama.cpp's op.

Shape: one layer of Qwen3-Next's kind over 1024 tokens, H 16, K = V = 128, one decay per head.

Roofline in float32 with AVX-512, per token and head, in chunks of 16: three products of the state (what is stored under
the keys, the output, the new state), 3 K V, and within the chunk 16 K for the scores and 16 V: 53.2 k, 0.87 G
multiply-adds over all. Zen 4 issues one 512-bit multiply-add a cycle: 54 M cycles, 7.4 ms on two cores at 3.7 GHz;
Zen 5 issues two: 3.5 ms at 3.9 GHz. Bytes: q, k, v in and y out, 34 MB: 0.7 ms at 45 GB/s. Backward: 8 K V (the states
once more, the gradient of the state, and the products of both that make dq, dk, du) and about 5 x 16 (K + V) / 2 within
a chunk: 141 k, 19.5 ms on Zen 4.

A step reads and writes the state, 1 MB a sequence: at batch 1 it stays in the second-level caches.
"""

import pytest
import torch

import pyseq
from benchmarks.peers import fla_peer, inputs, llama_cpp_peer, transformers_peer

NAMES = ("q", "k", "v", "g", "beta")
TARGETS = {
    "forward": {"fla, naive chunks": 3.3, "transformers, compiled": 3.3, "llama.cpp": 3.3},
    "forward+backward": {"transformers, compiled": 3},
}


def ours(x, grad, **options):
    tensors = [getattr(x, name).clone().requires_grad_(grad) for name in NAMES]

    def call():
        y = pyseq.gated_delta_rule(*tensors, **options)
        return torch.autograd.grad(y, tensors, x.dy) if grad else y

    return call


def multiply_adds(batch, time, heads, width, grad):
    forward = 3 * width * width + 2 * 16 * width
    return batch * time * heads * (forward + (8 * width * width + 5 * 16 * width if grad else 0))


@pytest.mark.parametrize("direction", TARGETS)
def test_gated_delta_rule(compare, direction):
    grad, shape = direction != "forward", inputs.GATED_DELTA_NET
    x, half = inputs.gated_delta(*shape), inputs.gated_delta(*shape, torch.bfloat16)
    cases = {
        "pyseq": lambda: ours(x, grad),
        "pyseq, exact": lambda: ours(x, grad, exact=True),
        "pyseq, bfloat16": lambda: ours(half, grad),
        "fla, naive chunks": lambda: fla_peer.gated_delta_rule(x, grad, naive=True),
        "transformers": lambda: transformers_peer.gated_delta_rule(x, grad, compiled=False),
        "transformers, compiled": lambda: transformers_peer.gated_delta_rule(x, grad, compiled=True),
    }
    if not grad:   # llama.cpp has no backward
        cases["llama.cpp"] = lambda: llama_cpp_peer.gated_delta_rule_forward(x)
    compare(
        f"gated_delta_rule {direction}, T 1024, H 16, K 128, V 128", cases, targets=TARGETS[direction],
        bytes=4 * x.v.numel() * (11 if grad else 4), flops=2 * multiply_adds(*shape, grad), rounds=5,
    )


@pytest.mark.parametrize("batch", [1, 8])
def test_gated_delta_rule_step(compare, batch):
    _, _, heads, width = inputs.GATED_DELTA_NET
    x = inputs.gated_delta(batch, 1, heads, width)
    token = [getattr(x, name)[:, 0] for name in NAMES]

    def step(dtype):
        state = torch.zeros(batch, heads, width, width, dtype=dtype)

        @torch.inference_mode()
        def call():
            return pyseq.gated_delta_rule_step(state, *token)

        return call

    compare(
        f"gated_delta_rule_step, H 16, K 128, V 128, batch {batch}",
        {"pyseq": lambda: step(torch.float32), "pyseq, bfloat16 state": lambda: step(torch.bfloat16),
         "llama.cpp": lambda: llama_cpp_peer.gated_delta_rule_forward(x)},
        bytes=4 * batch * heads * width * (2 * width + 4),
    )
