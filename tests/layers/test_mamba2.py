"""The Mamba-2 layer's numbers: against the plain recurrence, transformers' layer, and in every type."""

import math

import pytest
import torch
from mamba2_layers import by_kind, close, loop, make

import pyseq
from pyseq import testing
from pyseq._library import REGISTRY


@by_kind
def test_matches_the_recurrence_in_float64(kind):
    layer = make(kind, dtype=torch.float64)
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    y, state = layer(x)
    expected = loop(layer, x)
    close(y, expected, 1e-12)
    assert state.ssd.dtype == state.conv.dtype == torch.float64
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
    layer, x = make(kind), torch.randn(2, 33, 24)
    exact = make(kind, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    x.requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, expected = layer(x)[0], loop(exact, x64)
    assert y.dtype == torch.float32
    close(y, expected)
    weights = torch.randn_like(y)
    ours = torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])
    theirs = torch.autograd.grad((expected * weights.double()).sum(), [x64, *exact.parameters()])
    for got, want in zip(ours, theirs, strict=True):
        close(got, want, 1e-4)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("options", [{}, {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3}])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.02, 0.05)])
def test_equals_the_layer_of_transformers(groups, options, limit):
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_heads": 6, "head_dim": 8, "state_size": 5, "num_hidden_layers": 1}
    mixer = Mamba2Mixer(Mamba2Config(**sizes, n_groups=groups, time_step_limit=limit, chunk_size=16, **options), 0)
    layer = pyseq.Mamba2(
        24, d_state=5, headdim=8, ngroups=groups, dt_limit=limit, d_conv=options.get("conv_kernel", 4),
        bias="use_bias" in options, conv_bias="use_conv_bias" not in options,
    )  # fmt: skip
    layer.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 37, 24)
    with torch.no_grad():
        close(layer(x)[0], mixer.eval()(x), 1e-5)


def test_slices_of_the_projection_are_not_copied(monkeypatch):
    """The ops get views of what the projection and the convolution made: their last axis is contiguous."""
    from pyseq.layers import mamba2

    seen = []

    def watch(op):
        def call(*tensors, **options):
            seen.extend(t for t in tensors if isinstance(t, torch.Tensor))
            return op(*tensors, **options)

        return call

    for name in ("causal_conv1d", "ssd", "causal_conv1d_step", "ssd_step"):
        monkeypatch.setattr(mamba2, name, watch(getattr(mamba2, name)))
    with torch.no_grad():
        for kind in ("grouped", "no norm"):
            layer = make(kind)
            layer.step(torch.randn(2, 24), layer(torch.randn(2, 6, 24))[1])
    assert len(seen) > 30
    assert all(t.stride(-1) == 1 for t in seen)


def test_half_types_keep_what_needs_digits():
    for layer in (make(dtype=torch.bfloat16), make().to(torch.bfloat16), make().half().bfloat16()):
        assert layer.in_proj.weight.dtype == layer.conv1d.weight.dtype == torch.bfloat16
        exact = (layer.A_log, layer.D, layer.dt_bias, layer.norm.weight)
        assert {p.dtype for p in exact} == {torch.float32}
        y, state = layer(torch.randn(2, 6, 24, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16 and state.ssd.dtype == state.conv.dtype == torch.float32
    layer = make()
    A_log = layer.A_log.clone()
    layer.A_log.grad = torch.ones_like(layer.A_log)
    layer.to(torch.bfloat16)
    assert torch.equal(layer.A_log, A_log) and layer.A_log.grad.dtype == torch.float32
    assert make().double().A_log.dtype == make().double().norm.weight.dtype == torch.float64


@by_kind
def test_bfloat16_rounds_and_no_more(kind):
    layer, x = make(kind), torch.randn(2, 40, 24)
    half, x16 = make(kind).to(torch.bfloat16), x.bfloat16()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(p.bfloat16())
        close(half(x16)[0], layer(x16.float())[0], 4e-2)  # six roundings to 8 bits between x and y


def test_autocast_projects_in_bfloat16_and_keeps_float32_state():
    layer, x = make("narrow"), torch.randn(2, 16, 24)
    expected = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and state.ssd.dtype == torch.float32
    assert layer.A_log.grad.dtype == torch.float32 and layer.in_proj.weight.grad.dtype == torch.float32
    close(y, expected, 4e-2)


@pytest.mark.parametrize("backend", [b for b in testing.backends(REGISTRY["ssd"]) if b == "simt"])
@pytest.mark.parametrize("kind", ["grouped", "ungated norm", "all"])
def test_on_the_emulator(kind, backend):
    """Sequence and gradient by the CUDA kernels of convolution, recurrence and norm."""
    layer, x = make(kind), torch.randn(2, 20, 24)
    exact = make(kind, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    x.requires_grad_()
    x64 = x.detach().double().requires_grad_()
    expected, weights = loop(exact, x64), torch.randn(2, 20, 24)
    with testing.on(backend):
        y, state = layer(x)
        ours = torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])
        with torch.no_grad():
            stepped, _ = layer.step(x[:, 0], layer.init_state(2))
    close(y, expected)
    close(stepped, expected[:, 0])
    close(state.ssd, exact(x64)[1].ssd)
    theirs = torch.autograd.grad((expected * weights.double()).sum(), [x64, *exact.parameters()])
    for got, want in zip(ours, theirs, strict=True):
        close(got, want, 1e-4)
