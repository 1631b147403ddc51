"""causal_conv1d with SiLU against what a user writes in PyTorch: conv1d + silu, and a compiled sum of shifts.

Roofline at A = (B 1, T 2048, D 1536, W 4), float32. Forward reads x and writes y, 2 x 12.6 MB: 0.45 ms at 56 GB/s of
memory, 0.14 ms from a cache that holds both. Backward reads x and dy and writes dx, 3 x 12.6 MB: 0.67 ms. Arithmetic:
3.1 M exp and quotients each way, 0.13 ms of exp on two cores at 24 G/s. A fresh output costs about 9 GB/s of page
faults, 1.4 ms, when the allocator has given the last one back to the system: peers pay the same.
"""

import pytest
import torch
from torch.nn.functional import conv1d, pad, silu

import pyseq

SHAPES = {"A": (1, 2048, 1536), "B": (4, 1024, 512)}
WIDTH = 4


def convolution(x, weight, bias):   # in its own layout, [B, D, T]: no transposition is charged to it
    return silu(conv1d(x, weight[:, None], bias, padding=WIDTH - 1, groups=x.shape[1])[..., : x.shape[2]])


def shifted_sum(x, weight, bias):
    padded, time = pad(x, (0, 0, WIDTH - 1, 0)), x.shape[1]
    a = bias
    for k in range(WIDTH):
        a = a + weight[:, k] * padded[:, k : k + time]
    return silu(a)


@pytest.fixture(scope="module")
def compiled_shifted_sum():
    return torch.compile(shifted_sum, dynamic=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("who", ["pyseq", "torch conv1d", "compiled shift-add"])
def test_causal_conv1d(timed, compiled_shifted_sum, who, direction, shape, dtype):
    grad = direction != "forward"
    batch, time, channels = SHAPES[shape]
    x = torch.randn(batch, time, channels, dtype=dtype)
    dy = torch.randn_like(x)
    if who == "torch conv1d":
        x, dy = x.transpose(1, 2).contiguous(), dy.transpose(1, 2).contiguous()
    x.requires_grad_(grad)
    weight = torch.randn(channels, WIDTH, dtype=dtype, requires_grad=grad)
    bias = torch.randn(channels, dtype=dtype, requires_grad=grad)
    run = {
        "pyseq": lambda: pyseq.causal_conv1d(x, weight, bias, activation="silu"),
        "torch conv1d": lambda: convolution(x, weight, bias),
        "compiled shift-add": lambda: compiled_shifted_sum(x, weight, bias),
    }[who]

    def call():
        y = run()
        if grad:
            torch.autograd.grad(y, (x, weight, bias), dy)

    streams = 5 if grad else 2
    timed(call, work=f"causal_conv1d + silu {shape}, {direction}, {dtype}", who=who,
          bytes=streams * x.numel() * x.element_size())


@pytest.mark.parametrize("who", ["pyseq", "torch"])
def test_causal_conv1d_step(timed, who):
    state, x = torch.zeros(1, 1536, WIDTH - 1), torch.randn(1, 1536)
    weight, bias = torch.randn(1536, WIDTH), torch.randn(1536)

    def torch_step():
        window = torch.cat([state, x[..., None]], -1)
        state.copy_(window[..., 1:])
        return silu((window * weight).sum(-1) + bias)

    def call():
        with torch.inference_mode():
            pyseq.causal_conv1d_step(state, x, weight, bias, activation="silu") if who == "pyseq" else torch_step()

    timed(call, work="causal_conv1d_step, batch 1, D 1536", who=who, rounds=200)
