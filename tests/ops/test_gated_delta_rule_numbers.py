"""gated_delta_rule against float64: gradients, shared keys, equality with delta_rule, upstream's recipes."""

import pytest
import torch
from gated_inputs import OP, drawn, in_type, on_backends, on_gates

import pyseq
from pyseq import reference, testing
from pyseq.samples import cast
from pyseq.testing import assert_close, gradients, on, prepare

# ---- gradients -------------------------------------------------------------------------------------------------------


def check_gradients(arguments, backend="cpu"):
    products = testing.products_of(OP, arguments)
    exact = testing.expected(OP, arguments)[1]
    with on(backend) as device:
        found = gradients(pyseq.gated_delta_rule, prepare(arguments, device, requires_grad=True))[1]
    for name, grad in found.items():
        assert grad.dtype == arguments[name].dtype
        allowed = testing.products_in(name, products)
        assert_close(grad, exact[name], f"gradient of {name}", "gradient", allowed)


@on_backends
@on_gates
@pytest.mark.parametrize(("time", "keys", "values"), [
    (1, 60, 8), (15, 1, 64), (16, 128, 128), (17, 8, 1), (63, 100, 60), (65, 64, 256), (70, 256, 100), (130, 33, 20),
])
def test_gradients_match_float64(time, keys, values, gate, backend):
    check_gradients(drawn(time, keys, values, gate=gate) | {"return_state": True}, backend)


@on_backends
@on_gates
@pytest.mark.parametrize("most", [-30.0, -1.0, -1e-3, -1e-6])
def test_the_gradient_of_weak_and_strong_decays_over_long_sequences(most, gate, backend):
    arguments = drawn(400, 12, 16, gate=gate, most=2.0) | {"return_state": True}
    if gate != "none":
        g = most * torch.rand(arguments["g"].shape, generator=torch.Generator().manual_seed(1))
        g[:, 150] = -torch.inf
        arguments["g"] = g
    check_gradients(arguments, backend)


@pytest.mark.parametrize("backend", testing.backends(OP))
@pytest.mark.parametrize("gate", ["head", "key"])
def test_the_little_that_fast_decays_leave_keeps_its_digits(gate, backend):
    arguments = drawn(20, 12, 16, gate=gate) | {"return_state": True, "state": None}
    arguments["g"] = arguments["g"] - 10
    check_gradients(arguments, backend)


@on_backends
@on_gates
def test_value_heads_share_keys(gate, backend):
    """Shared query and key heads are the same heads repeated; their gradients are sums."""
    shared = drawn(70, 40, 36, gate=gate, batch=2, heads=2, value_heads=6) | {"return_state": True}
    repeated = shared | {n: shared[n].repeat_interleave(3, 2) for n in ("q", "k")}
    with on(backend) as device:
        outputs, grads = gradients(pyseq.gated_delta_rule, prepare(shared, device, requires_grad=True))
        others, apart = gradients(pyseq.gated_delta_rule, prepare(repeated, device, requires_grad=True))
    assert all(torch.equal(a, b) for a, b in zip(outputs, others, strict=True))
    for name in ("q", "k"):
        assert_close(grads[name], apart[name].double().unflatten(2, (2, 3)).sum(3), name, "gradient")
    check_gradients(shared, backend)


# ---- its relatives, through delta_rule -------------------------------------------------------------------------------


def through_delta_rule(rule, q, k, v, g, beta, **options):
    """The same by the general rule, whose a and b and stored values torch computes."""
    per_head = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(per_head, 2), k.repeat_interleave(per_head, 2)
    beta = beta[..., None]
    decay = 1.0 if g is None else torch.exp(g if g.dim() == 4 else g[..., None])
    return rule(q, k, beta * v, -beta * decay * k, k, g, return_state=True, **options)


