"""What is causal_conv1d's own: golden values, its formula, steps in odd memory, packed nonsense, its errors."""

import pytest
import torch

import pyseq
from pyseq import _library, reference, testing
from pyseq.testing import assert_close, on

BACKENDS = testing.backends(_library.REGISTRY["causal_conv1d"])


def wave(offset, *shape):
    n = torch.Size(shape).numel()
    return torch.sin(0.7 * torch.arange(n, dtype=torch.float64) + offset).reshape(shape)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 2e-9), (torch.float32, 2e-6)], ids=str)
def test_golden_values(dtype, atol):
    def near(tensor, *golden):
        exact = torch.tensor(golden, dtype=torch.float64)
        assert torch.allclose(tensor.detach().double().flatten()[: len(golden)], exact, atol=atol, rtol=0)

    drawn = wave(0.1, 1, 2, 5), wave(0.2, 2, 3), wave(0.3, 2), wave(0.4, 1, 2, 2)   # x, as the rest, channel first
    x, w, b, state = (t.to(dtype).requires_grad_() for t in drawn)
    y = pyseq.causal_conv1d(x.transpose(1, 2), w, b, activation="silu", state=state).transpose(1, 2)
    near(y, 0.893643116, 0.989376028, 1.624985857, 1.791667184, 1.088496426, 1.638255345)
    near(y.double().sum(), 10.281871638)
    (y * wave(0.5, 1, 2, 5)).sum().backward()
    near(x.grad.double().sum(), 5.601737268)
    near(w.grad.double().sum(), 6.619817980)
    near(b.grad, 2.824600144, -2.454267637)
    near(state.grad, 0.092849199, 0.550827641, -0.611765938, -0.912652449)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 9])
def test_the_reference_is_torchs_convolution(width):
    x, w, b = wave(0.1, 2, 12, 3), wave(0.2, 3, width), wave(0.3, 3)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (width - 1, 0))
    exact = torch.nn.functional.conv1d(padded, w[:, None], b, groups=3).transpose(1, 2)
    assert torch.allclose(reference.causal_conv1d(x, w, b), exact, atol=1e-12)


# The sizes of causal-conv1d's own tests that differ in kind: one token, around a block of 64 or 128 rows, ragged. Of a
# single channel the sum over time may cancel to nothing, and then says nothing about rounding.
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 129, 372])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("channels", [7, 33, 512, 520])
def test_blocks_of_time_and_channels_join(channels, width, time):
    torch.manual_seed(channels + width + time)
    wide = torch.randn(2, time, channels + 9)
    x, w, b = wide[..., 4 : 4 + channels], torch.randn(channels, width), torch.randn(channels)
    leaves = [t.detach().clone().requires_grad_() for t in (x, w, b)]
    doubles = [t.detach().double().requires_grad_() for t in (x, w, b)]
    dy = torch.randn_like(x)
    y = pyseq.causal_conv1d(*leaves, activation="silu")
    exact = reference.causal_conv1d(*doubles, activation="silu")
    assert_close(y, exact, "y")
    assert torch.equal(pyseq.causal_conv1d(x, w, b, activation="silu"), y)
    exact_grads = torch.autograd.grad(exact, doubles, dy.double())
    for name, a, e in zip("xwb", torch.autograd.grad(y, leaves, dy), exact_grads, strict=True):
        assert_close(a, e, f"d{name}", "gradient")


def test_a_slice_of_a_projection_is_not_copied():
    x, z = torch.randn(2, 5, 16).chunk(2, -1)
    assert pyseq.explain(pyseq.causal_conv1d, x, torch.randn(8, 4)).notes == ()
    notes = pyseq.explain(pyseq.causal_conv1d, z.transpose(1, 2), torch.randn(5, 4)).notes
    assert len(notes) == 1 and "x is copied first" in notes[0]


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 2, 4, 6])
@pytest.mark.parametrize("memory", ["plain", "rows of a cache", "channel last"])
def test_a_step_shifts_its_state_wherever_it_lies(memory, width, backend):
    taps = width - 1
    make = {
        "plain": lambda: torch.empty(3, 21, taps, device=device),
        "rows of a cache": lambda: torch.empty(6, 25, taps, device=device)[::2, 2:23],
        "channel last": lambda: torch.empty(3, taps, 21, device=device).transpose(1, 2),
    }
    with on(backend) as device:
        shapes = (3, 21), (21, width), (21,), (3, 21, taps)
        x, w, b, given = (torch.randn(*s, device=device) for s in shapes)
        state = make[memory]().copy_(given)
        y = pyseq.causal_conv1d_step(state, x, w, b, activation="silu")
        exact, last = pyseq.causal_conv1d(x[:, None], w, b, activation="silu", state=given, return_state=True)
        assert torch.equal(y, exact[:, 0]) and torch.equal(state, last)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_step_takes_a_bfloat16_state(dtype, backend):
    with on(backend) as device:
        x, w = torch.randn(2, 19, device=device).to(dtype), torch.randn(19, 4, device=device)
        state = torch.randn(2, 19, 3, device=device).bfloat16()
        given = state.clone()
        y = pyseq.causal_conv1d_step(state, x, w)
        assert torch.equal(y, pyseq.causal_conv1d(x[:, None], w, state=given.float())[:, 0])
        assert torch.equal(state, torch.cat([given[..., 1:], x.bfloat16()[..., None]], -1))


