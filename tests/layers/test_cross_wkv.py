"""CrossWKV against one call of the delta rule, against attention where it is that, and against itself in pieces."""

import pytest
import torch

import pyseq
from pyseq.layers import CrossWKVState
from pyseq.models import state as states

D, DC, N = 16, 12, 8
by_mode = pytest.mark.parametrize("mode", ["context_memory", "write_both", "aligned"])


def make(mode="context_memory", dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = pyseq.CrossWKV(D, DC, N, mode, decay_rank=4, iclr_rank=4, gate_rank=4, dtype=dtype, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


def streams(mode="context_memory", dtype=torch.float64, batch=3):
    return torch.randn(batch, 7, D, dtype=dtype), torch.randn(batch, 7 if mode == "aligned" else 5, DC, dtype=dtype)


def close(got, expected, rtol=1e-11):
    scale = expected.abs().max().item()
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert (got - expected).abs().max().item() <= rtol * scale


def close_states(a, b, rtol=1e-11):
    for got, want in zip(a, b, strict=True):
        close(got, want, rtol)


def before(x):
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


@pytest.mark.parametrize("mode", ["context_memory", "write_both"])
def test_it_is_one_delta_rule_over_context_and_x(mode):
    """The context reads nothing (q = 0); x writes nothing (k, v, a, b = 0, g = 0), or what it writes."""
    layer = make(mode)
    x, context = streams(mode)
    r, gate = layer._read(x, before(x))
    first = layer.write_context.mixed(context, before(context))
    second = [torch.zeros_like(r)] * 5 if layer.write_x is None else layer.write_x.mixed(x, before(x))
    g, k, v, a, b = (torch.cat(pair, 1) for pair in zip(first, second, strict=True))
    q = torch.cat([torch.zeros_like(first.k), r], 1)
    y, S = pyseq.delta_rule(q, k, v, a, b, g, return_state=True)
    out, state = layer(x, context)
    close(out, layer._merge(y[:, context.shape[1] :], gate))
    close_states(state, (context[:, -1], x[:, -1], S))


def plain_writes(writer, x):
    """w, k, v, a, b of the docstring's formulas, [B, T, H, N]."""
    w, k, v, a = (x + (before(x) - x) * mix for mix in writer.mix)
    w = torch.tanh(w @ writer.w1.weight.T) @ writer.w2.weight.T + writer.w0
    w = -(2.718281828459045**-0.5) / (1 + torch.exp(-w))
    alpha = 1 / (1 + torch.exp(-(writer.a0 + a @ writer.a1.weight.T @ writer.a2.weight.T)))
    k, v = k @ writer.key.weight.T, v @ writer.value.weight.T
    kappa = (k * writer.k_k).view(*k.shape[:2], -1, N)
    kappa = (kappa / kappa.norm(dim=-1, keepdim=True)).flatten(2)
    k = k * (1 + (alpha - 1) * writer.k_a)
    heads = (w, k, v, -kappa, writer.iclr_scale * alpha * kappa)
    return [t.view(*t.shape[:2], -1, N) for t in heads]


@by_mode
def test_it_is_the_equations_token_by_token(mode):
    layer = make(mode, iclr_scale=2)
    x, context = streams(mode)
    r, g = (x + (before(x) - x) * mix for mix in layer.mix)
    r = (r @ layer.receptance.weight.T).view(3, 7, -1, N)
    g = 1 / (1 + torch.exp(-g @ layer.g1.weight.T)) @ layer.g2.weight.T
    S, ys = torch.zeros(3, D // N, N, N, dtype=torch.float64), []

    def write(S, w, k, v, a, b):
        transition = torch.diag_embed(w.exp()) + b[..., :, None] * a[..., None, :]
        return transition @ S + k[..., None] * v[..., None, :]

    of_context = plain_writes(layer.write_context, context)
    for t in range(5 if mode != "aligned" else 0):
        S = write(S, *(u[:, t] for u in of_context))
    own = plain_writes(layer.write_x, x) if mode == "write_both" else None
    writes = of_context if mode == "aligned" else own
    for t in range(7):
        S = S if writes is None else write(S, *(u[:, t] for u in writes))
        ys.append(torch.einsum("bhkv,bhk->bhv", S, r[:, t]))
    y = torch.stack(ys, 1)
    y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, keepdim=True, correction=0) + N * 1e-5)
    out = ((y.flatten(2) * layer.ln_x.weight + layer.ln_x.bias) * g) @ layer.output.weight.T
    close(layer(x, context)[0], out)


def test_without_correction_and_decay_it_is_linear_cross_attention():
    layer = make()
    writer = layer.write_context
    with torch.no_grad():
        for p, value in ((writer.w0, -torch.inf), (writer.a0, -torch.inf), (writer.k_a, 0.0), (writer.mix, 0.0)):
            p.fill_(value)
    x, context = streams()
    r, gate = layer._read(x, before(x))
    k, v = ((context @ p.weight.T).view(3, 5, -1, N) for p in (writer.key, writer.value))
    scores = torch.einsum("bthn,bshn->bhts", r, k)
    y = torch.einsum("bhts,bshn->bthn", scores, v)
    close(layer(x, context)[0], layer._merge(y, gate))
    shuffled = context[:, torch.randperm(5)]
    close(layer(x, shuffled)[0], layer(x, context)[0])   # and then no order is kept


def test_the_order_of_the_context_matters_and_that_of_x_does_not_but_for_the_shift():
    layer = make()
    x, context = streams()
    out = layer(x, context)[0]
    assert (layer(x, context.flip(1))[0] - out).abs().max() > 0.05 * out.abs().max()
    with torch.no_grad():
        layer.mix.zero_()
    close(layer(x.flip(1), context)[0].flip(1), layer(x, context)[0])


@by_mode
def test_a_masked_token_is_not_there(mode):
    layer = make(mode)
    x, context = streams(mode, batch=1)
    mask = torch.ones(1, context.shape[1], dtype=torch.bool)
    close(layer(x, context, context_mask=mask)[0], layer(x, context)[0])
    mask[0, [0, 3, -1]] = False
    out, state = layer(x, context.masked_fill(~mask[..., None], torch.nan), context_mask=mask)
    if mode != "aligned":
        want, after = layer(x, context[:, mask[0]])
        close(out, want)
        close_states(state, after)
    assert torch.isfinite(out).all()
    none = layer(x, context, context_mask=torch.zeros_like(mask))[1]
    assert not none.context.any() and (mode == "write_both" or not none.wkv.any())


@by_mode
def test_the_state_holds_what_was_absorbed(mode):
    layer = make(mode)
    x, context = streams(mode)
    whole, last = layer(x, context)
    if mode == "aligned":
        first, state = layer(x[:, :3], context[:, :3])
        second, end = layer(x[:, 3:], context[:, 3:], state)
    else:
        state = layer.absorb(context[:, :2])
        kept = states.clone(state)
        first, state = layer(x[:, :3], context[:, 2:], state)
        close_states(kept, layer.absorb(context[:, :2]), 0.0)
        second, end = layer(x[:, 3:], None, state)
        close(layer(x, state=layer.absorb(context))[0], whole)   # once absorbed, for any number of calls
        for got, given in zip(layer(x, state=state)[1], state, strict=True):
            assert got.data_ptr() != given.data_ptr()
    close(torch.cat([first, second], 1), whole)
    close_states(end, last)


@by_mode
def test_steps(mode):
    layer = make(mode)
    x, context = streams(mode)
    whole, last = layer(x, context)
    state = layer.init_state(3) if mode == "aligned" else layer.absorb(context)
    with torch.no_grad():
        state = states.clone(state)
        for t in range(7):
            out, after = layer.step(x[:, t], state, context[:, t] if mode == "aligned" else None)
            assert after is state
            close(out, whole[:, t])
    close_states(state, last)
    out, after = layer.step(x[:, 0], state, context[:, 0] if mode == "aligned" else None)
    assert out.requires_grad and after is not state


@by_mode
def test_gradients(mode):
    """Of everything, through the state too, by differences in float64."""
    layer = make(mode)
    x, context = streams(mode, batch=1)
    tensors = [x, context, *layer.init_state(1)]
    tensors = [(t + 0.1 * torch.randn_like(t)).requires_grad_() for t in tensors]
    mask = torch.ones(1, context.shape[1], dtype=torch.bool)
    mask[0, 1] = False

    def call(x, context, *state):
        out, after = layer(x, context, CrossWKVState(*state), context_mask=mask)
        return out, *after

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    parameters = list(layer.parameters())
    grads = torch.autograd.grad(call(*tensors)[0].square().sum(), parameters)
    assert all(g.abs().sum() > 0 for g in grads)


@by_mode
def test_float32_and_bfloat16(mode):
    exact = make(mode)
    layer, half = make(mode, torch.float32), make(mode, torch.float32).to(torch.bfloat16)
    layer.load_state_dict(exact.state_dict())
    half.load_state_dict(exact.state_dict())
    assert half.mix.dtype == half.write_context.w0.dtype == half.ln_x.weight.dtype == torch.float32
    x, context = (t.detach().requires_grad_() for t in streams(mode))
    weights = torch.randn(3, 7, D, dtype=torch.float64)
    inputs = [x, context, *exact.parameters()]
    want = torch.autograd.grad((exact(x, context)[0] * weights).sum(), inputs)
    x32, context32 = (t.detach().float().requires_grad_() for t in (x, context))
    out, state = layer(x32, context32)
    assert {t.dtype for t in (out, *state)} == {torch.float32}
    close(out.double(), exact(x32.double(), context32.double())[0], 5e-5)
    got = torch.autograd.grad((out * weights.float()).sum(), [x32, context32, *layer.parameters()])
    for g, w in zip(got, want, strict=True):
        close(g.double(), w, 3e-4)
    rounded, state = half(x.bfloat16(), context.bfloat16())
    assert rounded.dtype == torch.bfloat16 and {t.dtype for t in state} == {torch.float32}
    close(rounded.double(), exact(x, context)[0], 0.1)


def test_a_new_layer_says_nothing():
    for mode in ("context_memory", "write_both"):
        out, _ = pyseq.CrossWKV(64, 20, mode=mode)(torch.randn(2, 4, 64), torch.randn(2, 3, 20))
        assert not out.any()


def test_wrong_arguments_are_named():
    for options in ({"d_model": 0}, {"d_context": -1}, {"head_size": 5}, {"mode": "both"}, {"iclr_scale": 3},
                    {"gate_rank": 0}, {"norm_eps": 0.0}, {"head_size": 512, "d_model": 512}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            pyseq.CrossWKV(**{"d_model": D, "d_context": DC, "head_size": N} | options)
    layer, (x, context) = make(), streams()
    for arguments, name in (
        ((x[:, 0], context), "x"), ((x, context[..., :5]), "context"), ((x, context[:2]), "context"), ((x,), "context"),
        ((x, context, layer.init_state(2)), "state"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            layer(*arguments)
    with pytest.raises(ValueError, match="context_mask"):
        layer(x, None, layer.init_state(3), context_mask=torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="context_mask"):
        layer(x, context, context_mask=torch.ones(3, 5))
    aligned = make("aligned")
    with pytest.raises(ValueError, match="context"):
        aligned(x, context)
    with pytest.raises(ValueError, match="aligned"):
        aligned.absorb(context)
    for one, given in ((aligned, None), (layer, context[:, 0])):
        with pytest.raises(ValueError, match="aligned"):
            one.step(x[:, 0], one.init_state(3), given)
    with pytest.raises(TypeError, match="x is None"):
        layer(None, context)


def test_a_wrong_step_changes_nothing():
    x, context = streams()
    for mode in pyseq.layers.cross_wkv.MODES:
        layer = make(mode)
        state, given = layer.init_state(3), (context[:, 0],) if mode == "aligned" else ()
        for wrong in (x, x[:1, 0], x[:, 0, :-1]):
            with torch.no_grad(), pytest.raises(ValueError, match=r"CrossWKV: (x|context|state\.context) has shape"):
                layer.step(wrong, state, *given)
        assert not any(t.any() for t in state)
