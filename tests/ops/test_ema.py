"""What is ema's own: golden values, a small p without bias, resets, cuts in time, and the errors of its arguments."""

import pytest
import torch

import pyseq
from pyseq import _library, reference, testing
from pyseq.testing import assert_close, gradients, on, prepare

BACKENDS = testing.backends(_library.REGISTRY["ema"])
on_backends = pytest.mark.parametrize("backend", BACKENDS)


def wave(offset, *shape):
    n = torch.Size(shape).numel()
    return torch.sin(0.7 * torch.arange(n, dtype=torch.float64) + offset).reshape(shape)


@on_backends
def test_golden_values(backend):
    p, x = wave(0.1, 1, 5).sigmoid(), wave(0.2, 1, 5, 1)
    p[:, 0] = 1 - 1e-4
    golden = torch.tensor([0.198649464, 0.591567058, 0.889642677, 0.790068322, 0.426963148], dtype=torch.float64)
    assert torch.allclose(pyseq.ema(x, p).flatten(), golden, atol=1e-9, rtol=0)
    with on(backend) as device:
        y = pyseq.ema(x.float().to(device), p.float().to(device)).cpu()
    assert torch.allclose(y.double().flatten(), golden, atol=3e-7, rtol=0)


def test_it_is_ssd_with_one_state():
    """H-Net computes it as such: A = -1, dt = -log(1 - p), x / dt, B = p, C = 1."""
    torch.manual_seed(0)
    x, p = torch.randn(2, 50, 6, dtype=torch.float64), torch.rand(2, 50, dtype=torch.float64).clamp(1e-4, 1 - 1e-4)
    dt = -torch.log1p(-p)[..., None].expand(2, 50, 3)
    heads = (x / dt[..., :1]).reshape(2, 50, 3, 2)
    one = torch.ones(2, 50, 1, 1, dtype=torch.float64)
    y = reference.ssd(heads, dt, -torch.ones(3, dtype=torch.float64), p[..., None, None], one)
    assert torch.allclose(y.reshape(2, 50, 6), pyseq.ema(x, p), atol=1e-12)


@on_backends
def test_a_small_weight_has_no_bias(backend):
    """1 - p rounded to float32 is off by up to 3e-8, and y, after 1 / p tokens, by 3e-8 / p: over the tolerance."""
    torch.manual_seed(0)
    x, p = torch.rand(1, 2000, 8) + 0.5, torch.full((1, 2000), 3e-3)
    exact = reference.ema(x.double(), p.double())
    assert testing.error(reference.ema(x, p), exact) > 2
    with on(backend) as device:
        y = pyseq.ema(x.to(device), p.to(device))
    assert_close(y, exact, "output")


@on_backends
def test_a_weight_of_one_forgets_and_of_zero_keeps(backend):
    x, p = torch.randn(1, 40, 8), torch.zeros(1, 40)
    p[:, 20] = 1
    state = torch.full((1, 8), 3e30)
    with on(backend) as device:
        y = pyseq.ema(x.to(device), p.to(device), state=state.to(device)).cpu()
    assert torch.equal(y[:, :20], state.expand(1, 20, 8)) and torch.equal(y[:, 20:], x[:, 20:21].expand(1, 20, 8))


@on_backends
def test_weights_outside_of_zero_and_one_are_used_as_they_are(backend):
    torch.manual_seed(1)
    x, p = torch.randn(2, 30, 7), 2.5 * torch.rand(2, 30) - 0.5
    arguments = {"x": x, "p": p, "state": torch.randn(2, 7), "return_state": True}
    exact, exact_grads = testing.expected(_library.REGISTRY["ema"], arguments)
    with on(backend) as device:
        outputs, grads = gradients(pyseq.ema, prepare(arguments, device, requires_grad=True))
    for y, e in zip(outputs, exact, strict=True):
        assert_close(y, e, "output")
    for name, grad in grads.items():
        assert_close(grad, exact_grads[name], name, "gradient")


