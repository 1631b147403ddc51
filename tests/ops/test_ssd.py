"""What is ssd's own: golden values, its equal among scans, chunks, limits, the exact form, steps, and its arguments."""

import pytest
import torch
from ssd_inputs import BACKENDS, check, cut, drawn, exact, packed, token, wave, without

import pyseq
from pyseq.testing import assert_close, gradients, on, prepare

on_backends = pytest.mark.parametrize("backend", BACKENDS)


@on_backends
@pytest.mark.parametrize("form", ["reference", "chunks", "exact"])
def test_golden_values(form, backend):
    """b 1, L 5, H 2, P 2, G 1, N 2, from the state given; the loss adds up the final state."""
    dtype, atol = (torch.float64, 2e-9) if form == "reference" else (torch.float32, 1e-5)
    x, dt, A = wave(0.1, 1, 5, 2, 2), wave(0.2, 1, 5, 2), -torch.exp(wave(0.3, 2))
    leaves = [x, dt, A, wave(0.4, 1, 5, 1, 2), wave(0.5, 1, 5, 1, 2), wave(0.6, 2), wave(0.7, 2), wave(0.8, 1, 2, 2, 2)]
    leaves = [t.to(dtype).requires_grad_() for t in leaves]
    if form == "reference":
        y, last = pyseq.ssd(*leaves[:6], None, leaves[6], dt_softplus=True, state=leaves[7], return_state=True)
        grads = torch.autograd.grad((y * wave(0.9, 1, 5, 2, 2)).sum() + last.sum(), leaves)
    else:
        with on(backend) as device:
            given = [t.detach().to(device).requires_grad_() for t in leaves]
            y, last = pyseq.ssd(
                *given[:6], None, given[6], dt_softplus=True, state=given[7], return_state=True, exact=form == "exact"
            )
            loss = (y * wave(0.9, 1, 5, 2, 2).to(y)).sum() + last.sum()
            grads = [g.cpu() for g in torch.autograd.grad(loss, given)]
    out = [0.431957726, 1.403040153, 2.903651898, 2.352238812, 0.700011850, -1.163708740]
    first = y.detach().double().cpu().flatten()
    torch.testing.assert_close(first[:6], torch.tensor(out, dtype=torch.float64), atol=atol, rtol=0)
    dx, ddt, dA, dB, dC, dD, _, dstate = (g.double() for g in grads)
    found = [first.sum(), last.detach().double().cpu().sum(), *(g.sum() for g in (dx, ddt, dB, dC, dstate)), *dA, *dD]
    wanted = [1.501318241, -0.246670886, -2.678195539, 4.636453955, 6.670675398, 5.676191238, 0.478120278,
              -0.128157556, -0.101877555, 1.346499605, 5.745208396]  # fmt: skip
    torch.testing.assert_close(
        torch.stack(found), torch.tensor(wanted, dtype=torch.float64), atol=5 * atol, rtol=0
    )


@on_backends
@pytest.mark.parametrize("options", [(), ("z", "dt_bias", "D"), ("state",)])
def test_it_is_the_selective_scan_with_repeated_parameters(options, backend):
    """A channel (h, p) of the scan has A[h] in every state, and the dt of its head."""
    given = without(drawn(2, 70, 4, 5, 6, 2), *options) | {"return_state": False}

    def scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, state=None, **_):
        batch, time, heads, width = x.shape
        repeat = lambda t, axis: None if t is None else t.repeat_interleave(width, axis)  # noqa: E731
        flat = lambda t: None if t is None else t.reshape(batch, time, heads * width)  # noqa: E731
        y = pyseq.selective_scan(
            flat(x), repeat(dt, 2), repeat(A, 0)[:, None].expand(-1, B.shape[-1]), B, C, repeat(D, 0), flat(z),
            repeat(dt_bias, 0), dt_softplus=True, state=None if state is None else state.flatten(1, 2),
        )  # fmt: skip
        return y.view(x.shape)

    with on(backend) as device:
        (y,), grads = gradients(pyseq.ssd, prepare(given, device, requires_grad=True))
        (other,), other_grads = gradients(scan, prepare(given, device, requires_grad=True))
    assert_close(y, other.double(), "y")
    for name, grad in grads.items():
        assert_close(grad, other_grads[name].double(), f"gradient of {name}", "gradient")


