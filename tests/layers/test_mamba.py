"""Mamba and FalconMamba against the plain recurrence, and every way to cut a sequence against the whole of it."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

import pyseq
from pyseq.models import state as states

KINDS = {"mamba": {}, "falcon": {"mixer_rms_eps": 1e-6}, "biased": {"bias": True, "conv_bias": False, "d_conv": 3}}


def make(kind="mamba", dtype=None, seed=0, **options):
    torch.manual_seed(seed)
    layer = pyseq.Mamba(24, d_state=5, dt_rank=3, dtype=dtype, **KINDS[kind], **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer


def loop(layer, x):
    """The layer of the paper, one token after the other."""
    N, R, W = layer.d_state, layer.dt_rank, layer.d_conv
    A = -torch.exp(layer.A_log)
    u, z = F.linear(x, layer.in_proj.weight, layer.in_proj.bias).chunk(2, dim=-1)
    past = F.pad(u, (0, 0, W - 1, 0))
    u = sum(past[:, k : k + x.shape[1]] * layer.conv1d.weight[:, 0, k] for k in range(W))
    u = F.silu(u if layer.conv1d.bias is None else u + layer.conv1d.bias)
    parts = F.linear(u, layer.x_proj.weight).split([R, N, N], dim=-1)
    if layer.mixer_rms_eps is not None:
        parts = [v / torch.sqrt(v.square().mean(-1, keepdim=True) + layer.mixer_rms_eps) for v in parts]
    dt, B, C = parts
    dt = F.softplus(F.linear(dt, layer.dt_proj.weight, layer.dt_proj.bias))
    h, ys = x.new_zeros(x.shape[0], layer.d_inner, N), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[:, :, None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    y = (torch.stack(ys, 1) + layer.D * u) * F.silu(z)
    return F.linear(y, layer.out_proj.weight, layer.out_proj.bias)


def close(got, expected, rtol=2e-5):
    scale = expected.abs().max().item()
    assert (got.double() - expected.double()).abs().max().item() <= rtol * scale


def same(a, b):
    return torch.equal(a.conv, b.conv) and torch.equal(a.scan, b.scan)


@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_recurrence_in_float64(kind):
    layer = make(kind, dtype=torch.float64)
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    y, state = layer(x)
    expected = loop(layer, x)
    close(y, expected, 1e-12)
    assert state.scan.dtype == state.conv.dtype == torch.float64
    inputs = [x, *layer.parameters()]
    weights = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad((y * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        close(got, want, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_steps_equal_the_whole_bit_for_bit(kind):
    layer, x = make(kind), torch.randn(3, 12, 24)
    with torch.no_grad():
        whole, last = layer(x)
        first, state = layer(x[:, :5])
        kept = states.clone(state)
        second, state = layer(x[:, 5:], state)
        assert torch.equal(torch.cat([first, second], 1), whole)
        assert same(state, last)
        state, other = layer.init_state(3), layer.init_state(3)
        stepper = layer.stepper(other)
        for t in range(12):
            y, after = layer.step(x[:, t], state)
            assert after is state
            assert torch.equal(y, whole[:, t]) and torch.equal(stepper(x[:, t]), y)
            if t == 4:
                assert same(state, kept)
        assert same(state, last) and same(other, last)


def test_sequence_form_leaves_the_state_given_alone():
    layer, x = make(), torch.randn(2, 4, 24)
    state = layer(x)[1]
    before = states.clone(state)
    layer(x, state)
    layer.step(x[:, 0], state)  # grad mode is on
    assert same(state, before)


def test_step_with_grad_mode_on_has_gradients():
    layer = make()
    x = torch.randn(2, 24, requires_grad=True)
    y, state = layer.step(x, layer.init_state(2))
    assert torch.autograd.grad(y.sum() + state.scan.sum(), x)[0].abs().sum() > 0


def test_gradient_crosses_the_state():
    layer = make(dtype=torch.float64)
    x = torch.randn(2, 10, 24, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 10, 24, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    whole = torch.autograd.grad((layer(x)[0] * weights).sum(), inputs)

    def chunked(carry):
        loss, state = 0.0, None
        for t in range(0, 10, 4):
            y, state = layer(x[:, t : t + 4], state)
            loss = loss + (y * weights[:, t : t + 4]).sum()
            state = carry(state)
        return torch.autograd.grad(loss, inputs)

    for got, want in zip(chunked(lambda s: s), whole, strict=True):
        close(got, want, 1e-10)
    truncated = chunked(states.detach)
    assert not torch.allclose(truncated[0], whole[0])
    close(truncated[0][:, 8:], whole[0][:, 8:], 1e-10)  # nothing after the last chunk to be cut off


def test_packed_equals_separate_bit_for_bit():
    layer = make()
    lengths = [4, 0, 1, 7]
    pieces = [torch.randn(1, n, 24) for n in lengths]
    start = layer(torch.randn(4, 3, 24))[1]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    y, state = layer(torch.cat(pieces, 1), start, cu_seqlens=cu_seqlens)
    for s, (piece, got) in enumerate(zip(pieces, y.split(lengths, 1), strict=True)):
        want, after = layer(piece, states.select(start, [s]))
        assert torch.equal(got, want) and same(states.select(state, [s]), after)


def test_empty_sequence():
    layer = make()
    y, state = layer(torch.empty(2, 0, 24))
    assert y.shape == (2, 0, 24) and not state.scan.any()


def test_half_types_keep_what_needs_digits():
    for layer in (make(dtype=torch.bfloat16), make().to(torch.bfloat16), make().half().bfloat16()):
        assert layer.in_proj.weight.dtype == torch.bfloat16
        assert layer.A_log.dtype == layer.D.dtype == layer.dt_proj.bias.dtype == torch.float32
        y, state = layer(torch.randn(2, 6, 24, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16 and state.scan.dtype == torch.float32
    layer = make()
    A_log = layer.A_log.clone()
    layer.A_log.grad = torch.ones_like(layer.A_log)
    layer.to(torch.bfloat16)
    assert torch.equal(layer.A_log, A_log) and layer.A_log.grad.dtype == torch.float32
    assert make().double().A_log.dtype == torch.float64


def test_autocast_projects_in_bfloat16_and_keeps_float32_state():
    layer, x = make(), torch.randn(2, 16, 24)
    expected = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and state.scan.dtype == torch.float32
    assert layer.A_log.grad.dtype == torch.float32 and layer.in_proj.weight.grad.dtype == torch.float32
    close(y, expected, 4e-2)  # four roundings to 8 bits between x and y


def test_names_shapes_and_flags():
    layer = pyseq.Mamba(32)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "A_log": (64, 16),
        "D": (64,),
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (34, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "out_proj.weight": (32, 64),
    }
    assert set(layer.state_dict()) == set(shapes)
    assert layer.A_log._no_weight_decay and layer.D._no_weight_decay and layer.dt_proj.bias._no_reinit


def test_initial_values():
    torch.manual_seed(1)
    layer = pyseq.Mamba(64, dt_min=0.01, dt_max=0.2)
    dt = F.softplus(layer.dt_proj.bias)
    assert dt.min() >= 0.01 * 0.999 and dt.max() <= 0.2 * 1.001
    assert torch.equal(layer.A_log[3], torch.log(torch.arange(1.0, 17.0))) and (layer.D == 1).all()
    assert layer.dt_proj.weight.abs().max() <= 4**-0.5
    constant = pyseq.Mamba(64, dt_init="constant", dt_scale=2.0)
    assert (constant.dt_proj.weight == 2 * 4**-0.5).all()


def test_state_is_a_pytree():
    state = pyseq.Mamba(32).init_state(3)
    leaves, structure = torch.utils._pytree.tree_flatten(state)
    assert [tuple(t.shape) for t in leaves] == [(3, 64, 3), (3, 64, 16)]
    assert type(torch.utils._pytree.tree_unflatten(leaves, structure)) is type(state)


@pytest.mark.parametrize("shape", [(2, 24), (2, 3, 25), (2, 3, 1, 24)])
def test_wrong_input_names_it(shape):
    with pytest.raises(ValueError, match="x must be"):
        make()(torch.randn(shape))


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    st.fixed_dictionaries(
        {},
        optional={
            "d_state": st.integers(-2, 3) | st.floats(),
            "d_conv": st.integers(-2, 3),
            "expand": st.sampled_from([0, -1, 0.001, 1, 1.5, "2", True, math.nan, math.inf]),
            "dt_rank": st.sampled_from(["auto", "", "all", 0, -1, 2]),
            "dt_min": st.floats(-1, 1),
            "dt_max": st.floats(-1, 1) | st.sampled_from([math.inf, math.nan, 1e300, "1"]),
            "dt_init_floor": st.sampled_from([0, 1e-4, -1, math.nan, math.inf, None]),
            "dt_init": st.sampled_from(["random", "constant", "zeros"]),
            "mixer_rms_eps": st.sampled_from([None, 0.0, -1.0, 1e-6, float("nan"), float("inf")]),
        },
    )
)
def test_constructor_works_or_names_the_argument(options):
    try:
        layer = pyseq.Mamba(8, **options)
    except ValueError as error:
        assert any(name in str(error) for name in [*options, "d_inner"])
    else:
        assert torch.isfinite(layer.dt_proj.bias).all() and torch.isfinite(layer(torch.randn(1, 3, 8))[0]).all()