def test_a_step_refuses_a_gradient():
    state, x, w = torch.zeros(1, 8, 3), torch.zeros(1, 8), torch.zeros(8, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="causal_conv1d_step has no gradient"):
        pyseq.causal_conv1d_step(state, x, w)
    with torch.no_grad():
        pyseq.causal_conv1d_step(state, x, w)


# Whole aligned vectors of channels take the kernel of their width on a GPU, all else the general one.
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpu"])
@pytest.mark.parametrize("width", range(1, 10))
@pytest.mark.parametrize("lengths", [None, (3, 0, 17, 1, 2, 0, 7)], ids=["one", "packed"])
def test_both_kernels_give_the_same_bits(lengths, width, backend):
    channels, time = 24, 30
    options = {"activation": "silu", "return_state": True}
    with on(backend) as device:
        if lengths:
            options["cu_seqlens"] = torch.tensor([0, *lengths], device=device).cumsum(0)
        x, w, b = (torch.randn(*s, device=device) for s in ((1, time, channels), (channels, width), (channels,)))
        state = torch.randn(len(lengths or (time,)), channels, width - 1, device=device)
        odd = torch.full((1, time, channels + 3), float("nan"), device=device)
        odd[..., 1 : 1 + channels] = x
        odd = odd[..., 1 : 1 + channels]
        for dtype in testing.DTYPES:
            leaves = [t.detach().to(d).requires_grad_() for t, d in ((x, dtype), (w, w.dtype), (b, b.dtype))]
            whole = pyseq.causal_conv1d(*leaves, state=state, **options)
            apart = pyseq.causal_conv1d(odd.to(dtype), w, b, state=state, **options)
            assert torch.equal(whole[0], apart[0]) and torch.equal(whole[1], apart[1])
            doubles = [t.detach().double().requires_grad_() for t in leaves]
            exact = reference.causal_conv1d(*doubles, state=state.double(), **options)
            dy = torch.randn_like(x).to(dtype)
            grads = torch.autograd.grad(exact[0], doubles, dy.double())
            for name, a, e in zip("xwb", torch.autograd.grad(whole[0], leaves, dy), grads, strict=True):
                assert_close(a, e, f"d{name}", "gradient")


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("channels", "width"), [(16, 4), (16, 2), (7, 3), (16, 6)])
def test_bits_do_not_depend_on_the_cut(channels, width, backend):
    time, options = 41, {"activation": "silu", "return_state": True}
    with on(backend) as device:
        x, w, b = (torch.randn(*s, device=device) for s in ((1, time, channels), (channels, width), (channels,)))
        given = torch.randn(1, channels, width - 1, device=device)
        y, last = pyseq.causal_conv1d(x, w, b, state=given, **options)
        for at in (0, 1, 2, 8, 19, time):
            y1, state = pyseq.causal_conv1d(x[:, :at], w, b, state=given, **options)
            y2, state = pyseq.causal_conv1d(x[:, at:], w, b, state=state, **options)
            assert torch.equal(torch.cat([y1, y2], 1), y) and torch.equal(state, last)
        state = given.clone()
        steps = [pyseq.causal_conv1d_step(state, x[:, t], w, b, activation="silu") for t in range(time)]
        assert torch.equal(torch.stack(steps, 1), y) and torch.equal(state, last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [5, 16])
