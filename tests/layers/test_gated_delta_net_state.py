"""Every way to cut a sequence of a delta-rule layer against the whole, and the state that it leaves."""

import pytest
import torch
from delta_layers import WIDTH, by_kind, close, close_states, make

from pyseq.models import state as states


@by_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_and_steps_equal_the_whole(kind, dtype):
    layer, x = make(kind, dtype=dtype), torch.randn(3, 12, WIDTH, dtype=dtype)
    with torch.no_grad():
        whole, last = layer(x)
        first, state = layer(x[:, :5])
        kept = states.clone(state)
        second, end = layer(x[:, 5:], tuple(state))  # as a file gives it back
        close_states(state, kept, 0.0)  # not changed
        close(torch.cat([first, second], 1), whole)
        close_states(end, last)
        state = layer.init_state(3)
        for t in range(12):
            y, after = layer.step(x[:, t], state)
            assert after is state
            close(y, whole[:, t])
            if t == 4:
                close_states(state, kept)
        close_states(state, last)


@by_kind
def test_packed_equals_separate(kind):
    layer = make(kind)
    lengths = [4, 0, 1, 7]
    pieces = [torch.randn(1, n, WIDTH) for n in lengths]
    with torch.no_grad():
        start = layer(torch.randn(4, 3, WIDTH))[1]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        y, state = layer(torch.cat(pieces, 1), start, cu_seqlens=cu_seqlens)
        for s, (piece, got) in enumerate(zip(pieces, y.split(lengths, 1), strict=True)):
            want, after = layer(piece, states.select(start, [s]))
            if piece.shape[1]:
                close(got, want)
            close_states(states.select(state, [s]), after)


@by_kind
def test_gradient_crosses_the_state(kind):
    layer = make(kind, dtype=torch.float64)
    x = torch.randn(2, 10, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 10, WIDTH, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    whole = torch.autograd.grad((layer(x)[0] * weights).sum(), inputs)
    loss, state = 0.0, layer.init_state(2)
    for t in range(10):
        y, state = layer.step(x[:, t], state) if t % 3 == 0 else layer(x[:, t : t + 1], state)
        loss = loss + (y.view(2, WIDTH) * weights[:, t]).sum()
    for got, want in zip(torch.autograd.grad(loss, inputs), whole, strict=True):
        close(got, want, 1e-10)


def test_steps_take_a_bfloat16_state():
    layer, x = make("shared keys"), torch.randn(3, 12, WIDTH)
    with torch.no_grad():
        exact, half = layer.init_state(3), layer.init_state(3, dtype=torch.bfloat16)
        for t in range(12):
            want, _ = layer.step(x[:, t], exact)
            got, half = layer.step(x[:, t], half)
            close(got, want, 5e-2)
    assert {t.dtype for t in half} == {torch.bfloat16}


def test_state_is_a_pytree_and_an_empty_sequence_leaves_zeros():
    state = make("shared keys").init_state(3)
    leaves, structure = torch.utils._pytree.tree_flatten(state)
    assert [tuple(t.shape) for t in leaves] == [(3, 16, 3), (3, 16, 3), (3, 32, 3), (3, 4, 8, 8)]
    assert type(torch.utils._pytree.tree_unflatten(leaves, structure)) is type(state)
    y, state = make("kimi")(torch.empty(2, 0, WIDTH))
    assert y.shape == (2, 0, WIDTH) and not any(t.any() for t in state)
