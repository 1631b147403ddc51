"""The numbers of the delta-rule layers: against the loop over tokens, and in every type."""

import pytest
import torch
from delta_layers import WIDTH, by_kind, close, loop, make

from pyseq import testing
from pyseq._library import REGISTRY


@by_kind
def test_matches_the_recurrence_in_float64(kind):
    layer = make(kind, dtype=torch.float64)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    y, state = layer(x)
    expected = loop(layer, x)
    close(y, expected, 1e-12)
    assert {t.dtype for t in state} == {torch.float64}
    inputs = [x, *layer.parameters()]
    weights = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad((y * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        close(got, want, 1e-10)


@by_kind
def test_float32_matches_float64(kind):
    layer, x = make(kind), torch.randn(2, 40, WIDTH, requires_grad=True)
    exact = make(kind, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    x64 = x.detach().double().requires_grad_()
    y, expected = layer(x)[0], loop(exact, x64)
    assert y.dtype == torch.float32
    close(y, expected, 5e-5)
    weights = torch.randn_like(y)
    ours = torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])
    theirs = torch.autograd.grad((expected * weights.double()).sum(), [x64, *exact.parameters()])
    for got, want in zip(ours, theirs, strict=True):
        close(got, want, 2e-4)


@by_kind
def test_half_types_keep_what_needs_digits(kind):
    for layer in (make(kind, dtype=torch.bfloat16), make(kind).to(torch.bfloat16), make(kind).half().bfloat16()):
        assert layer.q_proj.weight.dtype == torch.bfloat16
        assert {p.dtype for p in (layer.A_log, layer.dt_bias, layer.o_norm.weight)} == {torch.float32}
        x = torch.randn(2, 6, WIDTH, dtype=torch.bfloat16)
        with torch.no_grad():
            y, state = layer(x)
            assert layer.decay(x).dtype == layer._beta(x).dtype == torch.float32
        assert y.dtype == torch.bfloat16 and {t.dtype for t in state} == {torch.float32}
    assert make(kind).double().A_log.dtype == torch.float64


@by_kind
def test_bfloat16_rounds_and_no_more(kind):
    layer, x = make(kind), torch.randn(2, 40, WIDTH)
    half, x16 = make(kind).to(torch.bfloat16), x.bfloat16()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(p.bfloat16())
        for p in half.parameters():
            p.copy_(p.bfloat16())
        close(half(x16)[0], layer(x16.float())[0], 5e-2)  # eight roundings to 8 bits between x and y


def test_negative_eigenvalues_are_there_only_if_asked_for():
    x = 10 * torch.randn(4, 50, WIDTH)
    assert 1.9 < make("negative")._beta(x).max() <= 2 and make("plain")._beta(x).max() <= 1
    assert make("kimi bounded").decay(x).min() >= -5 and make("kimi").decay(x).max() <= 0


@pytest.mark.parametrize("backend", [b for b in testing.backends(REGISTRY["gated_delta_rule"]) if b == "simt"])
@pytest.mark.parametrize("kind", ["shared keys", "kimi negative"])
def test_on_the_emulator(kind, backend):
    """Sequence and gradient by the CUDA kernels of convolution, recurrence and norm."""
    layer, x = make(kind), torch.randn(2, 20, WIDTH, requires_grad=True)
    exact = make(kind, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    x64 = x.detach().double().requires_grad_()
    expected, weights = loop(exact, x64), torch.randn(2, 20, WIDTH)
    with testing.on(backend):
        y, _ = layer(x)
        ours = torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])
        with torch.no_grad():
            stepped, _ = layer.step(x[:, 0], layer.init_state(2))
    close(y, expected, 5e-5)
    close(stepped, expected[:, 0], 5e-5)
    theirs = torch.autograd.grad((expected * weights.double()).sum(), [x64, *exact.parameters()])
    for got, want in zip(ours, theirs, strict=True):
        close(got, want, 2e-4)
