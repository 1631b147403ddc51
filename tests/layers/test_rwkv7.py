"""An RWKV-7 layer against its equations token by token, its gradients, its beginning, and what it refuses."""

import copy
import math
import pickle

import pytest
import torch
from rwkv7_layers import HEAD, WIDTH, authors, by_kind, close, make
from rwkv7_loop import block, zeros

import pyseq


@by_kind
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_the_equations(kind, dtype, rtol):
    layer, x = make(kind, dtype), torch.randn(2, 7, WIDTH, dtype=dtype)
    given = None if kind == "first" else torch.randn(2, 7, WIDTH, dtype=dtype)
    with torch.no_grad():
        y, state, v_first = layer(x, v_first=given, return_v_first=True)
        z = {name: p.double() for name, p in authors(layer).items()}
        for row in range(2):
            past = zeros(z, HEAD)
            for t in range(7):
                value = None if given is None else given[row, t].double()
                out, past, value = block(z, "blocks.0.", x[row, t].double(), past, value, layer.iclr_scale, HEAD)
                close(y[row, t], out, rtol)
                close(v_first[row, t], value, rtol)
            close(state.time[row], past[0], rtol)
            close(state.wkv[row].mT, past[1], rtol)
            close(state.channel[row], past[2], rtol)


def test_without_v_first_the_values_stay():
    layer, x = make(dtype=torch.float64), torch.randn(1, 5, WIDTH, dtype=torch.float64)
    y, _, v_first = layer(x, return_v_first=True)
    close(layer(x, v_first=v_first)[0], y, 1e-12)
    assert (layer(x, v_first=v_first + 1)[0] - y).abs().max() > 1e-3


def test_gradients_reach_everything():
    first, layer = make("first", torch.float64), make(dtype=torch.float64, seed=1)
    x = torch.randn(2, 6, WIDTH, dtype=torch.float64, requires_grad=True)
    h, _, v_first = first(x, return_v_first=True)
    y, state = layer(h, v_first=v_first)
    loss = y.square().sum() + sum(s.square().sum() for s in state)
    for name, p in [("x", x), *first.named_parameters(), *layer.named_parameters()]:
        assert torch.autograd.grad(loss, p, retain_graph=True)[0].abs().sum() > 0, name


def test_gradients_are_derivatives():
    layer = make(dtype=torch.float64)
    x, v_first = (torch.randn(1, 3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))
    state = layer(torch.randn(1, 2, WIDTH, dtype=torch.float64))[1]
    state = [s.detach().requires_grad_() for s in state]

    def run(x, v_first, *state):
        y, after = layer(x, pyseq.layers.RWKV7State(*state), v_first=v_first)
        return (y, *after)

    assert torch.autograd.gradcheck(run, (x, v_first, *state), fast_mode=True)


def test_float32_gradients_are_those_of_float64():
    exact = make(dtype=torch.float64)
    layer, x = copy.deepcopy(exact).float(), torch.randn(2, 40, WIDTH)

    def gradients(layer, x):
        x = x.requires_grad_()
        y, state, v_first = layer(x, return_v_first=True)
        loss = y.square().sum() + v_first.sum() + state.wkv.square().sum()
        used = [p for name, p in layer.named_parameters() if not name.startswith(("att.v0", "att.v1", "att.v2"))]
        return torch.autograd.grad(loss, [x, *used])

    for got, want in zip(gradients(layer, x), gradients(exact, x.detach().double()), strict=True):
        close(got, want, 2e-4)


@pytest.mark.parametrize("dtype, rtol", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_types(dtype, rtol):
    layer = make()
    half = copy.deepcopy(layer).to(dtype)
    x = torch.randn(2, 20, WIDTH)
    with torch.no_grad():
        y, state = half(x)
        assert y.dtype == torch.float32 and all(s.dtype == torch.float32 for s in state)
        close(y, layer(x)[0], rtol)
        assert half(x.to(dtype))[0].dtype == dtype
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == {
        "att.mix", "att.w0", "att.a0", "att.v0", "att.k_k", "att.k_a", "att.r_k", "ffn.mix",
        *(f"{norm}.{p}" for norm in ("ln1", "ln2", "att.ln_x") for p in ("weight", "bias")),
    }  # fmt: skip


def test_a_transition_of_scale_two_reflects():
    """alpha = 1, w = 1: the key's direction in the state changes its sign."""
    layer = pyseq.RWKV7(8, 8, iclr_scale=2, dtype=torch.float64)
    k = torch.nn.functional.normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64), dim=-1)
    S = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    zero = torch.zeros_like(k)
    _, after = pyseq.rwkv7(zero, zero, zero, zero, -k, layer.iclr_scale * k, state=S, return_state=True)
    close(k[0, 0] @ after[0], -(k[0, 0] @ S[0]), 1e-12)


