"""selective_scan against what a user can run today: a hand-compiled loop, and transformers' CPU path.

Shapes: A (B 1, T 2048, D 1536, N 16) is one layer of mamba-130m, B (B 4, T 1024, D 512, N 16).

Roofline, A, float32, AVX-512. An element is one state of one channel at one token, a vector holds 16: 3.15 M vectors.
Forward: 9 instructions of the multiply ports per vector (the decay's argument 1, exp2 5, state 2, output 1) and 3 of the
add ports; softplus, bias, skip and gate add 40 per 16 vectors. On Zen 4 (one 512-bit multiply-add a cycle) that is
36 M cycles, 4.9 ms on two cores at 3.7 GHz; on Zen 5 (two a cycle) 2.3 ms. Bytes: u, dt, z read and y written, 50 MB:
1.1 ms at 45 GB/s.
Backward: 9 to recompute and 8 to walk back per vector, 60 M cycles, 7.9 ms on Zen 4, and the sums of dB and dC over lanes on
the add and shuffle ports, which have room. Bytes: u, dt, z, dy read, du, ddt, dz written, 88 MB: 2.0 ms.
"""

import pytest
import torch
from torch.nn.functional import silu, softplus

import pyseq

SHAPES = {"A": (1, 2048, 1536, 16), "B": (4, 1024, 512, 16)}


def tensors(shape, dtype, grad):
    batch, time, dim, states = shape
    made = {
        "u": torch.randn(batch, time, dim), "dt": torch.randn(batch, time, dim),
        "A": -torch.arange(1.0, states + 1).expand(dim, states).contiguous(),
        "B": torch.randn(batch, time, states), "C": torch.randn(batch, time, states),
        "D": torch.ones(dim), "z": torch.randn(batch, time, dim), "dt_bias": torch.full((dim,), -4.0),
    }
    return {n: t.to(dtype if n in ("u", "dt", "B", "C", "z") else t.dtype).requires_grad_(grad) for n, t in made.items()}


def chunk(h, u, delta, A, B, C):
    """32 tokens, unrolled: what one writes by hand for torch.compile."""
    ys = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1))
    return h, torch.stack(ys, 1)


compiled_chunk = torch.compile(chunk)


def chunk_loop(u, dt, A, B, C, D, z, dt_bias):
    u, delta, B, C = u.float(), softplus(dt.float() + dt_bias), B.float(), C.float()
    h, ys = u.new_zeros(u.shape[0], *A.shape), []
    for t in range(0, u.shape[1], 32):
        span = slice(t, t + 32)
        h, y = compiled_chunk(h, u[:, span], delta[:, span], A, B[:, span], C[:, span])
        ys.append(y)
    return ((torch.cat(ys, 1) + D * u) * silu(z.float())).to(z.dtype)


def transformers_path(u, dt, A, B, C, D, z, dt_bias):
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    rows = [t.transpose(1, 2) for t in (u, dt)]
    return mamba_selective_scan(
        *rows, A, B.transpose(1, 2), C.transpose(1, 2), D=D, z=z.transpose(1, 2), delta_bias=dt_bias, delta_softplus=True
    )


WHO = {
    "pyseq": lambda **t: pyseq.selective_scan(**t, dt_softplus=True),
    "compiled_chunk_loop": chunk_loop,
    "transformers": transformers_path,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("who", WHO)
def test_selective_scan(timed, who, direction, shape, dtype):
    grad = direction != "forward"
    if who == "transformers" and (grad or dtype != torch.float32):
        pytest.skip("its backward is quadratic in T: minutes")
    if who == "transformers":
        pytest.importorskip("transformers")
    if who != "pyseq" and dtype != torch.float32:
        pytest.skip("peers are compared in float32")
    arguments = tensors(SHAPES[shape], dtype, grad)
    dy = torch.randn(SHAPES[shape][:3]).to(dtype)

    def call():
        y = WHO[who](**arguments)
        if grad:
            y.backward(dy)

    batch, time, dim, states = SHAPES[shape]
    vectors = batch * time * dim * states / 16
    timed(call, work=f"selective_scan {shape}, {direction}, {str(dtype).removeprefix('torch.')}", who=who,
          rounds=15 if who == "pyseq" else 3, bytes=dy.numel() * dy.element_size() * (11 if grad else 4),
          multiply_adds=vectors * (11.5 + (20.5 if grad else 0)))


@pytest.mark.parametrize("batch", [1, 8])
def test_selective_scan_step(timed, batch):
    arguments = tensors((batch, 1, 1536, 16), torch.float32, False)
    rows = {n: t[:, 0] if n in ("u", "dt", "B", "C", "z") else t for n, t in arguments.items()}
    state = torch.zeros(batch, 1536, 16)
    timed(lambda: pyseq.selective_scan_step(state, **rows, dt_softplus=True),
          work=f"selective_scan_step, D 1536, batch {batch}", rounds=300, bytes=(2 * batch + 1) * 1536 * 16 * 4)
