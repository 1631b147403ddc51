"""What is selective_scan's own: golden values, extreme step sizes, what is saved, and the errors of its arguments."""

import pytest
import torch

import pyseq
from pyseq import _library, testing
from pyseq.testing import assert_close, gradients, on, prepare

BACKENDS = testing.backends(_library.REGISTRY["selective_scan"])
on_backends = pytest.mark.parametrize("backend", BACKENDS)


def wave(offset, *shape):
    n = torch.Size(shape).numel()
    return torch.sin(0.7 * torch.arange(n, dtype=torch.float64) + offset).reshape(shape)


def drawn(batch=2, time=5, dim=7, states=3, groups=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    shared = (batch, time, states) if groups is None else (batch, time, groups, states)
    return {
        "u": normal(batch, time, dim), "dt": normal(batch, time, dim), "A": -normal(dim, states).exp(),
        "B": normal(*shared), "C": normal(*shared), "D": normal(dim), "z": normal(batch, time, dim),
        "dt_bias": normal(dim) - 2, "dt_softplus": True, "state": normal(batch, dim, states), "return_state": True,
    }


def exact(arguments):
    outputs, grads = gradients(pyseq.reference.selective_scan, prepare(
        {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in arguments.items()},
        "cpu", requires_grad=True,
    ))
    return outputs, grads


def check(arguments, backend="cpu"):
    with on(backend) as device:
        outputs, grads = gradients(pyseq.selective_scan, prepare(arguments, device, requires_grad=True))
    exact_outputs, exact_grads = exact(arguments)
    for k, (y, e) in enumerate(zip(outputs, exact_outputs, strict=True)):
        assert_close(y, e, f"output {k}")
    for name, grad in grads.items():
        assert_close(grad, exact_grads[name], f"gradient of {name}", "gradient")


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 2e-9), (torch.float32, 1e-5)])
def test_golden_values(dtype, atol):
    """b 1, D 2, N 3, L 4; the golden tensors are laid out (b, D, L) and (b, N, L)."""
    u, dt, z = (wave(o, 1, 2, 4).transpose(1, 2) for o in (0.1, 0.2, 0.3))
    B, C = (wave(o, 1, 3, 4).transpose(1, 2) for o in (0.5, 0.6))
    leaves = [u, dt, -torch.exp(wave(0.4, 2, 3)), B, C, wave(0.7, 2), z, wave(0.8, 2)]
    leaves = [t.to(dtype).contiguous().requires_grad_() for t in leaves]
    y, state = pyseq.selective_scan(*leaves, dt_softplus=True, return_state=True)
    out = [0.017807536, 1.569041739, 4.275325826, 1.258220919, 0.007349252, 0.252607337]
    first = y.detach().transpose(1, 2).flatten()
    torch.testing.assert_close(first[:6].double(), torch.tensor(out, dtype=torch.float64), atol=atol, rtol=0)
    grads = torch.autograd.grad((y * wave(0.9, 1, 2, 4).transpose(1, 2).to(dtype)).sum(), leaves)
    sums = [7.676821792, 1.342171410, -0.065131390, 1.209495635, 1.148579396, None, 7.309886277, None]
    found = [first.sum(), state.detach().sum(), *(g.sum() for g, s in zip(grads, sums, strict=True) if s is not None)]
    wanted = [8.973738422, 0.260126447, *(s for s in sums if s is not None)]
    torch.testing.assert_close(
        torch.stack(found).double(), torch.tensor(wanted, dtype=torch.float64), atol=5 * atol, rtol=0
    )
    vectors = torch.cat([grads[5], grads[7]]).double()
    golden = torch.tensor([1.023994001, -0.435075143, 1.904318504, -0.562147094], dtype=torch.float64)
    torch.testing.assert_close(vectors, golden, atol=2 * atol, rtol=0)