@pytest.mark.parametrize("chunk", [16, 17, 32, 64, 100, 128, 256])
def test_the_chunk_size_changes_nothing_but_rounding(chunk):
    check(drawn(1, 300, 3, 9, 20) | {"chunk_size": chunk})
    check(packed([0, 3, 3, 60, 260], heads=2, width=5) | {"chunk_size": chunk})


@on_backends
def test_a_cut_off_step_has_no_gradient(backend):
    arguments = drawn(1, 40, 2, 3, 4) | {"dt_limit": (0.15, 0.5)}
    check(arguments, backend)
    with on(backend) as device:
        _, grads = gradients(pyseq.ssd, prepare(arguments, device, requires_grad=True))
    delta = torch.nn.functional.softplus(arguments["dt"] + arguments["dt_bias"])
    outside = (delta < 0.15) | (delta > 0.5)
    assert outside.any() and not outside.all()
    assert torch.equal(grads["dt"].cpu() == 0, outside)


@on_backends
def test_a_step_below_zero_is_cut_off_without_softplus(backend):
    check(without(drawn(1, 20, 2, 3, 4), "dt_bias") | {"dt_softplus": False}, backend)


# ---- the exact form, and steps ---------------------------------------------------------------------------------------


def stepped(arguments):
    options = {n: arguments[n] for n in ("A", "D", "dt_bias", "dt_softplus", "dt_limit") if n in arguments}
    state = arguments["state"].clone()
    times = range(arguments["x"].shape[1])
    return torch.stack([pyseq.ssd_step(state, **token(arguments, t), **options) for t in times], 1), state


@on_backends
@pytest.mark.parametrize(("width", "states"), [(4, 3), (20, 17), (64, 128), (5, 260)])
def test_exact_is_step_by_step_bit_for_bit(width, states, backend):
    arguments = drawn(2, 4, 2, width, states) | {"dt_limit": (0.01, 1.0)}
    with on(backend) as device:
        given = prepare(arguments, device, requires_grad=False)
        y, last = pyseq.ssd(**given, exact=True)
        one, state = stepped(given)
    assert torch.equal(y, one) and torch.equal(last, state)


@on_backends
@pytest.mark.parametrize("at", [1, 31, 64, 69])
def test_exact_does_not_depend_on_a_cut(at, backend):
    arguments = drawn(1, 70, 2, 6, 20) | {"exact": True}
    with on(backend) as device:
        given = prepare(arguments, device, requires_grad=False)
        whole, last = pyseq.ssd(**given)
        first, state = pyseq.ssd(**cut(given, 0, at))
        second, state = pyseq.ssd(**(cut(given, at, 70) | {"state": state}))
    assert torch.equal(torch.cat([first, second], 1), whole) and torch.equal(state, last)


@on_backends
def test_exact_does_not_depend_on_packing(backend):
    ends = [0, 3, 3, 40, 66]
    arguments = packed(ends, heads=2, width=6, states=20) | {"exact": True}
    with on(backend) as device:
        given = prepare(arguments, device, requires_grad=False)
        y, last = pyseq.ssd(**given)
        for s in range(4):
            alone = cut(without(given, "cu_seqlens"), ends[s], ends[s + 1]) | {"state": given["state"][s : s + 1]}
            one, state = pyseq.ssd(**alone)
            assert torch.equal(y[:, ends[s] : ends[s + 1]], one) and torch.equal(last[s : s + 1], state)


@on_backends
def test_the_gradient_of_the_exact_form_is_that_of_the_chunks(backend):
    check(drawn(1, 70, 2, 6, 20) | {"exact": True}, backend)