# Sequences that begin at every place of a chunk of 16 tokens and of the 128 that a block of a GPU has at a time.
@on_backends
@pytest.mark.parametrize("first", [1, 15, 16, 17, 127, 128, 129])
def test_nothing_crosses_from_one_sequence_to_the_next(first, backend):
    torch.manual_seed(first)
    ends = [0, first, first, first + 16, 290]
    arguments = {
        "x": torch.randn(1, 290, 9), "p": torch.rand(1, 290), "state": torch.randn(4, 9), "return_state": True,
        "cu_seqlens": torch.tensor(ends),
    }
    spoilt = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    spoilt["x"][:, 3 * first // 4] = float("nan")   # in the first sequence
    spoilt["p"][:, first + 15] = float("nan")       # at the end of the third
    exact, exact_grads = testing.expected(_library.REGISTRY["ema"], arguments)
    with on(backend) as device:
        outputs, grads = gradients(pyseq.ema, prepare(arguments, device, requires_grad=True))
        (y, last), nan_grads = gradients(pyseq.ema, prepare(spoilt, device, requires_grad=True))
    for a, e in zip(outputs, exact, strict=True):
        assert_close(a, e, "output")
    for name, grad in grads.items():
        assert_close(grad, exact_grads[name], name, "gradient")
    at = 3 * first // 4
    assert torch.equal(y[:, first + 16 :].cpu(), outputs[0][:, first + 16 :].cpu())
    assert torch.equal(y[:, :at].cpu(), outputs[0][:, :at].cpu()) and y[:, at:first].isnan().all()
    assert torch.equal(last.isnan().all(-1).cpu(), torch.tensor([True, False, True, False]))
    for name in ("x", "p"):   # of the last sequence
        assert torch.equal(nan_grads[name][:, first + 16 :].cpu(), grads[name][:, first + 16 :].cpu())


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpu"])
def test_wrong_cu_seqlens_give_nan_on_a_gpu(backend):
    x, p, state = torch.randn(1, 20, 5), torch.rand(1, 20), torch.randn(2, 5)
    leaves = [x, p, state]
    with on(backend) as device:
        leaves = [t.to(device).requires_grad_() for t in leaves]
        wrong = torch.tensor([0, 25, 20], device=device)
        kernels = _library.REGISTRY["ema"].active
        y, last, kept = kernels.forward(*leaves, wrong, True, True)
        grads = torch.autograd.grad(y.sum() + last.sum(), leaves)
    for t in (y, last, kept, *grads):
        assert t.isnan().all()


def test_no_gradient_keeps_nothing():
    x, p = torch.randn(1, 40, 8, requires_grad=True), torch.rand(1, 40)
    assert reference.ema(x, p).requires_grad and pyseq.ema(x, p).requires_grad
    with torch.no_grad():
        *_, kept = _library.REGISTRY["ema"].active.forward(x, p, None, None, False, False)
    assert kept.numel() == 0


def test_the_gradient_of_one_output_alone():
    arguments = {"x": torch.randn(2, 21, 5), "p": torch.rand(2, 21), "state": torch.randn(2, 5)}
    for k in (0, 1):
        leaves = [t.clone().requires_grad_() for t in arguments.values()]
        doubles = [t.double().requires_grad_() for t in arguments.values()]
        actual = torch.autograd.grad(pyseq.ema(*leaves[:2], state=leaves[2], return_state=True)[k].sum(), leaves)
        out = reference.ema(*doubles[:2], state=doubles[2], return_state=True)
        for a, e in zip(actual, torch.autograd.grad(out[k].sum(), doubles), strict=True):
            assert_close(a, e, f"of output {k}", "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_with_a_state_of_bfloat16(backend):
    torch.manual_seed(2)
    state, x, p = torch.randn(3, 21).bfloat16(), torch.randn(3, 21), torch.rand(3, 4)[:, 1]
    exact = state.double()
    y_exact = reference.ema_step(exact, x.double(), p.double())
    with on(backend) as device:
        held = state.to(device)
        y = pyseq.ema_step(held, x.to(device), p.to(device))
    assert_close(y, y_exact, "output")
    assert_close(held, exact, "state")


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"x": torch.zeros(2, 8)}, ValueError, r"x has shape \[2, 8\], expected \[B, T, D\]"),
    ({"p": torch.zeros(2, 3)}, ValueError, r"p has shape \[2, 3\], expected \[B, T\] with"),
    ({"p": 0.5}, TypeError, "p is float, expected a tensor"),
    ({"state": torch.zeros(2, 4)}, ValueError, "state has shape"),
    ({"state": torch.zeros(2, 5).bfloat16()}, TypeError, "state has dtype bfloat16, expected float32"),
    ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "cu_seqlens packs sequences into a batch of 1, but B is 2"),
    ({"return_state": 1}, TypeError, "return_state is int"),
])
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=f"^ema: {message}"):
        pyseq.ema(**({"x": torch.zeros(2, 4, 5), "p": torch.zeros(2, 4)} | arguments))
