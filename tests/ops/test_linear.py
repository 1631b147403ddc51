"""What is linear's own: packed weights, rows that keep their bits, ragged shapes, long sums, and argument errors."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import pyseq
from pyseq.testing import DTYPES, ROUNDING, ROUNDINGS

WEIGHTS = (torch.float32, torch.bfloat16)


def drawn(rows, inputs, outputs, x_dtype=torch.float32, w_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator).to(x_dtype)
    weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(w_dtype)
    return x, weight, torch.randn(outputs, generator=generator)


def assert_right(y, x, weight, bias=None):
    """Within the roundings of assert_close, but of the terms and not of the sums: one of these alone may cancel."""
    terms = exact(x.abs(), weight.abs(), None if bias is None else bias.abs())
    sums = exact(x, weight, bias)
    smallest = torch.finfo(y.dtype).smallest_normal   # below it the spacing of the numbers no longer shrinks
    allowed = 1.01 * ROUNDING[y.dtype] * sums.abs().clamp_min(smallest)
    allowed += ROUNDINGS["output"] * ROUNDING[torch.float32] * terms
    assert ((y.double() - sums).abs() <= allowed).all()


def exact(x, weight, bias=None):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("w_dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [1, 3, 17, 64, 129])
@pytest.mark.parametrize("inputs", [1, 3, 17, 64, 129])
def test_packed_and_plain_match_float64_and_each_other(inputs, outputs, x_dtype, w_dtype):
    for rows in (0, 1, 2, 7, 16, 17, 33):
        x, weight, bias = drawn(rows, inputs, outputs, x_dtype, w_dtype)
        packed = pyseq.pack_linear(weight)
        biases = bias, bias.to(torch.bfloat16), bias.to(torch.float16), bias.double()
        for b in (None, *biases[: 4 if rows == 7 else 1]):
            y = pyseq.linear(x, packed, b)
            assert y.dtype == x_dtype
            assert_right(y, x, weight, b)
            assert torch.equal(y, pyseq.linear(x, weight, b))


@pytest.mark.parametrize("w_dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_batch(x_dtype, w_dtype):
    x, weight, bias = drawn(512, 300, 200, x_dtype, w_dtype)
    packed = pyseq.pack_linear(weight)
    whole = pyseq.linear(x, packed, bias)
    assert_right(whole, x, weight, bias)
    for rows in (1, 2, 3, 5, 7, 14, 16, 17, 211, 499):
        assert torch.equal(pyseq.linear(x[-rows:], packed, bias), whole[-rows:]), rows
        assert torch.equal(pyseq.linear(x[-rows:], weight, bias), whole[-rows:]), rows


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
def test_sums_longer_than_one_pass(dtype):
    x, weight, bias = drawn(3, 9001, 37, dtype, dtype)
    whole = pyseq.linear(x, pyseq.pack_linear(weight), bias)
    assert_right(whole, x, weight, bias)
    assert torch.equal(whole[1:2], pyseq.linear(x[1:2], weight, bias))


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
def test_more_rows_than_one_pass(dtype):
    x, weight, _ = drawn(1200, 4096, 33, dtype, dtype)
    y = pyseq.linear(x, weight)
    assert_right(y, x, weight)
    assert torch.equal(y[-1:], pyseq.linear(x[-1:], weight))


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (31, 7), (32, 8), (33, 9), (100, 515)])
def test_pack_keeps_every_bit_and_the_size(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    packed = pyseq.pack_linear(weight)
    assert torch.equal(packed.unpack(), weight)
    assert packed.shape == weight.shape and packed.dtype == dtype and packed.device == weight.device
    outputs, inputs = -(-shape[0] // 32) * 32, shape[1] + (shape[1] % 2 if dtype == torch.bfloat16 else 0)
    assert packed.nbytes == outputs * inputs * dtype.itemsize
    assert repr(packed) == f"PackedLinear(shape={list(shape)}, dtype={str(dtype)[6:]}, nbytes={packed.nbytes})"
    assert torch.equal(pyseq.pack_linear(weight.T.contiguous().T).panels, packed.panels)


def test_strided_x_and_leading_axes():
    x, weight, bias = drawn(24, 40, 33)
    packed = pyseq.pack_linear(weight)
    whole = pyseq.linear(x, packed, bias)
    for moved in (
        torch.cat([x, x], 1)[:, :40], x.T.contiguous().T, torch.stack([x, x], 2)[..., 0],
        x.reshape(4, 6, 40).transpose(0, 1).contiguous().transpose(0, 1), x.reshape(2, 3, 4, 40),
    ):
        assert torch.equal(pyseq.linear(moved, packed, bias), whole.reshape(*moved.shape[:-1], 33))
    assert torch.equal(pyseq.linear(x[0], packed, bias), whole[0])


def test_bits_do_not_depend_on_the_threads():
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            for rows in (1, 8, 300):
                x, weight, bias = drawn(rows, 700, 1000)
                results.append(pyseq.linear(x, pyseq.pack_linear(weight), bias))
    finally:
        torch.set_num_threads(threads)
    for k, y in enumerate(results):
        assert torch.equal(y, results[k % 3])


PACKED_BITS = """
import sys, torch, pyseq
results = []
for x_dtype in (torch.float32, torch.bfloat16, torch.float16):
    for w_dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 2, 5, 16, 40):
            torch.manual_seed(rows)
            x, w = torch.randn(rows, 515).to(x_dtype), torch.randn(70, 515).to(w_dtype)
            results.append(pyseq.linear(x, pyseq.pack_linear(w)))
