"""Mamba-2 against the plain recurrence and transformers' layer, and every way to cut a sequence against the whole."""

import inspect
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

import pyseq
from pyseq.models import state as states

KINDS = {
    "plain": {},
    "grouped": {"ngroups": 3},
    "biased": {"bias": True, "conv_bias": False, "d_conv": 3},
    "narrow": {"d_ssm": 24, "ngroups": 3},
    "ungated norm": {"norm_before_gate": True, "ngroups": 2},
    "no norm": {"rmsnorm": False},
    "D per channel": {"D_has_hdim": True},
    "limited": {"dt_limit": (0.02, 0.05)},
    "all": {"d_ssm": 24, "rmsnorm": False, "D_has_hdim": True, "bias": True, "d_conv": 1},
}
by_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind="plain", dtype=None, seed=0, **options):
    torch.manual_seed(seed)
    layer = pyseq.Mamba2(24, d_state=5, headdim=8, dtype=dtype, **KINDS[kind], **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer


def loop(layer, x):
    """The layer of the paper, one token after the other."""
    H, P, G, N, W = layer.nheads, layer.headdim, layer.ngroups, layer.d_state, layer.d_conv
    rest, d, wide = layer.d_inner - H * P, H * P, H * P + 2 * G * N
    z0, x0, z, u, dt = F.linear(x, layer.in_proj.weight, layer.in_proj.bias).split([rest, rest, d, wide, H], -1)
    past = F.pad(u, (0, 0, W - 1, 0))
    u = sum(past[:, k : k + x.shape[1]] * layer.conv1d.weight[:, 0, k] for k in range(W))
    u, B, C = F.silu(u if layer.conv1d.bias is None else u + layer.conv1d.bias).split([d, G * N, G * N], -1)
    B, C = (v.unflatten(-1, (G, N)).repeat_interleave(H // G, 2) for v in (B, C))
    u, dt = u.unflatten(-1, (H, P)), F.softplus(dt + layer.dt_bias).clamp(*layer.dt_limit)
    S, ys = x.new_zeros(x.shape[0], H, P, N), []
    for t in range(x.shape[1]):
        decay = torch.exp(-dt[:, t] * layer.A_log.exp())
        S = decay[..., None, None] * S + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
        ys.append((S @ C[:, t, ..., None])[..., 0])
    y = (torch.stack(ys, 1) + layer.D.view(H, -1) * u).flatten(-2)
    if not layer.rmsnorm:
        y = y * F.silu(z)
    else:
        y = y if layer.norm_before_gate else y * F.silu(z)
        groups = y.unflatten(-1, (G, -1))
        y = layer.norm.weight * (groups / torch.sqrt(groups.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2)
        y = y * F.silu(z) if layer.norm_before_gate else y
    return F.linear(torch.cat([F.silu(z0) * x0, y], -1), layer.out_proj.weight, layer.out_proj.bias)


def close(got, expected, rtol=2e-5):
    scale = expected.abs().max().item()
    assert (got.double() - expected.double()).abs().max().item() <= rtol * scale


def close_states(a, b, rtol=2e-5):
    assert type(a) is type(b)
    for got, want in zip(a, b, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        if want.numel():
            close(got, want, rtol)


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


@by_kind
def test_chunks_and_steps_equal_the_whole(kind):
    layer, x = make(kind), torch.randn(3, 12, 24)
    with torch.no_grad():
        whole, last = layer(x)
        first, state = layer(x[:, :5])
        kept = states.clone(state)
        second, state = layer(x[:, 5:], state)
        close(torch.cat([first, second], 1), whole)
        close_states(state, last)
        state, other = layer.init_state(3), layer.init_state(3)
        stepper = layer.stepper(other)
        for t in range(12):
            y, after = layer.step(x[:, t], state)
            assert after is state
            close(y, whole[:, t])
            assert torch.equal(stepper(x[:, t]), y)
            if t == 4:
                close_states(state, kept)
        close_states(state, last)
        assert torch.equal(state.ssd, other.ssd) and torch.equal(state.conv, other.conv)


def test_steps_take_a_bfloat16_state():
    layer, x = make("grouped"), torch.randn(3, 12, 24)
    with torch.no_grad():
        exact, half, other = (layer.init_state(3, dtype=kind) for kind in (None, torch.bfloat16, torch.bfloat16))
        stepper = layer.stepper(other)
        for t in range(12):
            want, _ = layer.step(x[:, t], exact)
            got, half = layer.step(x[:, t], half)
            close(got, want, 3e-2)
            assert torch.equal(stepper(x[:, t]), got)
    assert half.ssd.dtype == half.conv.dtype == torch.bfloat16
    close(half.ssd, exact.ssd, 3e-2)


def test_float64_steps():
    layer = make(dtype=torch.float64)
    x = torch.randn(2, 4, 24, dtype=torch.float64)
    with torch.no_grad():
        state = layer.init_state(2)
        stepper = layer.stepper(state)
        close(torch.stack([stepper(x[:, t]) for t in range(4)], 1), layer(x)[0], 1e-12)
    assert state.ssd.dtype == torch.float64


def test_sequence_form_leaves_the_state_given_alone():
    layer, x = make(), torch.randn(2, 4, 24)
    state = layer(x)[1]
    before = states.clone(state)
    layer(x, state)
    layer.step(x[:, 0], state)  # grad mode is on
    assert torch.equal(state.ssd, before.ssd) and torch.equal(state.conv, before.conv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_with_grad_mode_on_has_gradients(dtype):
    layer = make(dtype=dtype)
    x = torch.randn(2, 24, dtype=dtype, requires_grad=True)
    y, state = layer.step(x, layer.init_state(2))
    assert torch.autograd.grad(y.sum() + state.ssd.sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_gradient_crosses_the_state(dtype, tolerance):
    layer = make("grouped", dtype=torch.float64)
    x = torch.randn(2, 10, 24, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 10, 24, dtype=torch.float64)
    whole = torch.autograd.grad((layer(x)[0] * weights).sum(), [x, *layer.parameters()])
    layer, x = layer.to(dtype), x.detach().to(dtype).requires_grad_()

    def chunked(carry):
        loss, state = 0.0, None
        for t in range(0, 10, 4):
            y, state = layer(x[:, t : t + 4], state)
            loss = loss + (y * weights[:, t : t + 4]).sum()
            state = carry(state)
        return torch.autograd.grad(loss, [x, *layer.parameters()])

    for got, want in zip(chunked(lambda s: s), whole, strict=True):
        close(got, want, tolerance)
    truncated = chunked(states.detach)
    assert (truncated[0] - whole[0]).abs().max() > 100 * tolerance * whole[0].abs().max()
    close(truncated[0][:, 8:], whole[0][:, 8:], tolerance)  # nothing after the last chunk to be cut off


@by_kind
def test_packed_equals_separate(kind):
    layer = make(kind)
    lengths = [4, 0, 1, 7]
    pieces = [torch.randn(1, n, 24) for n in lengths]
    with torch.no_grad():
        start = layer(torch.randn(4, 3, 24))[1]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        y, state = layer(torch.cat(pieces, 1), start, cu_seqlens=cu_seqlens)
        for s, (piece, got) in enumerate(zip(pieces, y.split(lengths, 1), strict=True)):
            want, after = layer(piece, states.select(start, [s]))
            if piece.shape[1]:
                close(got, want)
            close_states(states.select(state, [s]), after)


def test_empty_sequence():
    layer = make()
    y, state = layer(torch.empty(2, 0, 24))
    assert y.shape == (2, 0, 24) and not state.ssd.any() and state.conv.shape == (2, 58, 3)


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


def test_names_shapes_and_flags():
    layer = pyseq.Mamba2(64)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "dt_bias": (2,),
        "A_log": (2,),
        "D": (2,),
        "in_proj.weight": (2 * 128 + 2 * 128 + 2, 64),
        "conv1d.weight": (384, 1, 4),
        "conv1d.bias": (384,),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }
    assert set(layer.state_dict()) == set(shapes)
    exact = (layer.A_log, layer.D, layer.dt_bias, layer.norm.weight)
    assert all(p._no_weight_decay for p in exact) and layer.dt_bias._no_reinit
    wide = pyseq.Mamba2(64, d_ssm=64, ngroups=1, D_has_hdim=True, rmsnorm=False, bias=True)
    assert wide.in_proj.weight.shape == (256 + 256 + 1, 64) and wide.D.shape == (64,) and wide.A_log.shape == (1,)
    assert "norm.weight" not in wide.state_dict() and wide.out_proj.weight.shape == (64, 128)


def test_the_arguments_are_those_of_mamba_ssm():
    names = list(inspect.signature(pyseq.Mamba2).parameters)
    assert names == [
        "d_model", "d_state", "d_conv", "conv_init", "expand", "headdim", "d_ssm", "ngroups", "A_init_range",
        "D_has_hdim", "rmsnorm", "norm_before_gate", "dt_min", "dt_max", "dt_init_floor", "dt_limit", "bias",
        "conv_bias", "chunk_size", "use_mem_eff_path", "layer_idx", "process_group", "sequence_parallel", "device",
        "dtype", "d_inner", "norm_eps",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="process_group"):
        pyseq.Mamba2(64, process_group=object())
    torch.manual_seed(0)
    x, first = torch.randn(1, 9, 64), pyseq.Mamba2(64)
    other = pyseq.Mamba2(64, chunk_size=64, use_mem_eff_path=False, sequence_parallel=False)
    other.load_state_dict(first.state_dict())
    assert torch.equal(first(x)[0], other(x)[0])


def test_initial_values():
    torch.manual_seed(1)
    layer = pyseq.Mamba2(512, headdim=4, dt_min=0.01, dt_max=0.2, A_init_range=(2, 5), conv_init=0.25)
    dt, A = F.softplus(layer.dt_bias), -layer.A()
    assert dt.min() >= 0.01 * 0.999 and dt.max() <= 0.2 * 1.001
    assert A.min() >= 2 * 0.999 and A.max() <= 5 * 1.001 and A.std() > 0.5
    assert (layer.D == 1).all() and (layer.norm.weight == 1).all()
    assert 0.24 < layer.conv1d.weight.abs().max() <= 0.25
    floor = pyseq.Mamba2(512, headdim=4, dt_init_floor=0.05)
    assert F.softplus(floor.dt_bias).min() >= 0.05 * 0.999
    torch.testing.assert_close(-pyseq.Mamba2(64, A_init_range=(3, 3)).A(), torch.full((2,), 3.0))


def test_state_is_a_pytree():
    state = pyseq.Mamba2(64, d_state=16, ngroups=2).init_state(3)
    leaves, structure = torch.utils._pytree.tree_flatten(state)
    assert [tuple(t.shape) for t in leaves] == [(3, 192, 3), (3, 2, 64, 16)]
    assert type(torch.utils._pytree.tree_unflatten(leaves, structure)) is type(state)


@pytest.mark.parametrize("shape", [(2, 24), (2, 3, 25), (2, 3, 1, 24)])
def test_wrong_input_names_it(shape):
    with pytest.raises(ValueError, match="x must be"):
        make()(torch.randn(shape))


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(
    st.fixed_dictionaries(
        {},
        optional={
            "d_state": st.integers(-2, 3) | st.floats(),
            "d_conv": st.integers(-2, 3),
            "expand": st.sampled_from([0, -1, 0.001, 1, 1.5]),
            "headdim": st.sampled_from([-1, 0, 1, 2, 3, 4, "4", True]),
            "d_ssm": st.sampled_from([None, 0, 3, 4, 8, 17]),
            "ngroups": st.sampled_from([-1, 0, 1, 2, 3]),
            "A_init_range": st.sampled_from([(1, 16), [1, 1], (0, 1), (2, 1), (1,), 3, (1, math.inf), ("a", "b")]),
            "dt_limit": st.sampled_from([(0.0, math.inf), [0.1, 0.1], (-1, 1), (1, 0), (0,), None, (math.nan, 1)]),
            "dt_min": st.floats(-1, 1),
            "dt_max": st.floats(-1, 1),
            "conv_init": st.sampled_from([None, 0.5, -1.0, math.nan]),
            "norm_before_gate": st.sampled_from([False, True, None, 1]),
            "norm_eps": st.sampled_from([0.0, -1.0, 1e-6, math.nan, math.inf]),
        },
    )
)
def test_constructor_works_or_names_the_argument(options):
    try:
        layer = pyseq.Mamba2(8, **{"headdim": 4, "d_state": 3, **options})
    except ValueError as error:
        assert any(name in str(error) for name in [*options, "d_inner"])
    else:
        assert torch.isfinite(layer(torch.randn(1, 3, 8))[0]).all()
