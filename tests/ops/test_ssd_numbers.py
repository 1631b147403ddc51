"""ssd against float64: ragged shapes, sequences that begin anywhere, extreme steps, 16-bit products, unseen values."""

import pytest
import torch
from ssd_inputs import BACKENDS, check, cut, drawn, exact, in_type, packed, without

import pyseq
from pyseq import _library, testing
from pyseq.testing import assert_close, gradients, on, prepare

on_backends = pytest.mark.parametrize("backend", BACKENDS)


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "states"), [
    (1, 1), (3, 16), (8, 8), (16, 20), (17, 33), (32, 64), (64, 65), (65, 128), (64, 256), (130, 16),
])
def test_ragged_widths(width, states, dtype, backend):
    check(in_type(drawn(1, 21, 2, width, states), dtype), backend)


@on_backends
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (7, 1), (6, 2), (6, 6), (10, 2), (9, 1)])
def test_heads_and_groups(heads, groups, backend):
    check(drawn(2, 18, heads, 6, 5, groups), backend)
    check(in_type(drawn(1, 66, heads, 16, 16, groups), torch.bfloat16), backend)


@on_backends
@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 200])
def test_chunks_join(time, backend):
    check(drawn(2, time, 2, 5, 7), backend)


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ends", [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 0, 0, 7, 7, 16, 16, 17, 31, 33, 33], [0, 63, 64, 65, 65, 128, 129],
    [0, 64, 128], [0, 100, 180, 180, 181],
])
def test_sequences_begin_anywhere(ends, dtype, backend):
    check(in_type(packed(ends, heads=2, width=6, states=9), dtype), backend)


@on_backends
def test_long_rows_of_few_heads(backend):
    """Such rows are cut in time by kernels on a GPU."""
    check(drawn(1, 700, 1, 3, 4), backend)
    check(in_type(packed([0, 520, 530, 700], heads=1, width=8, states=16), torch.bfloat16), backend)


@on_backends
@pytest.mark.parametrize("name", ["D", "z", "dt_bias", "state"])
def test_every_option_alone_and_left_out(name, backend):
    arguments = drawn(1, 20, 2, 4, 3) | {"return_state": False}
    options = ("D", "z", "dt_bias", "state")
    check(without(arguments, name), backend)
    check(without(arguments, *(n for n in options if n != name)), backend)


@on_backends
def test_the_skip_per_channel(backend):
    check(drawn(2, 20, 3, 5, 4) | {"D": torch.randn(3, 5)}, backend)


@on_backends
def test_dtypes_mix_on_every_backend(backend):
    arguments = drawn(1, 40, 4, 9, 6, 2)
    for k, name in enumerate(("x", "dt", "B", "C", "z", "A", "D")):
        arguments[name] = arguments[name].to(testing.DTYPES[(k + 1) % 3])
    check(arguments, backend)


@on_backends
def test_only_the_returned_state_has_a_gradient(backend):
    arguments = drawn(1, 70, 2, 5, 4)
    names = ("x", "dt", "A", "B", "state")

    def found(op, given):
        last = op(**given)[1]
        return torch.autograd.grad(last.square().sum(), [given[n] for n in names])

    with on(backend) as device:
        grads = found(pyseq.ssd, prepare(arguments, device, requires_grad=True))
    wide = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    exact_grads = found(pyseq.reference.ssd, prepare(wide, "cpu", requires_grad=True))
    for name, grad, e in zip(names, grads, exact_grads, strict=True):
        assert_close(grad, e, f"gradient of {name}", "gradient")


# ---- extreme values --------------------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("dt", [-40.0, -15.0, 19.0, 21.0, 100.0])
def test_huge_and_tiny_steps(dt, backend):
    arguments = drawn(1, 66, 3, 4, 6)
    arguments["dt"] = dt + arguments["dt"]
    check(arguments, backend)


@on_backends
@pytest.mark.parametrize("A", [[-1e4, -100.0], [-1e-6, 0.0], [-16.0, -1.0], [-1e30, -0.0]])
def test_decay_to_nothing_and_none_at_all(A, backend):
    check(drawn(1, 140, 2, 4, 6) | {"A": torch.tensor(A)}, backend)


@on_backends
def test_a_large_step_costs_the_small_ones_behind_it_no_digits(backend):
    """The sum of steps over a chunk reaches thousands; the decay between its later tokens is near one."""
    arguments = without(drawn(1, 128, 2, 4, 6), "dt_bias") | {"dt_softplus": False}
    dt = torch.full((1, 128, 2), 1e-3)
    dt[:, [3, 70]] = 2000.0
    dt[:, 40] = 50.0
    arguments |= {"dt": dt, "A": torch.tensor([-1.0, -3.0]), "x": arguments["x"] / dt[..., None].sqrt()}
    with on(backend) as device:
        y, last = pyseq.ssd(**prepare(arguments, device, requires_grad=False))
    exact_y, exact_last = exact(arguments)[0]
    for begin, end in ((4, 40), (41, 70), (71, 128)):   # large outputs hide the errors of small ones
        assert_close(y[:, begin:end], exact_y[:, begin:end], f"y from {begin}")
    assert_close(last, exact_last, "state")