torch.save(results, sys.argv[1])
"""


def test_instruction_sets_with_fma_agree_in_bits(tmp_path):
    results = []
    for level in range(3, pyseq._C.cpu_level_of_machine + 1):
        path = str(tmp_path / f"v{level}.pt")
        env = os.environ | {"PYSEQ_CPU": f"v{level}"}
        subprocess.run([sys.executable, "-c", PACKED_BITS, path], check=True, env=env)
        results.append(torch.load(path, weights_only=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_packed_weights_pass_the_gradient_on_and_take_none():
    x, weight, bias = drawn(6, 20, 30)
    x.requires_grad_()
    bias.requires_grad_()
    packed = pyseq.pack_linear(weight.requires_grad_())
    assert not packed.panels.requires_grad
    y = pyseq.linear(x, packed, bias)
    dy = torch.randn_like(y)
    dx, db = torch.autograd.grad(y, (x, bias), dy)
    exact_dx, exact_db, _ = torch.autograd.grad(pyseq.linear(x, weight, bias), (x, bias, weight), dy)
    assert torch.equal(dx, exact_dx) and torch.equal(db, exact_db)


def test_packed_weights_compile_and_export():
    x, weight, bias = drawn(3, 20, 30)

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = pyseq.pack_linear(weight)

        def forward(self, x):
            return pyseq.linear(x, self.weight, bias)

    y = Head()(x)
    assert torch.equal(torch.compile(Head(), fullgraph=True)(x), y)
    assert torch.equal(torch.export.export(Head(), (x,)).module()(x), y)


def test_float64_x_with_a_packed_weight_runs_through_the_reference():
    x, weight, _ = drawn(3, 20, 30)
    assert torch.equal(pyseq.linear(x.double(), pyseq.pack_linear(weight)), exact(x, weight))


def test_infinities_and_nan_reach_their_own_outputs_only():
    x, weight, _ = drawn(9, 40, 33)
    x[4, 7], x[5, 7] = float("inf"), float("nan")
    y, clean = pyseq.linear(x, weight), pyseq.linear(x.nan_to_num(0, 0, 0), weight)
    assert y[5].isnan().all() and y[4].isinf().all()
    rest = [0, 1, 2, 3, 6, 7, 8]
    assert torch.equal(y[rest], clean[rest])


def test_explain_tells_how_the_weight_and_the_products_are_read():
    x, weight, _ = drawn(3, 20, 30, torch.bfloat16, torch.bfloat16)
    plain = pyseq.explain(pyseq.linear, x, weight)
    packed = pyseq.explain(pyseq.linear, x.float(), pyseq.pack_linear(weight), torch.zeros(30, dtype=torch.float16))
    assert plain.kernel == packed.kernel == f"cpu v{pyseq._C.cpu_level}"
    assert "pack_linear does it once" in plain.notes[0] and packed.notes[0] == "weight is packed"
    assert ("vdpbf16ps" in plain.notes[1]) == pyseq._C.cpu_has_avx512_bf16 and "of float32" in packed.notes[1]
    assert packed.notes[2] == "bias is float16: read as float32, converted first"
    assert pyseq.explain(pyseq.linear, torch.stack([x, x], 2)[..., 0], weight).notes[2].startswith("x is copied first")


def test_panels_of_another_shape_or_dtype_are_refused():
    x, packed = torch.ones(2, 300), pyseq.pack_linear(torch.randn(70, 300))
    for panels in (torch.zeros(1), packed.panels[:2], packed.panels.bfloat16(), packed.panels.half()):
        with pytest.raises(ValueError, match="PackedLinear: panels has shape"):
            pyseq.PackedLinear(panels, 70, 300)
        changed = pyseq.pack_linear(torch.randn(70, 300))
        changed.panels = panels
        with pytest.raises(RuntimeError, match="weight"):
            pyseq.linear(x, changed)


PACKED = pyseq.pack_linear(torch.ones(4, 3))


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"x": [1.0]}, TypeError, "x is list"),
    ({"x": torch.zeros(())}, ValueError, r"x has shape \[\]"),
    ({"x": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "x has dtype int32"),
    ({"x": torch.zeros(2, 5)}, ValueError, r"weight has shape \[4, 3\], expected \[out, in\] with in = 5 \(from x\)"),
    ({"weight": None}, TypeError, "weight is NoneType"),
    ({"weight": torch.zeros(3)}, ValueError, r"weight has shape \[3\]"),
    ({"weight": torch.zeros(4, 3, dtype=torch.int8)}, TypeError, "weight has dtype int8"),
    ({"weight": torch.zeros(4, 3, dtype=torch.float64)}, TypeError, "weight has dtype float64"),
    ({"weight": torch.zeros(0, 3)}, ValueError, r"weight has shape \[0, 3\]"),
    ({"weight": torch.zeros(4, 3, device="meta")}, ValueError, "weight is on device meta"),
    ({"x": torch.zeros(2, 5), "weight": PACKED}, ValueError, r"weight is packed from shape \[4, 3\]"),
    ({"x": torch.zeros(2, 3, device="meta"), "weight": PACKED}, ValueError, "weight is on device cpu"),
    ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \[3\], expected \[out\] with out = 4"),
    ({"weight": PACKED, "bias": torch.zeros(3)}, ValueError, r"bias has shape \[3\], expected \[out\] with out = 4"),
    ({"bias": torch.zeros(4, dtype=torch.int64)}, TypeError, "bias has dtype int64"),
])
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        pyseq.linear(**({"x": torch.zeros(2, 3), "weight": torch.zeros(4, 3)} | arguments))


@pytest.mark.parametrize(("weight", "error", "message"), [
    (3, TypeError, "weight is int"),
    (torch.zeros(3), ValueError, r"weight has shape \[3\]"),
    (torch.zeros(2, 3, dtype=torch.float16), TypeError, "weight has dtype float16, expected float32, bfloat16"),
    (torch.zeros(2, 0), ValueError, r"weight has shape \[2, 0\]"),
])
def test_what_cannot_be_packed_is_named(weight, error, message):
    with pytest.raises(error, match=message):
        pyseq.pack_linear(weight)
