"""Every way to cut a sequence of a Mamba-2 layer against the whole, and the state that it leaves."""

import pytest
import torch
from mamba2_layers import by_kind, close, close_states, make

import pyseq
from pyseq import testing
from pyseq._library import REGISTRY
from pyseq.models import state as states


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


@pytest.mark.parametrize("backend", [b for b in testing.backends(REGISTRY["mamba2_step"]) if b == "simt"])
@by_kind
def test_a_step_on_the_emulator_is_the_step(kind, backend):
    """There all between the projections is one op: step and stepper, in place, beside the ops one by one."""
    layer, x = make(kind), torch.randn(3, 2, 24)
    with torch.inference_mode():
        _, start = layer(torch.randn(2, 6, 24))
        plain, stepped, looped = (type(start)(*(t.clone() for t in start)) for _ in range(3))
        for token in x:
            want, _ = layer.step(token, plain)
            with testing.on(backend):
                got, same = layer.step(token, stepped)
                assert same is stepped and torch.equal(got, layer.stepper(looped)(token))
            testing.assert_close(got, want.double(), "y", "gradient")   # as many roundings as a gradient's
    for a, b, c in zip(plain, stepped, looped, strict=True):
        testing.assert_close(b, a.double(), "state", "gradient")
        assert torch.equal(b, c)


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


def test_state_is_a_pytree():
    state = pyseq.Mamba2(64, d_state=16, ngroups=2).init_state(3)
    leaves, structure = torch.utils._pytree.tree_flatten(state)
    assert [tuple(t.shape) for t in leaves] == [(3, 192, 3), (3, 2, 64, 16)]
    assert type(torch.utils._pytree.tree_unflatten(leaves, structure)) is type(state)