@on_backends
@pytest.mark.parametrize("states", [1, 3, 4, 8, 16, 17, 32, 40, 64, 100])
@pytest.mark.parametrize(("dim", "groups"), [(5, None), (33, 1), (34, 2), (20, 20)])
def test_ragged_widths_and_groups(states, dim, groups, backend):
    check(drawn(2, 9, dim, states, groups), backend)


@on_backends
def test_more_channels_than_one_block_of_the_backward(backend):
    check(drawn(1, 70, 290, 3, 2), backend)


# Around the tokens that a kernel brings in at once, the chunks of checkpoints, and the 256 tokens from which on a GPU's
# kernels cut rows in time where rows and channels are few.
@on_backends
@pytest.mark.parametrize("time", [15, 16, 17, 63, 64, 65, 513, 800])
def test_pieces_of_time_join(time, backend):
    check(drawn(2, time, 6, 7), backend)


@pytest.mark.skipif("simt" not in BACKENDS, reason="the emulator was not built")
@pytest.mark.parametrize(("time", "states", "cut"), [(511, 4, False), (512, 4, True), (520, 70, True)])
def test_few_rows_and_channels_are_cut_in_time(time, states, cut):
    arguments = drawn(1, time, 5, states) | {"state": None}
    _library._simt.reset()
    with on("simt"):
        pyseq.selective_scan(**arguments)
        assert ("selective_scan_carry_kernel" in _library._simt.launches()) == cut


def packed(ends, dim=6, states=5, seed=0):
    arguments = drawn(1, ends[-1], dim, states, seed=seed) | {"cu_seqlens": torch.tensor(ends)}
    return arguments | {"state": torch.randn(len(ends) - 1, dim, states, generator=torch.Generator().manual_seed(seed))}


@on_backends
@pytest.mark.parametrize("ends", [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 0, 0, 7, 7, 16, 16, 17, 31, 33, 33], [0, 63, 64, 65, 65, 128, 129],
    [0, 64, 128, 192], [0, 100, 320, 320, 321, 515, 515], [0, 0, 257, 520],
])
def test_sequences_begin_anywhere(ends, backend):
    check(packed(ends), backend)


@on_backends
def test_sequences_begin_anywhere_with_more_states_than_registers_hold(backend):
    check(packed([0, 3, 3, 16, 64, 65], states=66), backend)
    check(packed([0, 300, 513], dim=2, states=66), backend)


@on_backends
@pytest.mark.parametrize("ends", [[0, 20, 20, 41], [0, 300, 512]])
def test_growing_sequences_are_packed(ends, backend):
    arguments = packed(ends)
    arguments["A"] = arguments["A"].abs().clamp(0, 1)
    arguments["dt"] = arguments["dt"] - 4 * (ends[-1] > 100)
    check(arguments, backend)


@on_backends
@pytest.mark.parametrize("ends", [[0, 100, 141], [0, 300, 600]])
def test_an_overflow_stays_in_its_sequence(ends, backend):
    arguments = packed(ends)
    arguments["A"] = 2 + arguments["A"].abs()
    arguments["dt"] += torch.where(torch.arange(ends[-1]) < ends[1], 6, -6)[:, None]
    with on(backend) as device:
        y, state = pyseq.selective_scan(**prepare(arguments, device, requires_grad=False))
    assert not state[0].isfinite().any()
    alone = {n: arguments[n][:, ends[1] :] for n in ("u", "dt", "B", "C", "z")}
    alone |= {"cu_seqlens": None, "state": arguments["state"][1:]}
    exact_y, exact_state = (t.detach() for t in exact(arguments | alone)[0])
    assert_close(y[:, ends[1] :], exact_y, "y")
    assert_close(state[1:], exact_state, "state")


