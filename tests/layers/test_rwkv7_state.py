"""Every way to cut a sequence of an RWKV-7 layer against the whole, and the state that it leaves."""

import pytest
import torch
from rwkv7_layers import HEAD, WIDTH, by_kind, close, close_states, make

import pyseq
from pyseq.models import state as states


def values(kind, *shape):
    return None if kind == "first" else torch.randn(*shape, WIDTH)


@by_kind
def test_chunks_and_steps_equal_the_whole(kind):
    layer, x, v_first = make(kind), torch.randn(3, 12, WIDTH), values(kind, 3, 12)

    def at(t):
        return None if v_first is None else v_first[:, t]

    with torch.no_grad():
        whole, last = layer(x, v_first=v_first)
        first, state = layer(x[:, :5], v_first=at(slice(5)))
        kept = states.clone(state)
        second, state = layer(x[:, 5:], state, v_first=at(slice(5, None)))
        close(torch.cat([first, second], 1), whole)
        close_states(state, last)
        state = layer.init_state(3)
        for t in range(12):
            y, after = layer.step(x[:, t], state, v_first=at(t))
            assert after is state
            close(y, whole[:, t])
            if t == 4:
                close_states(state, kept)
        close_states(state, last)


def test_steps_take_a_bfloat16_state():
    layer, x = make(), torch.randn(3, 12, WIDTH)
    with torch.no_grad():
        exact, half = layer.init_state(3), layer.init_state(3, dtype=torch.bfloat16)
        for t in range(12):
            want, _ = layer.step(x[:, t], exact)
            got, half = layer.step(x[:, t], half)
            close(got, want, 5e-2)
    assert all(s.dtype == torch.bfloat16 for s in half)


def test_sequence_form_leaves_the_state_given_alone():
    layer, x = make(), torch.randn(2, 4, WIDTH)
    state = layer(x)[1]
    before = states.clone(state)
    layer(x, state)
    layer.step(x[:, 0], state)  # grad mode is on
    assert all(map(torch.equal, state, before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_with_grad_mode_on_has_gradients(dtype):
    layer = make(dtype=dtype)
    x = torch.randn(2, WIDTH, dtype=dtype, requires_grad=True)
    y, state, v_first = layer.step(x, layer.init_state(2), return_v_first=True)
    assert v_first.shape == x.shape
    assert torch.autograd.grad(y.sum() + state.wkv.sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 5e-4)])
def test_gradient_crosses_the_state(dtype, tolerance):
    layer = make("first", dtype=torch.float64)
    x = torch.randn(2, 10, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 10, WIDTH, dtype=torch.float64)
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
    assert (truncated[0] - whole[0]).abs().max() > 10 * tolerance * whole[0].abs().max()
    close(truncated[0][:, 8:], whole[0][:, 8:], tolerance)  # nothing after the last chunk to be cut off


@by_kind
@pytest.mark.parametrize("lengths", [[4, 0, 1, 7], [0, 0, 12], [12], [3, 0]])
def test_packed_equals_separate(kind, lengths):
    layer, n = make(kind), len(lengths)
    pieces = [torch.randn(1, length, WIDTH) for length in lengths]
    v_first = values(kind, 1, sum(lengths))
    given = [None] * n if v_first is None else v_first.split(lengths, 1)
    with torch.no_grad():
        for start in (None, layer(torch.randn(n, 3, WIDTH))[1]):
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
            y, state = layer(torch.cat(pieces, 1), start, cu_seqlens=cu_seqlens, v_first=v_first)
            for s, (piece, got) in enumerate(zip(pieces, y.split(lengths, 1), strict=True)):
                want, after = layer(piece, start and states.select(start, [s]), v_first=given[s])
                if piece.shape[1]:
                    close(got, want)
                close_states(states.select(state, [s]), after)


def test_gradients_do_not_cross_a_boundary():
    layer = make(dtype=torch.float64)
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    start = [s.requires_grad_() for s in layer.init_state(3)]
    packed = layer(x, pyseq.layers.RWKV7State(*start), cu_seqlens=torch.tensor([0, 4, 4, 9]))[0]
    dx, *dstart = torch.autograd.grad(packed[:, 4:].sum(), [x, *start])
    assert not dx[:, :4].any() and dx[:, 4:].any()
    for d in dstart:
        assert not d[:2].any() and d[2].any()


def test_empty_sequence():
    layer = make()
    y, state = layer(torch.empty(2, 0, WIDTH))
    assert y.shape == (2, 0, WIDTH) and not any(s.any() for s in state) and state.wkv.shape == (2, 3, HEAD, HEAD)
    start = layer(torch.randn(2, 3, WIDTH))[1]
    after = layer(torch.empty(2, 0, WIDTH), start)[1]
    for got, want in zip(after, start, strict=True):
        assert torch.equal(got, want) and got.data_ptr() != want.data_ptr()


def test_state_is_a_pytree():
    state = pyseq.RWKV7(128).init_state(3)
    leaves, structure = torch.utils._pytree.tree_flatten(state)
    assert [tuple(t.shape) for t in leaves] == [(3, 128), (3, 2, 64, 64), (3, 128)]
    assert type(torch.utils._pytree.tree_unflatten(leaves, structure)) is type(state)


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 4, 6])])
def test_compiles_into_one_graph(cu_seqlens):
    layer = make()
    x = torch.randn(1, 6, WIDTH)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(compiled(x, cu_seqlens=cu_seqlens)[0], layer(x, cu_seqlens=cu_seqlens)[0], 1e-6)