@on_backends
@pytest.mark.parametrize(("width", "states"), [(4, 3), (16, 16), (33, 40), (64, 128)])
def test_a_bfloat16_state_is_rounded_once(width, states, backend):
    arguments = drawn(3, 1, 2, width, states)
    arguments["state"] = arguments["state"].bfloat16()
    with on(backend) as device:
        given = prepare(arguments, device, requires_grad=False)
        y, state = stepped(given)
        whole, last = pyseq.ssd(**(given | {"state": given["state"].float(), "exact": True}))
    assert torch.equal(y, whole) and torch.equal(state, last.bfloat16())


@on_backends
def test_a_state_with_strides_is_updated_where_it_lies(backend):
    arguments = drawn(2, 1, 3, 4, 4)
    for columns in (slice(None, None, 2), slice(1, 5)):
        wide = torch.full((2, 3, 4, 8), float("nan"))
        wide[..., columns] = arguments["state"]
        with on(backend) as device:
            given, wide = prepare(arguments, device, requires_grad=False), wide.to(device)
            options = {n: given[n] for n in ("A", "D", "dt_bias", "dt_softplus")}
            pyseq.ssd_step(wide[..., columns], **token(given, 0), **options)
            assert_close(wide[..., columns], pyseq.ssd(**given)[1].double(), "state")
        assert wide.isnan().sum() == wide.numel() // 2


def test_a_step_refuses_a_gradient():
    arguments = drawn(1, 1)
    A = arguments["A"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"pyseq\.ssd on a sequence of length 1"):
        pyseq.ssd_step(arguments["state"], A=A, **token(arguments, 0))
    with torch.no_grad():
        pyseq.ssd_step(arguments["state"], A=A, **token(arguments, 0))


# ---- what is kept, and what is told ----------------------------------------------------------------------------------


def test_training_keeps_nothing_but_the_arguments():
    arguments = drawn(1, 200, 2, 8, 16)
    arguments["x"].requires_grad_()
    given = {v.data_ptr() for v in arguments.values() if isinstance(v, torch.Tensor)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        pyseq.ssd(**arguments)
    assert kept and all(t.data_ptr() in given for t in kept)


def test_explain_names_the_kernel_and_the_copies():
    arguments = drawn()
    told = pyseq.explain(pyseq.ssd, **(arguments | {"A": arguments["A"].bfloat16()}))
    assert told.kernel.startswith("cpu v") and told.notes == ("A is bfloat16: read as float32, converted first",)
    swapped = arguments["x"].transpose(2, 3).contiguous().transpose(2, 3)
    assert "x is copied first" in pyseq.explain(pyseq.ssd, **(arguments | {"x": swapped})).notes[0]


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"x": 3}, TypeError, "x is int"),
    ({"x": torch.zeros(2, 5, 3)}, ValueError, r"x has shape \[2, 5, 3\], expected \[B, T, H, P\]"),
    ({"x": torch.zeros(2, 5, 3, 0)}, ValueError, "x is of width P = 0"),
    ({"dt": torch.zeros(2, 5, 4)}, ValueError, r"dt has shape \[2, 5, 4\], expected .*H = 3 \(from x\)"),
    ({"A": torch.zeros(3, 3)}, ValueError, "A has shape"),
    ({"A": torch.tensor([-1.0, -2.0, 0.5])}, ValueError, r"A is 0.5 at head 2, expected A <= 0.*pyseq.selective_scan"),
    ({"B": torch.zeros(2, 5, 3)}, ValueError, r"B has shape \[2, 5, 3\], expected \[B, T, G, N\]"),
    ({"B": torch.zeros(2, 5, 1, 0)}, ValueError, "C has shape"),
    ({"B": torch.zeros(2, 5, 1, 0), "C": torch.zeros(2, 5, 1, 0)}, ValueError, "B is of width N = 0"),
    ({"B": torch.zeros(2, 5, 2, 3), "C": torch.zeros(2, 5, 2, 3)}, ValueError, "B is of G = 2 groups, expected G, a"),
    ({"C": torch.zeros(2, 5, 3, 3)}, ValueError, r"C has shape .* G = 1 \(from B\)"),
    ({"D": torch.zeros(4)}, ValueError, r"D has shape \[4\], expected \[H\]"),
    ({"D": torch.zeros(3, 5)}, ValueError, r"D has shape \[3, 5\], expected \[H, P\]"),
    ({"z": torch.zeros(2, 5, 12)}, ValueError, "z has shape"),
    ({"dt_bias": torch.zeros(1)}, ValueError, "dt_bias has shape"),
    ({"state": torch.zeros(2, 3, 3, 4)}, ValueError, "state has shape"),
    ({"state": torch.zeros(2, 3, 4, 3, dtype=torch.bfloat16)}, TypeError, "state has dtype bfloat16, expected float32"),
    ({"dt_softplus": None}, TypeError, "dt_softplus is NoneType, expected True or False"),
    ({"exact": 1}, TypeError, "exact is int, expected True or False"),
    ({"dt_limit": 3.0}, TypeError, r"dt_limit is 3.0, expected two numbers \(low, high\)"),
    ({"dt_limit": (0.0, "inf")}, TypeError, "dt_limit is"),
    ({"dt_limit": (-1.0, 1.0)}, ValueError, "dt_limit is .*expected 0 <= low <= high: pyseq.selective_scan"),
    ({"dt_limit": (2.0, 1.0)}, ValueError, "dt_limit is"),
    ({"dt_limit": (0.0, float("nan"))}, ValueError, "dt_limit is"),
    ({"chunk_size": 8}, ValueError, "chunk_size is 8, expected 16 to 256"),
    ({"chunk_size": 64.0}, TypeError, "chunk_size is float, expected an integer or None"),
    ({"dt": torch.zeros(2, 5, 3, device="meta")}, ValueError, "dt is on device meta"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens packs sequences into a batch of 1, but B is 2"),
])
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        pyseq.ssd(**(drawn() | change))