@on_backends
def test_a_gradient_that_overflows_stays_in_its_sequence(backend):
    arguments = packed([0, 400, 1100], dim=3) | {"return_state": False}
    arguments["A"] = 2 + arguments["A"].abs()
    arguments["dt"] += torch.where(torch.arange(1100) < 400, -6, 6)[:, None]
    time = ("u", "dt", "B", "C", "z")
    with on(backend) as device:
        _, grads = gradients(pyseq.selective_scan, prepare(arguments, device, requires_grad=True))
    assert not grads["u"][:, 400:].isfinite().all()
    alone = {n: arguments[n][:, :400] for n in time} | {"cu_seqlens": None, "state": arguments["state"][:1]}
    _, exact_grads = exact(arguments | alone)
    for name in time:
        assert_close(grads[name][:, :400], exact_grads[name], f"gradient of {name}", "gradient")
    assert_close(grads["state"][:1], exact_grads["state"], "gradient of state", "gradient")


@on_backends
def test_no_gradient_behind_a_cut_stays_none_however_much_it_would_grow(backend):
    """exp(A sum delta) over a cut of a row overflows; what it multiplies is zero."""
    arguments = drawn(1, 1100, 3, 4) | {"state": None, "u": torch.zeros(1, 1100, 3), "return_state": False}
    arguments |= {"A": torch.full((3, 4), 0.5), "dt": torch.ones(1, 1100, 3), "dt_bias": None, "dt_softplus": False}
    names = ("u", "dt", "A", "B", "C", "D", "z")

    def found(op, given):
        leaves = [given[n].detach().requires_grad_() for n in names]
        y = op(*leaves)
        return dict(zip(names, torch.autograd.grad(y[:, :20].sum(), leaves), strict=True))

    with on(backend) as device:
        grads = found(pyseq.selective_scan, prepare(arguments, device, requires_grad=False))
    exact_grads = found(pyseq.reference.selective_scan, {n: arguments[n].double() for n in names})
    for name, grad in grads.items():
        assert_close(grad, exact_grads[name], f"gradient of {name}", "gradient")


@on_backends
@pytest.mark.parametrize("ends", [[0, 1100], [0, 320, 320, 960, 1100], [0, 2600], [0, 2100, 2570]])
def test_gradients_that_fade_slowly_cross_the_cuts_of_time(ends, backend):
    arguments = packed(ends, dim=3)
    arguments["A"] *= 0.01
    check(arguments, backend)


@on_backends
@pytest.mark.parametrize("time", [40, 530])
def test_dtypes_mix_on_every_backend(time, backend):
    arguments = drawn(1, time, 9, 6, 3)
    for k, name in enumerate(("u", "dt", "B", "C", "z", "A", "D")):
        arguments[name] = arguments[name].to(testing.DTYPES[(k + 1) % 3])
    check(arguments, backend)


# Whole tiles of bfloat16 have a kernel of their own on a GPU. A dt that is not aligned sends the same numbers through
# the other.
@pytest.mark.skipif("simt" not in BACKENDS, reason="the emulator was not built")
@pytest.mark.parametrize(("time", "dim", "groups", "ends"), [
    (5, 32, None, None), (37, 96, None, None), (16, 64, 2, None), (130, 32, 1, [0, 3, 3, 63, 64, 100, 130]),
    (529, 32, None, None), (600, 32, None, [0, 300, 300, 600]),
])
def test_whole_tiles_have_the_bits_of_others(time, dim, groups, ends):
    arguments = drawn(1 if ends else 2, time, dim, 16, groups)
    if ends:
        state = torch.randn(len(ends) - 1, dim, 16, generator=torch.Generator().manual_seed(0))
        arguments |= {"cu_seqlens": torch.tensor(ends), "state": state}
    for name in ("u", "dt", "B", "C", "z"):
        arguments[name] = arguments[name].to(torch.bfloat16)
    arguments["dt"] = arguments["dt"].abs()   # without softplus, no state may grow
    dt = torch.empty(arguments["dt"].numel() + 1, dtype=torch.bfloat16)[1:].view_as(arguments["dt"])
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "state", "cu_seqlens", "dt_softplus")
    for without in ((), ("z", "D", "dt_bias")):
        given = {n: arguments.get(n) for n in names} | dict.fromkeys(without) | {"dt_softplus": not without}
        launched, results = [], []
        for step in (given["dt"], dt.copy_(given["dt"])):
            _library._simt.reset()
            with on("simt"):
                call = given | {"dt": step}
                results.append(pyseq.ops.selective_scan._OP.active.forward(*(call[n] for n in names), True, True))
            launched.append("bfloat16" in str(_library._simt.launches()))
        assert launched == [True, False]
        for y, other in zip(*results, strict=True):
            assert torch.equal(y, other)