@pytest.mark.parametrize("form", ["chunk", "exact", "step"])
def test_memories_of_a_thousand_tokens_keep_their_digits(form):
    """Steady inputs: what rounding the decay would lose with each token adds up. This decay lies between two floats."""
    time, noise = 3000, torch.Generator().manual_seed(0)
    x, B, C = (1 + 0.1 * torch.randn(1, time, *size, generator=noise) for size in ((1, 8), (1, 16), (1, 16)))
    dt, A = torch.full((1, time, 1), 993e-6), torch.full((1,), -1.0)
    a = (dt * A).double().flatten().cumsum(0)[:, None, None]   # exp(-a) stays within 20
    products = dt[0, :, :, None].double() * x[0, :, 0, :, None].double() * B[0].double()
    states = a.exp() * (products * (-a).exp()).cumsum(0)
    exact_y = torch.einsum("tpn,tn->tp", states, C[0, :, 0].double())[None, :, None]
    if form == "step":
        last, tokens = torch.zeros(1, 1, 8, 16), range(time)
        y = [pyseq.ssd_step(last, x[:, t], dt[:, t], A, B[:, t], C[:, t], dt_softplus=False) for t in tokens]
        y = torch.stack(y, 1)
    else:
        options = {"dt_softplus": False, "return_state": True, "exact": form == "exact"}
        y, last = pyseq.ssd(x, dt, A, B, C, **options)
    assert_close(y, exact_y, "y")
    assert_close(last, states[None, None, -1], "state")


@on_backends
def test_a_step_of_zero_leaves_the_state_as_it_is(backend):
    arguments = without(drawn(2, 70, 3, 4, 5), "dt_bias") | {"dt": torch.zeros(2, 70, 3), "dt_softplus": False}
    with on(backend) as device:
        state = pyseq.ssd(**prepare(arguments, device, requires_grad=False))[1].cpu()
    assert torch.equal(state, arguments["state"])


@on_backends
def test_nan_stays_in_its_head_and_reaches_the_tokens_behind(backend):
    arguments = drawn(2, 70, 4, 3, 5, 2)
    arguments["x"][0, 20, 1, 2] = float("nan")
    arguments["dt"][1, 66, 3] = float("nan")
    with on(backend) as device:
        y, state = (t.cpu() for t in pyseq.ssd(**prepare(arguments, device, requires_grad=False)))
    exact_y, exact_state = (t.detach() for t in exact(arguments)[0])
    assert torch.equal(y.isnan(), exact_y.isnan()) and torch.equal(state.isnan(), exact_state.isnan())
    assert exact_y.isnan().any() and not exact_y.isnan().all()


# ---- products of 16-bit operands -------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize(("width", "states"), [(64, 128), (64, 64), (32, 128)])
def test_products_of_bfloat16_round_outputs_and_not_states(width, states, backend):
    arguments = in_type(drawn(1, 150, 2, width, states), torch.bfloat16)
    arguments["dt"] = arguments["dt"] + 1
    with on(backend) as device:
        y, last = pyseq.ssd(**prepare(arguments, device, requires_grad=False))
    exact_y, exact_last = exact(arguments)[0]
    assert_close(y, exact_y, "y", "output", torch.bfloat16)
    assert last.dtype == torch.float32
    assert_close(last, exact_last, "state", "output")


@on_backends
@pytest.mark.parametrize(("states", "size"), [(128, 1.9921875), (256, 1.5), (512, 1.0)])
def test_large_products_of_many_states_fit_their_operands(states, size, backend):
    """Every <C, B> is as large as its operands' type and the number of states allow."""
    arguments = in_type(drawn(1, 9, 2, 8, states), torch.bfloat16)
    arguments |= {n: torch.full_like(arguments[n], size) for n in "BC"}
    check(arguments, backend)


# ---- what nobody looked at -------------------------------------------------------------------------------------------


def kernels_of(backend):
    return _library.REGISTRY["ssd"].kernels["pyseq_simt" if backend == "simt" else "pyseq"]


