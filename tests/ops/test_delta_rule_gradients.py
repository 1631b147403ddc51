"""Gradients of delta_rule against float64: every case at ragged shapes, extreme decays, packing, absent gradients."""

from itertools import pairwise

import pytest
import torch

import pyseq
from pyseq import _library, testing
from pyseq.testing import assert_close, gradients, on, prepare

OP = _library.REGISTRY["delta_rule"]
ROWS = ("q", "k", "v", "a", "b", "g")
# The emulator is too slow for these shapes; its own tests are those of the samples.
on_backends = pytest.mark.parametrize("backend", [b for b in testing.backends(OP) if b != "simt"])


def drawn(time, keys, values, *, gate="key", correct=True, batch=1, heads=2, sequences=None, seed=0):
    """`gate`: "key", "head", "strong" (per key down to exp(-40), some forgotten at once) or None."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    rows = (batch, time, heads)
    unit = torch.nn.functional.normalize(normal(*rows, keys), dim=-1)
    share = torch.sigmoid(normal(*rows, keys))
    weak = -0.6065 * torch.sigmoid(normal(*rows, keys))
    strong = torch.where(normal(*rows, keys) > 1, -torch.inf, -40 * torch.sigmoid(4 * normal(*rows, keys)))
    return {
        "q": normal(*rows, keys), "k": normal(*rows, keys) * keys**-0.5, "v": normal(*rows, values),
        "a": -unit if correct else None, "b": unit * share if correct else None,
        "g": {"key": weak, "head": weak[..., 0], "strong": strong, None: None}[gate],
        "scale": 0.7, "state": normal(sequences or batch, heads, keys, values), "return_state": True,
    }


def in_type(arguments, dtype):
    return arguments | {n: arguments[n].to(dtype) for n in ROWS if arguments[n] is not None}


def found(arguments, backend="cpu"):
    with on(backend) as device:
        return gradients(pyseq.delta_rule, prepare(arguments, device, requires_grad=True))[1]


def check(arguments, backend="cpu"):
    products = testing.products_of(OP, arguments)
    exact = testing.expected(OP, arguments)[1]
    for name, grad in found(arguments, backend).items():
        assert grad.dtype == arguments[name].dtype
        assert_close(grad, exact[name], f"gradient of {name}", "gradient", testing.products_in(name, products))


# ---- shapes and cases ------------------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
@pytest.mark.parametrize("gate", ["key", "head", "strong", None])
@pytest.mark.parametrize("time", [1, 15, 16, 17, 63, 64, 65, 130])
def test_chunks_and_spans_join(time, gate, correct, backend):
    check(drawn(time, 8, 5, gate=gate, correct=correct, batch=2), backend)


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("keys", "values", "gate", "correct"), [
    (1, 64, "key", True), (5, 1, "head", True), (8, 256, "strong", True), (60, 100, "key", True),
    (64, 64, "key", True), (64, 5, None, True), (100, 60, "head", True), (128, 128, "strong", True),
    (256, 256, "key", True), (256, 8, None, True), (1, 1, "strong", False), (5, 100, "key", False),
    (60, 8, None, False), (64, 128, "head", False), (100, 1, "strong", False), (128, 256, "key", False),
])
def test_widths(keys, values, gate, correct, dtype, backend):
    check(in_type(drawn(34, keys, values, gate=gate, correct=correct), dtype), backend)


@on_backends
@pytest.mark.parametrize("exact", [True, False])
def test_either_form_of_the_forward_leaves_what_is_needed(exact, backend):
    check(drawn(200, 20, 36) | {"exact": exact}, backend)


@on_backends
def test_every_gradient_has_the_dtype_of_its_input(backend):
    for shift in range(3):
        arguments = drawn(40, 12, 20)
        for k, name in enumerate(ROWS):
            arguments[name] = arguments[name].to(testing.DTYPES[(k + shift) % 3])
        check(arguments, backend)


@on_backends
def test_without_a_state_given_or_returned(backend):
    arguments = drawn(70, 9, 12, batch=2)
    check(arguments | {"state": None}, backend)
    check(arguments | {"return_state": False}, backend)
    check(arguments | {"state": None, "return_state": False}, backend)


@on_backends
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
def test_only_the_returned_state_has_a_gradient(correct, backend):
    arguments = drawn(70, 9, 12, correct=correct)
    names = [n for n in (*ROWS[1:], "state") if arguments[n] is not None]

    def one(op, given):
        last = op(**given)[1]
        return torch.autograd.grad(last.square().sum(), [given[n] for n in names])

    with on(backend) as device:
        grads = one(pyseq.delta_rule, prepare(arguments, device, requires_grad=True))
    wide = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    exact = one(pyseq.reference.delta_rule, prepare(wide, "cpu", requires_grad=True))
    for name, grad, e in zip(names, grads, exact, strict=True):
        assert_close(grad, e, f"gradient of {name}", "gradient")


# ---- packing ---------------------------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
@pytest.mark.parametrize("ends", [
    [0, 1, 2, 3, 17, 33, 33, 100], [0, 64, 128, 130], [0, 0, 63, 64, 65, 65, 130, 130], [0, 16, 32, 64],
])
def test_sequences_begin_anywhere(ends, correct, backend):
    arguments = drawn(ends[-1], 10, 12, correct=correct, sequences=len(ends) - 1)
    check(arguments | {"cu_seqlens": torch.tensor(ends)}, backend)


def test_a_packed_sequence_has_the_bits_of_one_alone():
    ends = [0, 40, 40, 141, 150]
    arguments = drawn(ends[-1], 10, 12, sequences=4)
    dy = torch.randn(1, ends[-1], 2, 12, generator=torch.Generator().manual_seed(1))

    def one(given, dy):
        given = prepare(given, "cpu", requires_grad=True)
        leaves = [given[n] for n in (*ROWS, "state")]
        y, last = pyseq.delta_rule(**given)
        return torch.autograd.grad([y, last], leaves, [dy, torch.ones_like(last)])

    packed = one(arguments | {"cu_seqlens": torch.tensor(ends)}, dy)
    for i, (begin, end) in enumerate(pairwise(ends)):
        part = {n: arguments[n][:, begin:end] for n in ROWS} | {"state": arguments["state"][i : i + 1]}
        alone = one(arguments | part, dy[:, begin:end])
        for name, whole, grad in zip((*ROWS, "state"), packed, alone, strict=True):
            rows = whole[i : i + 1] if name == "state" else whole[:, begin:end]
            assert torch.equal(rows, grad), name


# ---- extreme decays --------------------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("head", [True, False], ids=["head", "key"])
@pytest.mark.parametrize("g", [0.0, -1e-6, -5.0, -40.0, -60.0, -torch.inf])
def test_one_decay_throughout(g, head, backend):
    arguments = drawn(150, 8, 12)
    arguments["g"] = torch.full_like(arguments["g"][..., 0] if head else arguments["g"], g)
    check(arguments, backend)
    if g == -torch.inf:
        assert (found(arguments, backend)["g"] == 0).all()


@on_backends
def test_a_long_memory_loses_no_digits(backend):
    """The decay of a token is closer to 1 than a float32 can say; its error would add up over the chunks."""
    arguments = drawn(3000, 4, 4, heads=1, correct=False) | {"scale": 0.02}
    arguments["g"] = torch.full_like(arguments["g"], -1.1e-6)
    check(arguments, backend)


@on_backends
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
def test_the_gradient_of_a_strong_decay_is_as_good_as_any(correct, backend):
    """It is a small number beside those that pass its token; as their difference it would be nothing but rounding."""
    arguments = drawn(100, 8, 12, correct=correct)
    strong = (torch.arange(100) % 7 == 3)[None, :, None, None]
    arguments["g"] = torch.where(strong, -20.0, arguments["g"])
    grad, exact = found(arguments, backend)["g"], testing.expected(OP, arguments)[1]["g"]
    strong = strong.expand_as(exact)
    assert 0 < exact[strong].abs().max() < 1e-6
    assert_close(grad[strong], exact[strong], "gradient of the strong decays", "gradient")


@on_backends
def test_nothing_crosses_a_token_that_forgets(backend):
    arguments = drawn(90, 6, 8, correct=False)
    arguments["g"][:, 50] = -torch.inf
    with on(backend) as device:
        given = prepare(arguments, device, requires_grad=True)
        y, _ = pyseq.delta_rule(**given)
        grads = torch.autograd.grad(y[:, 50:].sum(), [given[n] for n in ("k", "v", "g", "state")])
    for grad in grads[:3]:
        assert (grad[:, :50] == 0).all() and grad.isfinite().all()
    assert (grads[2][:, 50] == 0).all() and (grads[3] == 0).all()


# ---- layout, and values that are not numbers -------------------------------------------------------------------------


def test_strides_make_no_difference():
    arguments = drawn(40, 12, 20, batch=2)
    expected = found(arguments)
    wide = {n: torch.stack([arguments[n], arguments[n]], 3)[..., 1, :] for n in ROWS}
    assert not wide["q"].is_contiguous()
    for name, grad in found(arguments | wide).items():
        assert torch.equal(grad, expected[name]), name
    columns = {n: arguments[n].transpose(-1, -2).contiguous().transpose(-1, -2) for n in ROWS}
    for name, grad in found(arguments | columns).items():
        assert torch.equal(grad, expected[name]), name


def test_a_gradient_of_stride_0():
    arguments = prepare(drawn(40, 12, 20) | {"return_state": False}, "cpu", requires_grad=True)
    leaves = [arguments[n] for n in ROWS]
    broadcast = torch.autograd.grad(pyseq.delta_rule(**arguments).sum(), leaves)
    y = pyseq.delta_rule(**arguments)
    for name, grad, full in zip(ROWS, broadcast, torch.autograd.grad(y, leaves, torch.ones_like(y)), strict=True):
        assert torch.equal(grad, full), name


def test_what_is_not_a_number_stays_in_its_head():
    arguments = drawn(70, 9, 12, batch=2)
    expected = found(arguments)
    for name in ("q", "k", "v", "a", "b"):
        spoilt = arguments[name].clone()
        spoilt[0, 30, 1, 0] = torch.nan
        grads = found(arguments | {name: spoilt})
        assert any(grads[n][0, :, 1].isnan().any() for n in ROWS)
        for n in ROWS:
            assert torch.equal(grads[n][:, :, 0], expected[n][:, :, 0]), n
            assert torch.equal(grads[n][1], expected[n][1]), n