@on_backends
def test_the_checkpoints_are_the_states_of_the_sequence_that_goes_on(backend):
    if backend == "cpu":   # there they lie in another order
        return
    arguments = packed([0, 30, 64, 150, 200]) | {"return_state": False}
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "state", "cu_seqlens", "dt_softplus")
    with on(backend) as device:
        given = prepare(arguments, device, requires_grad=False)
        kept = pyseq.ops.selective_scan._OP.active.forward(*(given[n] for n in names), False, True)[2]
    assert torch.equal(kept[0, 0].cpu(), arguments["state"][2])
    until = {n: arguments[n][:, 64:128] for n in ("u", "dt", "B", "C", "z")}
    alone = arguments | until | {"cu_seqlens": None, "state": arguments["state"][2:3], "return_state": True}
    assert_close(kept[0, 1], pyseq.reference.selective_scan(**alone)[1][0].double(), "checkpoint")


@on_backends
@pytest.mark.parametrize("ends", [[0, 5, 4], [1, 2, 4], [0, 2, 3], [0, -1, 4], [0, 1 << 40, 4], [-9, 9, 4]])
@pytest.mark.parametrize("time", [4, 600])
def test_bad_offsets_that_nobody_saw_give_nan(time, ends, backend):
    arguments = drawn(1, time, 6, 3)
    ends = torch.tensor([*ends[:-1], time if ends[-1] == 4 else ends[-1]])
    if time == 600 and ends[1] == 5:
        ends[1] = 700
    kernels = _library.REGISTRY["selective_scan"].kernels["pyseq_simt" if backend == "simt" else "pyseq"]
    tensors = [arguments[n] for n in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    state = torch.zeros(len(ends) - 1, 6, 3)
    with on(backend) as device:
        *tensors, state, ends = (t.to(device) for t in (*tensors, state, ends))
        y, last, kept = kernels.forward(*tensors, state, ends, True, True, True)
        found = kernels.backward(y, last, *tensors, state, ends, kept, True)
    assert all(t.isnan().all() for t in (y, last, kept, *found))


@on_backends
@pytest.mark.parametrize("dt", [-40.0, -15.0, 19.0, 21.0, 100.0])
def test_huge_and_tiny_steps(dt, backend):
    arguments = drawn(1, 70, 17, 16)
    arguments["dt"] = dt + arguments["dt"]
    check(arguments, backend)


@pytest.mark.parametrize("namespace", ["pyseq", *(["pyseq_simt"] if "simt" in BACKENDS else [])])
@pytest.mark.parametrize(("batch", "time", "dim", "states"), [
    (0, 5, 3, 3), (2, 0, 3, 3), (2, 0, 3, 66), (1, 70, 0, 3), (2, 5, 0, 3), (0, 0, 0, 3),
])
def test_an_axis_of_size_zero_runs_forward_and_backward(batch, time, dim, states, namespace):
    arguments = drawn(batch, time, dim, states)
    with _library.use_namespace(namespace):   # not on(): with no channel nothing is launched
        outputs, grads = gradients(pyseq.selective_scan, prepare(arguments, "cpu", requires_grad=True))
    exact_outputs, exact_grads = exact(arguments)
    for a, b in zip((*outputs, *grads.values()), (*exact_outputs, *exact_grads.values()), strict=True):
        assert a.shape == b.shape and torch.equal(a.double(), b)
    rows = {n: arguments[n][:, 0] for n in ("u", "dt", "B", "C", "z")} if time else {}
    if rows:
        with _library.use_namespace(namespace):
            y = pyseq.selective_scan_step(arguments["state"], A=arguments["A"], **rows)
        assert y.shape == (batch, dim)


@on_backends
def test_decay_to_nothing_and_none_at_all(backend):
    arguments = drawn(1, 70, 4, 4)
    arguments["A"] = torch.tensor([-1e4, -100.0, -1e-6, 0.0]).repeat(4, 1)
    check(arguments, backend)


@on_backends
def test_growth_is_not_clamped(backend):
    arguments = drawn(1, 40, 4, 4)
    arguments["A"] = -arguments["A"].clamp(-0.3, 0)
    check(arguments, backend)


@on_backends
def test_a_step_of_zero_leaves_the_state_bit_for_bit(backend):
    arguments = drawn(2, 9, 21, 5)
    arguments |= {"dt": torch.zeros(2, 9, 21), "dt_bias": None, "dt_softplus": False}
    with on(backend) as device:
        state = pyseq.selective_scan(**prepare(arguments, device, requires_grad=False))[1].cpu()
    assert torch.equal(state, arguments["state"])


def test_infinite_and_nan_inputs_stay_in_their_channel():
    arguments = drawn(1, 6, 18, 4) | {"state": None}
    arguments["u"][0, 2, 3] = float("inf")
    arguments["u"][0, 1, 16] = float("nan")
    y, _ = pyseq.selective_scan(**arguments)
    expected = pyseq.reference.selective_scan(**arguments)[0]
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


def test_empty_sequences_pass_the_state_and_its_gradient_through():
    arguments = drawn(1, 4, 6, 3) | {"cu_seqlens": torch.tensor([0, 0, 4, 4])}
    arguments["state"] = torch.randn(3, 6, 3)
    check(arguments)
    state = arguments["state"].requires_grad_()
    _, last = pyseq.selective_scan(**arguments)
    assert torch.equal(last[[0, 2]], state[[0, 2]])
    (grad,) = torch.autograd.grad(last[[0, 2]].sum(), state)
    assert torch.equal(grad[[0, 2]], torch.ones(2, 6, 3))


@pytest.mark.parametrize("cut", [1, 31, 32, 63, 64, 65, 128, 129])
def test_a_cut_anywhere_changes_no_bit(cut):
    arguments = drawn(2, 130, 19, 16)
    whole, last = pyseq.selective_scan(**arguments)
    names = ("u", "dt", "B", "C", "z")
    first, state = pyseq.selective_scan(**(arguments | {n: arguments[n][:, :cut] for n in names}))
    second, state = pyseq.selective_scan(**(arguments | {n: arguments[n][:, cut:] for n in names} | {"state": state}))
    assert torch.equal(torch.cat([first, second], 1), whole) and torch.equal(state, last)


def stepped(given):
    """The first token of a sequence by a step: y [B, D], and the state after it in the dtype given."""
    rows = {n: given[n][:, 0] for n in ("u", "dt", "B", "C", "z")}
    options = {n: given[n] for n in ("A", "D", "dt_bias", "dt_softplus")}
    state = given["state"].clone()
    return pyseq.selective_scan_step(state, **rows, **options), state


@on_backends
@pytest.mark.parametrize(("states", "dim"), [(16, 100), (5, 3), (8, 16), (40, 33), (100, 9)])
def test_a_bfloat16_state_is_rounded_once(states, dim, backend):
    arguments = drawn(3, 1, dim, states)
    arguments["state"] = arguments["state"].bfloat16()
    with on(backend) as device:
        given = prepare(arguments, device, requires_grad=False)
        y, state = stepped(given)
        whole, last = pyseq.selective_scan(**(given | {"state": given["state"].float()}))
    if backend == "cpu":
        assert torch.equal(y, whole[:, 0]) and torch.equal(state, last.bfloat16())
    else:
        assert_close(y, whole[:, 0].double(), "y")
        assert_close(state, last.double(), "state")


@on_backends
@pytest.mark.parametrize("states", [3, 16, 64, 66, 100, 130])
def test_a_step_is_a_sequence_of_one_token_bit_for_bit(states, backend):
    arguments = drawn(3, 1, 9, states)
    with on(backend) as device:
        given = prepare(arguments, device, requires_grad=False)
        y, state = stepped(given)
        whole, last = pyseq.selective_scan(**given)
    assert torch.equal(y, whole[:, 0]) and torch.equal(state, last)


@on_backends
def test_a_state_with_strides_is_updated_where_it_lies(backend):
    arguments = drawn(2, 1, 6, 4)
    for columns in (slice(None, None, 2), slice(1, 5)):
        wide = torch.full((2, 6, 8), float("nan"))
        wide[..., columns] = arguments["state"]
        with on(backend) as device:
            given, wide = prepare(arguments, device, requires_grad=False), wide.to(device)
            rows = {n: given[n][:, 0] for n in ("u", "dt", "B", "C", "z")}
            options = {n: given[n] for n in ("A", "D", "dt_bias", "dt_softplus")}
            pyseq.selective_scan_step(wide[..., columns], **rows, **options)
            assert_close(wide[..., columns], pyseq.selective_scan(**given)[1].double(), "state")
        assert wide.isnan().sum() == wide.numel() // 2


def test_training_keeps_at_most_a_sixteenth_of_the_states():
    for time in (1, 40, 65, 1000):
        arguments = drawn(2, time, 24, 16)
        leaves = {id(v.untyped_storage()) for v in arguments.values() if isinstance(v, torch.Tensor)}
        kept = []

        def pack(t, leaves=leaves, kept=kept):
            if id(t.untyped_storage()) not in leaves:
                kept.append(t)
            return t

        arguments["u"].requires_grad_()
        given = {v.data_ptr() for v in arguments.values() if isinstance(v, torch.Tensor)}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y, _ = pyseq.selective_scan(**arguments)
        own = [t for t in kept if t.numel() and t.data_ptr() not in given]
        assert y.requires_grad and sum(t.numel() for t in own) <= 2 * time * 24 * 16 / 16


def test_nothing_is_kept_without_a_gradient(monkeypatch):
    kernels, results = pyseq.ops.selective_scan._OP.active, []
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: (results.append(forward(*args)), results[-1])[1])
    pyseq.selective_scan(**drawn(1, 200, 4, 4))
    assert results[0][2].numel() == 0