def test_a_step_names_what_is_wrong():
    arguments = drawn(1, 1)
    rows, A = token(arguments, 0), arguments["A"]
    expanded = torch.zeros(1, 3, 4, 1).expand(1, 3, 4, 3)   # every write would land on its neighbours
    for state, error in (
        (torch.zeros(1, 3, 4, 4), ValueError), (expanded, ValueError),
        (torch.zeros(1, 3, 4, 3, dtype=torch.float16), TypeError),
    ):
        with pytest.raises(error, match=r"ssd_step: state (has|is expanded)"):
            pyseq.ssd_step(state, A=A, **rows)
    with pytest.raises(ValueError, match=r"A is .* at head 0, expected A <= 0.*selective_scan_step takes any A"):
        pyseq.ssd_step(arguments["state"], A=-A, **rows)


def of_heads(arguments, heads):
    some = dict(arguments)
    some |= {n: arguments[n][:, :, heads] for n in ("x", "z", "dt")} | {"state": arguments["state"][:, heads]}
    some |= {n: arguments[n][heads] for n in ("A", "D", "dt_bias")}
    return exact(some)[0]


def test_positive_A_is_found_in_every_eager_call_and_in_no_compiled_one():
    arguments = drawn(1, 3) | {"A": torch.tensor([-1.0, 0.5, -1.0])}
    with pytest.raises(ValueError, match=r"A is 0\.5 at head 1"):
        pyseq.ssd(**arguments)
    y, last = torch.compile(pyseq.ssd, fullgraph=True, backend="eager")(**arguments)
    assert y[:, :, 1].isnan().all() and last[:, 1].isnan().all()
    good = [0, 2]
    exact_y, exact_last = of_heads(arguments, good)
    assert_close(y[:, :, good], exact_y, "y")
    assert_close(last[:, good], exact_last, "state")
    wide = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    y, _ = torch.compile(pyseq.ssd, fullgraph=True, backend="eager")(**wide)
    assert y[:, :, 1].isnan().all() and not y[:, :, good].isnan().any()

