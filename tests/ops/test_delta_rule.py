"""What is delta_rule's own: its forms agree, exact is bit for bit the step, its cases, decays at either end."""

import pytest
import torch

import pyseq
from pyseq import _library, testing
from pyseq.testing import assert_close, on, prepare

OP = _library.REGISTRY["delta_rule"]
BACKENDS = testing.backends(OP)
ROWS = ("q", "k", "v", "a", "b", "g")
SEQUENTIAL, CHUNKS = 1, 2
GATES = ("key", "head", "strong", None)
WIDTHS, TIMES = (1, 5, 8, 60, 64, 100, 128, 256), (1, 15, 16, 17, 63, 64, 65, 100)

on_backends = pytest.mark.parametrize("backend", BACKENDS)
in_both_forms = pytest.mark.parametrize("form", [SEQUENTIAL, CHUNKS], ids=["sequential", "chunks"])


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def uniform(low, high, *size, seed=0):
    return low + (high - low) * torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def unit(*size, seed=0):
    return torch.nn.functional.normalize(normal(*size, seed=seed), dim=-1)


def drawn(time, keys, values, *, gate="key", correct=True, batch=1, heads=2):
    """`gate`: "key", "head", "strong" (per key down to exp(-40), some forgotten at once) or None."""
    rows = (batch, time, heads)
    a, weak = -unit(*rows, keys, seed=1), -0.6065 * torch.sigmoid(normal(*rows, keys, seed=2))
    strong = torch.where(normal(*rows, keys, seed=3) > 1, -torch.inf, -40 * torch.sigmoid(4 * normal(*rows, keys)))
    return {
        "q": normal(*rows, keys, seed=4), "k": normal(*rows, keys, seed=5) * keys**-0.5,
        "v": normal(*rows, values, seed=6), "a": a if correct else None,
        "b": -a * torch.sigmoid(normal(*rows, keys, seed=7)) if correct else None,
        "g": {"key": weak, "head": weak[..., 0], "strong": strong, None: None}[gate],
        "scale": 0.7, "state": normal(batch, heads, keys, values, seed=8),
    }  # fmt: skip


def in_type(arguments, dtype):
    return arguments | {n: arguments[n].to(dtype) for n in ROWS if arguments[n] is not None}


def cut(arguments, begin, end):
    return arguments | {n: arguments[n][:, begin:end] for n in ROWS if arguments[n] is not None}


def forward(arguments, form, backend="cpu", keep=False):
    """y, the last state and the kept ones, in the form given and without a look at values."""
    names = (*ROWS, "state", "cu_seqlens")
    with on(backend) as device:
        given = prepare(arguments, device, requires_grad=False)
        tensors = [given.get(n) for n in names]
        return [t.cpu() for t in OP.active.forward(*tensors, given.get("scale", 1.0), True, keep, form)]


def exact(arguments):
    wide = {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in arguments.items()}
    return pyseq.reference.delta_rule(**wide, return_state=True)