def test_a_step_refuses_a_gradient():
    arguments = drawn(1, 1, 4, 4)
    rows = {n: arguments[n][:, 0] for n in ("u", "dt", "B", "C")}
    A = arguments["A"].requires_grad_()
    with pytest.raises(RuntimeError, match="selective_scan on a sequence of length 1"):
        pyseq.selective_scan_step(arguments["state"], A=A, **rows)
    with torch.no_grad():
        pyseq.selective_scan_step(arguments["state"], A=A, **rows)


def test_explain_names_the_kernel_and_the_copies():
    arguments = drawn()
    told = pyseq.explain(pyseq.selective_scan, **(arguments | {"A": arguments["A"].bfloat16()}))
    assert told.kernel.startswith("cpu v") and told.notes == ("A is bfloat16: read as float32, converted first",)
    swapped = arguments["u"].transpose(1, 2).contiguous().transpose(1, 2)
    assert "u is copied first" in pyseq.explain(pyseq.selective_scan, **(arguments | {"u": swapped})).notes[0]


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"u": 3}, TypeError, "u is int"),
    ({"u": torch.zeros(2, 5)}, ValueError, r"u has shape \[2, 5\], expected \[B, T, D\]"),
    ({"dt": torch.zeros(2, 5, 6)}, ValueError, r"dt has shape \[2, 5, 6\], expected .* with .*D = 7 \(from u\)"),
    ({"A": torch.zeros(6, 3)}, ValueError, "A has shape"),
    ({"A": torch.zeros(7, 0)}, ValueError, "A is of width N = 0"),
    ({"A": torch.zeros(7, 3, dtype=torch.complex64)}, TypeError, "A has dtype complex64"),
    ({"B": torch.zeros(2, 5, 4)}, ValueError, r"B has shape \[2, 5, 4\], expected \[B, T, N\]"),
    ({"B": torch.zeros(2, 5, 2, 3), "C": torch.zeros(2, 5, 2, 3)}, ValueError, "B is of G = 2 groups, expected G, a"),
    ({"B": torch.zeros(2, 5, 7, 3)}, ValueError, r"C has shape \[2, 5, 3\], expected \[B, T, G, N\]"),
    ({"C": torch.zeros(2, 5, 7, 3)}, ValueError, r"C has shape \[2, 5, 7, 3\], expected .* G = 1 \(from B\)"),
    ({"B": torch.zeros(2, 5, 0, 3), "C": torch.zeros(2, 5, 0, 3)}, ValueError, "B is of G = 0 groups"),
    ({"D": torch.zeros(8)}, ValueError, "D has shape"),
    ({"z": torch.zeros(2, 5, 8)}, ValueError, "z has shape"),
    ({"z": torch.zeros(2, 5, 7, dtype=torch.int32)}, TypeError, "z has dtype int32"),
    ({"dt_bias": torch.zeros(1)}, ValueError, "dt_bias has shape"),
    ({"state": torch.zeros(2, 7, 4)}, ValueError, "state has shape"),
    ({"state": torch.zeros(2, 7, 3, dtype=torch.bfloat16)}, TypeError, "state has dtype bfloat16, expected float32"),
    ({"dt_softplus": None}, TypeError, "dt_softplus is NoneType, expected True or False"),
    ({"return_state": 1}, TypeError, "return_state is int"),
    ({"dt": torch.zeros(2, 5, 7, device="meta")}, ValueError, "dt is on device meta"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens packs sequences into a batch of 1, but B is 2"),
])
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        pyseq.selective_scan(**(drawn() | change))