def call_forward(backend, arguments, ends=None, exact=False):
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")
    options = True, 0.0, float("inf")
    with on(backend) as device:
        tensors = [arguments[n].to(device) for n in names]
        cu_seqlens = None if ends is None else torch.tensor(ends, device=device)
        y, last = kernels_of(backend).forward(*tensors, cu_seqlens, *options, True, exact, 0)
        grads = kernels_of(backend).backward(y, last, *tensors, cu_seqlens, *options, 0)
    return y, last, *grads


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("bad", [0.5, float("nan")])
def test_a_head_that_grows_is_nan_and_the_others_are_not(bad, exact, dtype, backend):
    arguments = in_type(drawn(2, 70, 4, 5, 6, 2), dtype)
    good = arguments["A"].clone()
    arguments["A"][1] = bad
    y, last, dx, ddt, dA, dB, dC, dD, dz, dbias, dstate = call_forward(backend, arguments, exact=exact)
    head = torch.arange(4) == 1
    for t in (y, dx, dz, ddt):
        assert torch.equal(t.isnan().flatten(3).all(-1) if t.dim() > 3 else t.isnan(), head.expand(2, 70, 4))
    for t in (last, dstate):
        assert torch.equal(t.isnan().flatten(2).all(-1), head.expand(2, 4))
    assert all(torch.equal(t.isnan(), head) for t in (dA, dD, dbias))
    assert all(t[:, :, 0].isnan().all() and not t[:, :, 1].isnan().any() for t in (dB, dC))
    one = call_forward(backend, arguments | {"A": good}, exact=exact)
    assert torch.equal(y[:, :, ~head], one[0][:, :, ~head]) and torch.equal(last[:, ~head], one[1][:, ~head])


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ends", [[0, 5, 4], [1, 2, 4], [0, 2, 3], [0, -1, 4], [0, 1 << 40, 4], [-9, 9, 4]])
@pytest.mark.parametrize("time", [4, 300])
def test_bad_offsets_that_nobody_saw_give_nan(time, ends, dtype, backend):
    arguments = in_type(drawn(1, time, 2, 5, 6), dtype) | {"state": torch.zeros(2, 2, 5, 6)}
    ends = [*ends[:-1], time if ends[-1] == 4 else ends[-1]]
    if time == 300 and ends[1] == 5:
        ends[1] = 400
    assert all(t.isnan().all() for t in call_forward(backend, arguments, ends))


@pytest.mark.parametrize("namespace", ["pyseq", *(["pyseq_simt"] if "simt" in BACKENDS else [])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "time", "heads"), [(0, 5, 3), (2, 0, 3), (1, 70, 0), (0, 0, 0)])
def test_an_axis_of_size_zero_runs_forward_and_backward(batch, time, heads, dtype, namespace):
    arguments = in_type(drawn(batch, time, heads, 4, 3), dtype)
    with _library.use_namespace(namespace):   # not on(): with nothing to do nothing is launched
        outputs, grads = gradients(pyseq.ssd, prepare(arguments, "cpu", requires_grad=True))
    exact_outputs, exact_grads = exact(arguments)
    for a, b in zip((*outputs, *grads.values()), (*exact_outputs, *exact_grads.values()), strict=True):
        assert a.shape == b.shape and torch.equal(a.double(), b)


def test_empty_sequences_pass_the_state_and_its_gradient_through():
    arguments = packed([0, 0, 4, 4])
    check(arguments)
    state = arguments["state"].requires_grad_()
    _, last = pyseq.ssd(**arguments)
    assert torch.equal(last[[0, 2]], state[[0, 2]])
    (grad,) = torch.autograd.grad(last[[0, 2]].sum(), state)
    assert torch.equal(grad[[0, 2]], torch.ones(2, 3, 4, 3))


@pytest.mark.parametrize("at", [1, 63, 64, 129])
def test_a_cut_anywhere_changes_rounding_only(at):
    arguments = drawn(2, 130, 2, 5, 16)
    whole, last = pyseq.ssd(**arguments)
    first, state = pyseq.ssd(**cut(arguments, 0, at))
    second, state = pyseq.ssd(**(cut(arguments, at, 130) | {"state": state}))
    assert_close(torch.cat([first, second], 1), whole.double(), "y")
    assert_close(state, last.double(), "state")


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.05, 0.3)])
@pytest.mark.parametrize("name", ["x", "dy"])
def test_gradients_that_a_nan_does_not_reach_stay(name, limit):
    names = ("x", "dt", "A", "B", "C")
    arguments = {n: v for n, v in drawn(1, 140, 2, 3, 4).items() if n in names}
    options = {"dt_softplus": True, "dt_limit": limit}
    given = {**arguments, "dy": torch.randn(1, 140, 2, 3, generator=torch.Generator().manual_seed(1))}
    given[name][0, 80, 1, 2] = float("nan")

    def found(op, given):
        leaves = {n: given[n].requires_grad_() for n in names}
        return torch.autograd.grad(op(**leaves, **options), list(leaves.values()), given["dy"])

    wide = {n: v.detach().double() for n, v in given.items()}
    for n, grad, e in zip(names, found(pyseq.ssd, given), found(pyseq.reference.ssd, wide), strict=True):
        assert torch.equal(grad.isnan(), e.isnan()), f"gradient of {n}"