@pytest.mark.parametrize("bounds", [[0, 9, 5], [0, 2**40, 8], [-5, 3, 8], [1, 4, 8], [0, 3, 7], [8, 0, 8]])
def test_lengths_that_are_not_read_beforehand_give_nan(bounds, channels, backend):
    """Under compile and export nothing reads cu_seqlens: the kernel stays inside x and leaves no plausible result."""
    with on(backend) as device:
        x, w, b = (torch.randn(*s, device=device) for s in ((1, 8, channels), (channels, 4), (channels,)))
        cu_seqlens = torch.tensor(bounds, device=device)
        kernels = _library.REGISTRY["causal_conv1d"].active
        y, state = kernels.forward(x, w, b, None, cu_seqlens, True, True)
        assert y.isnan().all() and state.isnan().all()
        for grad in kernels.backward(y, state, x, w, b, state, cu_seqlens, True):
            assert grad.isnan().all()


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"x": None}, TypeError, "x is NoneType"),
    ({"x": torch.zeros(2, 8)}, ValueError, r"x has shape \[2, 8\], expected \[B, T, D\]"),
    ({"x": torch.zeros(2, 5, 8, dtype=torch.int32)}, TypeError, "x has dtype int32"),
    ({"weight": torch.zeros(8, 1, 4)}, ValueError, r"weight has shape \[8, 1, 4\], expected \[D, W\]"),
    ({"weight": torch.zeros(7, 4)}, ValueError, r"with D = 8 \(from x\)"),
    ({"weight": torch.zeros(8, 0)}, ValueError, "weight is of width 0"),
    ({"bias": torch.zeros(1)}, ValueError, "bias has shape"),
    ({"activation": "swish"}, ValueError, "activation is 'swish', expected None or \"silu\""),
    ({"activation": True}, ValueError, "activation is True"),
    ({"state": torch.zeros(2, 8, 4)}, ValueError, r"state has shape \[2, 8, 4\]"),
    ({"state": torch.zeros(1, 8, 3)}, ValueError, "state has shape"),
    ({"state": torch.zeros(2, 8, 3, dtype=torch.bfloat16)}, TypeError, "state has dtype bfloat16, expected float32"),
    ({"return_state": "yes"}, TypeError, "return_state is str, expected True or False"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "B is 2"),
    ({"x": torch.zeros(1, 5, 8), "cu_seqlens": torch.zeros(2, dtype=torch.int64, device="meta")},
     ValueError, "cu_seqlens is on device meta"),
    ({"x": torch.zeros(1, 5, 8), "cu_seqlens": torch.tensor([0, 5]).to_sparse()}, TypeError, "cu_seqlens has layout"),
    ({"x": torch.zeros(1, 5, 8), "cu_seqlens": torch.nn.Parameter(torch.tensor([0, 9]), requires_grad=False)},
     ValueError, "expected 0 to T = 5"),
    ({"x": torch.zeros(1, 5, 8), "cu_seqlens": torch.tensor([0])}, ValueError, "cu_seqlens is of length 1"),
    ({"x": torch.zeros(1, 5, 8), "cu_seqlens": torch.tensor([0, 4])}, ValueError, "expected 0 to T = 5"),
    ({"x": torch.zeros(1, 5, 8), "cu_seqlens": torch.tensor([0, 4, 3, 5])}, ValueError, "non-decreasing"),
    ({"x": torch.zeros(1, 5, 8), "cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens has dtype"),
    ({"x": torch.zeros(1, 5, 8), "cu_seqlens": torch.tensor([0, 2, 5]), "state": torch.zeros(1, 8, 3)},
     ValueError, r"S = 2 \(from cu_seqlens\)"),
    ({"weight": torch.zeros(8, 4, device="meta")}, ValueError, "weight is on device meta"),
])
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        pyseq.causal_conv1d(**({"x": torch.zeros(2, 5, 8), "weight": torch.zeros(8, 4)} | arguments))


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"state": torch.zeros(2, 8, 4)}, ValueError, r"_step: state has shape \[2, 8, 4\], expected \[B, D, W-1\] with"),
    ({"state": torch.zeros(2, 8, 3, dtype=torch.float16)}, TypeError, "state has dtype float16"),
    ({"state": torch.zeros(8, 3).expand(2, 8, 3)}, ValueError, "state"),
    ({"x": torch.zeros(2, 1, 8)}, ValueError, "x has shape"),
])
def test_wrong_arguments_of_a_step_are_named(arguments, error, message):
    good = {"state": torch.zeros(2, 8, 3), "x": torch.zeros(2, 8), "weight": torch.zeros(8, 4)}
    with torch.no_grad(), pytest.raises(error, match=message):
        pyseq.causal_conv1d_step(**(good | arguments))