@pytest.mark.parametrize(("ends", "error", "message"), [
    ([0, 3], ValueError, "expected 0 to T = 5"),
    ([0, 4, 3, 5], ValueError, "non-decreasing"),
    ([1, 5], ValueError, "cu_seqlens is"),
    ([0.0, 5.0], TypeError, "cu_seqlens has dtype"),
])
def test_wrong_offsets_are_named(ends, error, message):
    arguments = drawn(1) | {"state": None, "cu_seqlens": torch.tensor(ends)}
    with pytest.raises(error, match=message):
        pyseq.selective_scan(**arguments)


def test_a_step_names_its_state():
    arguments = drawn(1, 1, 4, 4)
    rows = {n: arguments[n][:, 0] for n in ("u", "dt", "B", "C")}
    expanded = torch.zeros(1, 4, 1).expand(1, 4, 4)   # every write would land on its neighbours
    for state, error in (
        (torch.zeros(1, 4, 3), ValueError), (expanded, ValueError),
        (torch.zeros(1, 4, 4, dtype=torch.float16), TypeError),
    ):
        with pytest.raises(error, match=r"selective_scan_step: state (has|is expanded)"):
            pyseq.selective_scan_step(state, A=arguments["A"], **rows)


def test_the_chunk_is_the_kernels():
    header = (testing.__file__.rsplit("/pyseq/", 1)[0]) + "/csrc/selective_scan/kernel.h"
    with open(header) as file:
        assert f"kChunk = {pyseq.ops.selective_scan._CHUNK};" in file.read()