def test_beginning():
    """Formulas of the authors' trainer, at places worked out by hand."""
    first, last = (pyseq.RWKV7(128, layer_idx=i, n_layer=4) for i in (0, 3))
    assert not first.att.output.weight.any() and not first.ffn.value.weight.any() and not last.att.w1.weight.any()
    assert not hasattr(first.att, "v0") and last.att.v0[0].item() == pytest.approx(0.73 + 0.2)
    share = 32 / 128
    assert first.att.mix[0, 32].item() == pytest.approx(1 - share**0.2)   # r
    assert last.att.mix[1, 32].item() == pytest.approx(1 - share ** (0.9 / 4))   # w
    assert last.ffn.mix[32].item() == pytest.approx(1 - share ** (1 / 256))
    assert first.att.w0[0].item() == pytest.approx(-6 + 0.5 - 2.5)
    assert last.att.w0[127].item() == pytest.approx(0.5 + 2.5)
    middle = -5.5 + 6 * (40 / 127) + 2.5 * (8.5 / 31.5) * abs(8.5 / 31.5)
    assert first.att.w0[40].item() == pytest.approx(middle)   # layer 0: r0 = 0
    assert last.att.k_k[127].item() == pytest.approx(0.66) and last.att.k_a[5].item() == pytest.approx(1.02)
    assert first.att.ln_x.weight[3].item() == pytest.approx((1 / 4) ** 0.7) and last.att.ln_x.weight[0] == 1
    assert first.att.ln_x.eps == pytest.approx(64e-5)
    up = last.att.g2.weight.detach()
    close(up.mT @ up, 0.01 * torch.eye(up.shape[1]))
    x = torch.randn(1, 3, 128)
    assert torch.equal(first(x)[0], x)


def test_one_layer_alone_has_a_beginning():
    for p in pyseq.RWKV7(64, layer_idx=0, n_layer=1).parameters():
        assert p.isfinite().all()
    assert pyseq.RWKV7(8, 1).att.w0.isfinite().all()   # heads of one channel


def test_ranks():
    def ranks(width):
        att = pyseq.RWKV7(width, device="meta").att
        return [getattr(att, m + "1").weight.shape[0] for m in "wavg"]

    assert ranks(128) == [32, 32, 32, 64] and ranks(768) == [64, 64, 32, 128] and ranks(2048) == [128, 128, 64, 224]


def test_a_copy_is_the_layer():
    layer, x = make(), torch.randn(1, 4, WIDTH)
    with torch.no_grad():
        y, state = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x)[0], y)
        for after in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
            assert type(after) is type(state) and all(map(torch.equal, after, state))


@pytest.mark.parametrize("arguments, word", [
    ({"head_size": 7}, "head_size"), ({"head_size": 0}, "head_size"), ({"head_size": 8.0}, "head_size"),
    ({"d_model": 512, "head_size": 512}, "head_size must be at most 256"),
    ({"d_ffn": 0}, "d_ffn"), ({"decay_rank": -1}, "decay_rank"), ({"gate_rank": True}, "gate_rank"),
    ({"layer_idx": -1}, "layer_idx"), ({"layer_idx": 2, "n_layer": 2}, "layer_idx"), ({"n_layer": 0}, "n_layer"),
    ({"iclr_scale": 3}, "iclr_scale"), ({"iclr_scale": True}, "iclr_scale"), ({"norm_eps": math.nan}, "norm_eps"),
])  # fmt: skip
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        pyseq.RWKV7(**{"d_model": WIDTH, "head_size": HEAD, **arguments})


def test_bad_inputs():
    layer, x = make(), torch.randn(2, 4, WIDTH)
    state = layer.init_state(2)
    cu_seqlens = torch.tensor([0, 3, 5])
    for error, word, call in [
        (ValueError, r"x has shape .*24", lambda: layer(x[..., :8])),
        (ValueError, "x has shape", lambda: layer.step(x, state)),
        (TypeError, "x is", lambda: layer([1.0])),
        (ValueError, r"v_first has shape", lambda: layer(x, v_first=x[:, :2])),
        (ValueError, r"layer 0", lambda: make("first")(x, v_first=x)),
        (ValueError, r"state.time", lambda: layer(x, layer.init_state(3))),
        (TypeError, "state is", lambda: layer(x, state.wkv)),
        (ValueError, "state", lambda: layer(x, state._replace(wkv=state.wkv[:, :2]))),
        (ValueError, "cu_seqlens", lambda: layer(x, cu_seqlens=cu_seqlens)),
        (ValueError, "cu_seqlens", lambda: layer(x[:1], cu_seqlens=cu_seqlens)),
    ]:
        with pytest.raises(error, match=word), torch.no_grad():
            call()
    wrong = state._replace(wkv=state.wkv[:, :, :2])
    with pytest.raises(ValueError, match=r"state\.wkv has shape"), torch.no_grad():
        layer.step(x[:, 0], wrong)
    assert not any(t.any() for t in wrong)