def ratio(found, wanted):
    """The root mean square of the error, relative to that of what is wanted."""
    return float((found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def check(arguments, form, backend="cpu"):
    products = testing.products_of(OP, arguments) if form == CHUNKS else None
    y, last, _ = forward(arguments, form, backend)
    exact_y, exact_last = exact(arguments)
    assert_close(y, exact_y, "y", "output", products)
    assert_close(last, exact_last, "state")


# ---- forms -----------------------------------------------------------------------------------------------------------


@in_both_forms
@pytest.mark.parametrize("keys", WIDTHS)
@pytest.mark.parametrize("values", WIDTHS)
def test_every_shape(keys, values, form):
    i, j = WIDTHS.index(keys), WIDTHS.index(values)
    time, gate = TIMES[(i + 3 * j) % len(TIMES)], GATES[(i + j) % len(GATES)]
    check(drawn(time, keys, values, gate=gate, correct=(i + j // 2) % 3 > 0), form)


@in_both_forms
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
def test_every_length(time, correct, form):
    for gate in GATES:
        check(drawn(time, 20, 36, gate=gate, correct=correct, batch=2), form)


@on_backends
@in_both_forms
@pytest.mark.parametrize(("time", "keys", "values"), [(17, 5, 8), (16, 64, 60), (1, 100, 1), (33, 20, 36)])
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
def test_shapes_on_every_backend(time, keys, values, correct, form, backend):
    for gate in GATES:
        check(drawn(time, keys, values, gate=gate, correct=correct, heads=1), form, backend)


@in_both_forms
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_every_dtype(dtype, form):
    for gate in GATES:
        check(in_type(drawn(70, 60, 64, gate=gate), dtype), form)


@in_both_forms
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
def test_the_kept_states_are_those_before_every_64th_token(correct, form):
    arguments = drawn(150, 20, 33, correct=correct, batch=2)
    kept = forward(arguments, form, keep=True)[2].view(2, 3, 2, 20, 33)
    assert torch.equal(kept[:, 0], arguments["state"])
    for n in (1, 2):
        assert torch.equal(kept[:, n], forward(cut(arguments, 0, 64 * n), form)[1])


@in_both_forms
def test_the_columns_of_a_state_are_on_their_own(form):
    """Few heads are divided by columns, many are not: the bits of the sequential form are the same."""
    arguments = drawn(40, 24, 100, heads=9)
    y, last, _ = forward(arguments, form)
    one = {n: t[:, :, 4:5] for n, t in arguments.items() if n in ROWS}
    y_one, last_one, _ = forward(arguments | one | {"state": arguments["state"][:, 4:5]}, form)
    assert torch.equal(y_one, y[:, :, 4:5]) and torch.equal(last_one, last[:, 4:5])


# ---- exact: steps, pieces, packing -----------------------------------------------------------------------------------


def stepped(arguments):
    state = arguments["state"].clone()
    at = lambda n, t: None if arguments[n] is None else arguments[n][:, t]  # noqa: E731
    times = range(arguments["q"].shape[1])
    ys = [pyseq.delta_rule_step(state, *(at(n, t) for n in ROWS), scale=arguments["scale"]) for t in times]
    return torch.stack(ys, 1), state


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(("keys", "values"), [(1, 1), (5, 8), (33, 20), (64, 64), (100, 130), (256, 256)])
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
def test_exact_is_step_by_step_bit_for_bit(keys, values, correct, dtype):
    for gate in GATES:
        arguments = in_type(drawn(11, keys, values, gate=gate, correct=correct), dtype)
        y, last = pyseq.delta_rule(**arguments, return_state=True, exact=True)
        one, state = stepped(arguments)
        assert torch.equal(y, one) and torch.equal(last, state)


@pytest.mark.parametrize("at", [0, 1, 3, 31, 64, 69])
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
def test_exact_does_not_depend_on_a_cut(at, correct):
    for gate in GATES:
        arguments = drawn(70, 20, 36, gate=gate, correct=correct) | {"return_state": True, "exact": True}
        whole, last = pyseq.delta_rule(**arguments)
        first, state = pyseq.delta_rule(**cut(arguments, 0, at))
        second, state = pyseq.delta_rule(**(cut(arguments, at, 70) | {"state": state}))
        assert torch.equal(torch.cat([first, second], 1), whole) and torch.equal(state, last)


@in_both_forms
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
def test_packing_changes_no_bits(correct, form):
    ends = [0, 0, 3, 40, 40, 105, 150]
    arguments = drawn(150, 20, 36, correct=correct)
    states = normal(6, 2, 20, 36, seed=9)
    y, last, kept = forward(arguments | {"state": states, "cu_seqlens": torch.tensor(ends)}, form, keep=True)
    for s in range(6):
        begin, end = ends[s], ends[s + 1]
        one, state, alone = forward(cut(arguments, begin, end) | {"state": states[s : s + 1]}, form, keep=True)
        assert torch.equal(y[:, begin:end], one) and torch.equal(last[s : s + 1], state)
        slot = begin // 64 + s
        assert torch.equal(kept[slot : slot + len(alone)], alone)


@pytest.mark.parametrize("values", [4, 16, 33, 64])
def test_a_bfloat16_state_is_rounded_once(values):
    arguments = drawn(1, 20, values)
    state = arguments["state"].bfloat16()
    y, last = stepped(arguments | {"state": state.float()})
    narrow, rounded = stepped(arguments | {"state": state})
    assert torch.equal(narrow, y) and torch.equal(rounded, last.bfloat16())


# ---- what is a case of it --------------------------------------------------------------------------------------------


def test_rwkv7_and_gla_are_cases():
    given = drawn(30, 24, 20)
    q, k, v, a, b, g = (given[n] for n in ROWS)
    options = {"state": given["state"], "return_state": True}
    for one, other in [
        (pyseq.rwkv7(q, g, k, v, a, b, **options), pyseq.delta_rule(q, k, v, a, b, g, **options)),
        (pyseq.gla(q, k, v, g, **options), pyseq.delta_rule(q, k, v, None, None, g, scale=24**-0.5, **options)),
    ]:
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    one, other = given["state"].clone(), given["state"].clone()
    y = pyseq.rwkv7_step(one, *(t[:, 0] for t in (q, g, k, v, a, b)))
    assert torch.equal(y, pyseq.delta_rule_step(other, *(t[:, 0] for t in (q, k, v, a, b, g))))
    assert torch.equal(one, other)


@pytest.mark.parametrize("gate", ["key", "head", None])
def test_the_gated_delta_rule_is_a_case(gate):
    given = drawn(40, 24, 20, gate=gate)
    q, v, g, state = (given[n] for n in ("q", "v", "g", "state"))
    k, beta = unit(1, 40, 2, 24, seed=10), torch.sigmoid(normal(1, 40, 2, seed=11))
    options = {"state": state, "return_state": True}
    if gate == "key":
        y, last = pyseq.kimi_delta_rule(q, k, v, g, beta, **options)
    elif gate == "head":
        y, last = pyseq.gated_delta_rule(q, k, v, g, beta, **options)
    else:
        y, last = pyseq.delta_net(q, k, v, beta, **options)
    decay = 1.0 if g is None else g.exp() if gate == "key" else g.exp()[..., None]
    a = -beta[..., None] * decay * k
    for form in (SEQUENTIAL, CHUNKS):
        other = forward(given | {"k": beta[..., None] * k, "a": a, "b": k, "scale": 24**-0.5}, form)
        assert_close(y, other[0].double(), "y")
        assert_close(last, other[1].double(), "state")


# ---- inputs that others test with, to the errors aimed at -----------------------------------------------------------


AIM = {(torch.float32, SEQUENTIAL): 1e-5, (torch.float32, CHUNKS): 5e-5}


def within_aim(arguments, dtype, form):
    arguments = in_type(arguments, dtype)
    y, last, _ = forward(arguments, form)
    exact_y, exact_last = exact(arguments)
    aim = AIM.get((dtype, form), 3e-3)
    assert ratio(y, exact_y) <= aim and ratio(last, exact_last) <= min(aim, 5e-5)


@in_both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
@pytest.mark.parametrize(("time", "width", "heads"), [(15, 60, 1), (63, 64, 2), (100, 100, 3), (200, 128, 1)])
def test_normal_inputs_and_gates_of_any_strength(time, width, heads, correct, dtype, form):
    rows = (1, time, heads)
    a = torch.nn.functional.normalize(uniform(0, 1, *rows, width), dim=-1)
    for strength in (0.1, 1, 10):
        g = torch.nn.functional.logsigmoid(normal(*rows, width, seed=1)) / strength
        given = {
            "q": normal(*rows, width, seed=2), "k": normal(*rows, width, seed=3), "v": normal(*rows, width, seed=4),
            "a": a if correct else None, "b": -a if correct else None, "scale": width**-0.5,
            "g": torch.where(uniform(0, 1, *rows, width, seed=5) < 0.5, 0.0, g),
            "state": normal(1, heads, width, width, seed=6),
        }  # fmt: skip
        within_aim(given, dtype, form)


@in_both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_far_from_zero_with_strong_decays(dtype, form):
    rows = (1, 100, 2, 64)
    kappa = unit(*rows)
    given = {n: uniform(-8, -6, *rows, seed=i) for i, n in enumerate(("q", "k", "v", "g"))}
    given |= {"a": -kappa, "b": kappa * uniform(0, 0.1, *rows, seed=4), "state": normal(1, 2, 64, 64)}
    within_aim(given, dtype, form)


@in_both_forms
def test_kept_states_that_no_token_needs_are_zero(form):
    arguments = drawn(40, 16, 18) | {"state": None, "cu_seqlens": torch.tensor([0, 3, 3, 5, 40])}
    for _ in range(2):
        kept = forward(arguments, form, keep=True)[2]
        assert kept.eq(0).all()   # those of the first token are, and there are no more
        kept.fill_(torch.nan)   # what is freed here is likely what the next call gets
        del kept



@in_both_forms
def test_packed_as_in_training(form):
    given = drawn(2000, 60, 64)
    ends = torch.tensor([0, 15, 100, 300, 1111, 1599, 2000])
    within_aim(given | {"cu_seqlens": ends, "state": normal(6, 2, 60, 64, seed=9)}, torch.float32, form)


# ---- decays at either end --------------------------------------------------------------------------------------------


@in_both_forms
@pytest.mark.parametrize("g", [-1e-5, -3e-4, -0.01])
def test_a_long_memory_loses_nothing_to_rounding(g, form):
    """A decay of 1 - 1e-5 in a float is off by up to 3e-8: after 2000 tokens that would be 6e-5."""
    given = drawn(2000, 8, 16, gate="head", correct=False, heads=1)
    check(given | {"g": torch.full_like(given["g"], g)}, form)


@in_both_forms
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
def test_a_decay_of_zero_forgets(correct, form):
    given = drawn(40, 20, 36, correct=correct)
    given["g"][:, 21] = -torch.inf
    given["state"] = 1e6 * given["state"]
    if correct:
        given["a"][:, 21] = 0
    y, last, _ = forward(given, form)
    after, state, _ = forward(cut(given, 21, 40) | {"state": torch.zeros_like(given["state"])}, form)
    assert_close(y[:, 21:], after.double(), "y")
    assert_close(last, state.double(), "state")


@in_both_forms
@pytest.mark.parametrize("bad", [float("nan"), 0.5])
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
def test_no_decay_is_nan_from_there_on(correct, bad, form):
    given = drawn(40, 20, 36, correct=correct, batch=2)
    given["g"][1, 21, 1] = bad
    y, last, _ = forward(given, form)
    assert y[1, 21:, 1].isnan().all() and last[1, 1].isnan().all()
    y[1, 21:, 1] = 0
    assert y.isfinite().all() and last[0].isfinite().all() and last[1, 0].isfinite().all()


@in_both_forms
def test_nan_in_a_value_stays_in_its_column(form):
    given = drawn(40, 20, 36)
    given["v"][0, 21, 1, 7] = torch.nan
    y, last, _ = forward(given, form)
    assert torch.equal(y.isnan(), exact(given)[0].isnan()) and torch.equal(last.isnan(), exact(given)[1].isnan())


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "error", "named"), [
    ({"q": torch.zeros(1, 6, 2, 257), "k": torch.zeros(1, 6, 2, 257)}, ValueError, "q"),
    ({"k": torch.zeros(1, 6, 2, 5)}, ValueError, "k"),
    ({"v": torch.zeros(1, 5, 2, 4)}, ValueError, "v"),
    ({"v": torch.zeros(1, 6, 2, 300)}, ValueError, "v"),
    ({"a": None}, ValueError, "a"),
    ({"b": None}, ValueError, "b"),
    ({"b": torch.zeros(1, 6, 2, 4)}, ValueError, "b"),
    ({"g": torch.zeros(1, 6, 3)}, ValueError, "g"),
    ({"g": torch.full((1, 6, 2, 3), 0.1)}, ValueError, "g"),
    ({"q": torch.zeros(1, 6, 2, 3, dtype=torch.int32)}, TypeError, "q"),
    ({"state": torch.zeros(1, 2, 4, 3)}, ValueError, "state"),
    ({"state": torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16)}, TypeError, "state"),
    ({"scale": "1"}, TypeError, "scale"),
    ({"scale": True}, TypeError, "scale"),
    ({"exact": 1}, TypeError, "exact"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens"),
])  # fmt: skip
def test_wrong_arguments_are_named(change, error, named):
    with pytest.raises(error, match=rf"delta_rule: {named}\b"):
        pyseq.delta_rule(**(drawn(6, 3, 4) | change))


def test_wrong_arguments_of_a_step_are_named():
    state = torch.zeros(1, 2, 3, 4)
    row, v = torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="delta_rule_step: v"):
        pyseq.delta_rule_step(state, row, row, torch.zeros(1, 3, 4), row, row, None)
    with pytest.raises(ValueError, match="delta_rule_step: b"):
        pyseq.delta_rule_step(state, row, row, v, row, None, None)
    with pytest.raises(TypeError, match="delta_rule_step: state"):
        pyseq.delta_rule_step(state.half(), row, row, v, row, row, None)
    with pytest.raises(ValueError, match="delta_rule_step: g"):
        pyseq.delta_rule_step(state, row, row, v, row, row, torch.full((1, 2), 0.1))