def call(module, gate):
    """The function of `module` for this gate, with the arguments of gated_delta_rule."""
    if gate == "none":
        return lambda q, k, v, g, beta, **options: module.delta_net(q, k, v, beta, return_state=True, **options)
    name = {"head": "gated_delta_rule", "key": "kimi_delta_rule"}[gate]
    return lambda *rows, **options: getattr(module, name)(*rows, return_state=True, **options)


def ratio(actual, exact):
    """Root mean square of the error over that of the exact values."""
    exact = exact.detach().double().cpu()
    off = (actual.detach().double().cpu() - exact).square().mean().sqrt()
    return float(off / exact.square().mean().sqrt().clamp_min(1e-8))


@on_gates
def test_each_case_is_a_delta_rule(gate):
    given = drawn(40, 12, 10, gate=gate, batch=2, most=2.0)
    wide = cast(given, torch.float64, ())

    def both(module, arguments):
        def general(**rows):
            return through_delta_rule(module.delta_rule, **rows)

        ours, mine = gradients(call(module, gate), prepare(arguments, "cpu", requires_grad=True))
        theirs, other = gradients(general, prepare(arguments, "cpu", requires_grad=True))
        return [*ours, *mine.values()], [*theirs, *other.values()], list(mine)

    exact, general, names = both(reference, wide)
    for a, b in zip(exact, general, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    ours, theirs, _ = both(pyseq, given)
    for name, a, b, e in zip(["y", "state", *names], ours, theirs, exact, strict=True):
        assert_close(a, e, f"{name} of the tied kernel", "output" if name == "y" else "gradient")
        assert ratio(b, e) < 2e-4, f"{name} by delta_rule"


# ---- upstream's recipes, at this project's targets -------------------------------------------------------------------

RECIPES = [
    (15, 60, 64, 0.1), (15, 64, 100, 1), (63, 100, 60, 10), (63, 128, 64, 0.1), (100, 60, 128, 1), (200, 64, 100, 10),
    (1000, 60, 64, 1),
]


def recipe(time, keys, values, gate, slowness, **options):
    """q, v ~ N(0, 1), k of unit length; g = logsigmoid(N) / slowness, half of it zero."""
    arguments = drawn(time, keys, values, gate=gate, **options)
    generator = torch.Generator().manual_seed(time + keys)
    arguments["q"] = torch.randn(arguments["q"].shape, generator=generator)
    if gate != "none":
        size = arguments["g"].shape
        log = torch.nn.functional.logsigmoid(torch.randn(size, generator=generator)) / slowness
        arguments["g"] = log * (torch.rand(size, generator=generator) > 0.5)
    return arguments | {"return_state": True}


def check_targets(arguments, output, gradient, backend, **options):
    exact, exact_grads = testing.expected(OP, arguments)
    with on(backend) as device:
        given = prepare(arguments | options, device, requires_grad=True)
        found, grads = gradients(pyseq.gated_delta_rule, given)
    for name, a, e in zip(("y", "state"), found, exact, strict=True):
        assert ratio(a, e) <= output, name
    for name, a in grads.items():
        assert ratio(a, exact_grads[name]) <= gradient, f"gradient of {name}"


@on_backends
@on_gates
@pytest.mark.parametrize(("time", "keys", "values", "slowness"), RECIPES)
def test_recipes_meet_their_targets(time, keys, values, slowness, gate, backend):
    arguments = recipe(time, keys, values, gate, slowness, value_heads=1)
    check_targets(arguments, 5e-5, 2e-4, backend)
    if time <= 200:
        check_targets(arguments, 1e-5, 5e-5, backend, exact=True)
        check_targets(in_type(arguments, torch.bfloat16), 3e-3, 8e-3, backend)


@on_backends
@on_gates
def test_the_packed_recipe_meets_its_targets(gate, backend):
    ends = torch.tensor([0, 15, 100, 300, 300, 303, 400])
    arguments = recipe(400, 60, 64, gate, 1, value_heads=1, sequences=6)
    check_targets(arguments | {"cu_seqlens": ends}, 5e-5, 2e-4, backend)
