"""The tests that every op passes on every backend, driven by REGISTRY and pyseq.samples. Test files of single ops hold
only what is theirs alone."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

import pyseq
from pyseq import testing
from pyseq._library import REGISTRY
from pyseq.samples import cast, samples
from pyseq.testing import as_tuple, assert_close, gradients, on, prepare

OPS = [op for op in REGISTRY.values() if op.differentiable]
STEPS = [
    pytest.param(op, s, backend, id=f"{s}-{backend}")
    for op in REGISTRY.values() if not op.differentiable for s in samples(op.name) for backend in testing.backends(op)
]
CASES = [pytest.param(op, s, id=str(s)) for op in OPS for s in samples(op.name)]
SMALL = [p for p in CASES if p.values[1].small]
ON_BACKENDS = [
    pytest.param(op, s, backend, id=f"{s}-{backend}")
    for op in OPS for s in samples(op.name) for backend in testing.backends(op)
]
SEQUENCES = [p for p in ON_BACKENDS if p.values[0].time]


def drawn(op, sample, dtype=torch.float32, device="cpu", requires_grad=False):
    return prepare(cast(sample.draw(), dtype, op.float32), device, requires_grad=requires_grad)


def assert_same(actual, exact, what):
    for k, (a, b) in enumerate(zip(as_tuple(actual), as_tuple(exact), strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{what}: output {k} differs in bits"


def on_or_empty(backend, arguments):
    """Nothing is launched where there is nothing to compute."""
    rows = next(v for v in arguments.values() if isinstance(v, torch.Tensor)).shape[0]
    return on(backend) if rows else contextlib.nullcontext("cuda" if backend == "cuda" else "cpu")


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(("op", "sample", "backend"), ON_BACKENDS)
def test_outputs_and_gradients_match_float64(op, sample, backend, dtype):
    arguments = drawn(op, sample, dtype)
    exact, exact_grads = testing.expected(op, arguments)
    products = testing.products_of(op, arguments)
    with on(backend) as device:
        arguments = prepare(arguments, device, requires_grad=True)
        outputs, grads = gradients(op.function, arguments)
    for k, (y, e) in enumerate(zip(outputs, exact, strict=True)):
        assert_close(y, e, f"output {k}", "output", products)
    for name, grad in grads.items():
        assert_close(grad, exact_grads[name], f"gradient of {name}", "gradient", testing.products_in(name, products))


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_dtypes_mix_freely(op, sample):
    arguments = drawn(op, sample)
    for k, name in enumerate(testing.differentiable(arguments)):
        if name in arguments and name != "state":
            arguments[name] = arguments[name].to(testing.DTYPES[k % 3])
    exact, _ = testing.expected(op, arguments)
    for y, e in zip(as_tuple(op.function(**arguments)), exact, strict=True):
        assert_close(y, e, "output")


@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_reference_is_differentiable_twice(op, sample):
    arguments = prepare(cast(sample.draw(), torch.float64, ()), "cpu", requires_grad=True)
    leaves = {n: t for n, t in testing.differentiable(arguments).items() if t.numel()}

    def function(*tensors):
        values = dict(arguments)
        for name, tensor in zip(leaves, tensors, strict=True):
            head, _, index = name.partition(".")
            if index:
                values[head] = tuple(tensor if i == int(index) else v for i, v in enumerate(values[head]))
            else:
                values[head] = tensor
        return tuple(y for y in as_tuple(testing.reference_of(op)(**values)) if y.numel() and y.requires_grad)

    if not leaves or not function(*leaves.values()):
        return
    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_float64_runs_through_the_reference(op, sample):
    arguments = drawn(op, sample, torch.float64)
    assert_same(op.function(**arguments), testing.reference_of(op)(**arguments), "float64")
    assert pyseq.explain(op.function, **arguments).kernel == "reference"


# ---- bits ------------------------------------------------------------------------------------------------------------


def scattered(t, how):
    """The same values in other memory: a slice of something wider, outer axes swapped, or a last axis of stride 2."""
    if how == "slice":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan"), dtype=t.dtype)
        wide[..., 3 : 3 + t.shape[-1]] = t
        return wide[..., 3 : 3 + t.shape[-1]]
    if how == "swapped" and t.dim() > 2:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    doubled = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype)
    doubled[..., 0] = t
    return doubled[..., 0]


@pytest.mark.parametrize("how", ["slice", "swapped", "every_other"])
@pytest.mark.parametrize(("op", "sample", "backend"), ON_BACKENDS)
def test_strides_do_not_matter(op, sample, backend, how):
    with on(backend) as device:
        plain = drawn(op, sample, device=device)
        moved = {
            n: scattered(v, how).to(device) if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim() else v
            for n, v in plain.items()
        }
        assert_same(op.function(**moved), op.function(**plain), how)


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_gradients_may_arrive_with_stride_zero(op, sample):
    arguments = drawn(op, sample, requires_grad=True)
    leaves = list(testing.differentiable(arguments).values())
    y = as_tuple(op.function(**arguments))[0]
    expanded = torch.autograd.grad(y, leaves, torch.ones(()).expand(y.shape), allow_unused=True, retain_graph=True)
    dense = torch.autograd.grad(y, leaves, torch.ones(y.shape), allow_unused=True)
    for a, b in zip(expanded, dense, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_bits_do_not_depend_on_the_thread_count(op, sample):
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            arguments = drawn(op, sample, torch.bfloat16, requires_grad=True)
            outputs, grads = gradients(op.function, arguments)
            results.append((*outputs, *grads.values()))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same(other, results[0], "threads")


@pytest.mark.parametrize(("op", "sample", "backend"), ON_BACKENDS)
def test_bits_do_not_depend_on_the_run(op, sample, backend):
    with on(backend) as device:
        runs = []
        for _ in range(2):
            outputs, grads = gradients(op.function, drawn(op, sample, device=device, requires_grad=True))
            runs.append((*outputs, *grads.values()))
    assert_same(runs[0], runs[1], "run")


def test_instruction_sets_agree(tmp_path):
    """Every op and sample, forward and gradients, computed by a process per instruction set."""
    worker = os.path.join(os.path.dirname(__file__), "isa_worker.py")
    results = {}
    for level in range(2, pyseq._C.cpu_level_of_machine + 1):
        path = tmp_path / f"v{level}.pt"
        subprocess.run([sys.executable, worker, str(path)], check=True, env=os.environ | {"PYSEQ_CPU": f"v{level}"})
        results[level] = torch.load(path, weights_only=True)
    widest = results[max(results)]
    for result in results.values():
        assert result.keys() == widest.keys()
        for name, tensor in result.items():
            kind = "gradient" if ".d" in name else "output"
            assert_close(tensor, widest[name].double(), name, kind)


# ---- sequences: split, packed, stepped -------------------------------------------------------------------------------


def cut(op, arguments, begin, end):
    return {n: v[:, begin:end] if n in op.time and v is not None else v for n, v in arguments.items()}


def same_or_close(op, backend, actual, exact, what):
    if op.split_exact and backend == "cpu":
        assert_same(actual, exact, what)
    else:
        for a, b in zip(as_tuple(actual), as_tuple(exact), strict=True):
            assert_close(a, b.double(), what)


def unpacked(sample):
    arguments = sample.draw()
    return "cu_seqlens" not in arguments


@pytest.mark.parametrize(("op", "sample", "backend"), [p for p in SEQUENCES if unpacked(p.values[1])])
def test_two_pieces_equal_the_whole(op, sample, backend):
    with on(backend) as device:
        arguments = drawn(op, sample, device=device) | {"return_state": True}
        time = arguments[op.time[0]].shape[1]
        whole = op.function(**arguments)
        for at in {0, 1, time // 2, time}:
            y1, state = op.function(**cut(op, arguments, 0, at))
            y2, state = op.function(**(cut(op, arguments, at, time) | {"state": state}))
            same_or_close(op, backend, (torch.cat([y1, y2], 1), state), whole, f"cut at {at}")


@pytest.mark.parametrize(("op", "sample", "backend"), [p for p in SEQUENCES if unpacked(p.values[1])])
def test_gradients_flow_through_the_state(op, sample, backend):
    arguments = drawn(op, sample) | {"return_state": True}
    _, exact = testing.expected(op, arguments)

    def pieces(**values):
        time = values[op.time[0]].shape[1]
        y1, state = op.function(**cut(op, values, 0, time // 3))
        y2, state = op.function(**(cut(op, values, time // 3, time) | {"state": state}))
        return torch.cat([y1, y2], 1), state

    with on(backend) as device:
        _, grads = gradients(pieces, prepare(arguments, device, requires_grad=True))
    for name, grad in grads.items():
        assert_close(grad, exact[name], f"gradient of {name}", "gradient")


@pytest.mark.parametrize(("op", "sample", "backend"), [p for p in SEQUENCES if unpacked(p.values[1])])
def test_steps_equal_the_sequence(op, sample, backend):
    if "step" not in op.kinds:
        pytest.fail(f"{op.name} has a time axis and no step")
    with on(backend) as device, torch.no_grad():
        arguments = drawn(op, sample, device=device) | {"return_state": True}
        time = arguments[op.time[0]].shape[1]
        y, last = op.function(**arguments)
        _, state = op.function(**cut(op, arguments, 0, 0))
        options = {n: v for n, v in arguments.items() if n not in (*op.time, "state", "return_state")}
        steps = [
            op.step(state, **{n: v if v is None else v[:, t] for n, v in arguments.items() if n in op.time}, **options)
            for t in range(time)
        ]
        stepped = torch.stack(steps, 1) if steps else y
        same_or_close(op, backend, (stepped, state), (y, last), "step by step")


@pytest.mark.parametrize(("op", "sample", "backend"), [
    p for p in SEQUENCES if p.values[0].packs and unpacked(p.values[1])
])
def test_packed_equals_separate(op, sample, backend):
    with on(backend) as device:
        arguments = drawn(op, sample, device=device) | {"return_state": True}
        batch, time = arguments[op.time[0]].shape[:2]
        lengths = [time - (b * time) // (batch + 1) for b in range(batch)]
        lengths.insert(1, 0)                      # an empty sequence between the others
        rows = [0, 0, *range(1, batch)][: len(lengths)]
        separate = []
        for row, length in zip(rows, lengths, strict=True):
            rowed = {n for n in (*op.time, "state") if arguments.get(n) is not None}
            one = {n: v[row : row + 1] if n in rowed else v for n, v in arguments.items()}
            separate.append(op.function(**cut(op, one, 0, length)))
        packed = dict(arguments)
        for n in op.time:
            if arguments.get(n) is not None:
                packed[n] = torch.cat([arguments[n][r : r + 1, :k] for r, k in zip(rows, lengths, strict=True)], 1)
        if arguments.get("state") is not None:
            packed["state"] = arguments["state"][rows]
        packed["cu_seqlens"] = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        whole = op.function(**packed)
        joined = torch.cat([y for y, _ in separate], 1), torch.cat([s for _, s in separate])
        same_or_close(op, backend, whole, joined, "packed")


@pytest.mark.parametrize(("op", "sample", "backend"), SEQUENCES)
def test_the_returned_state_is_new(op, sample, backend):
    with on(backend) as device:
        arguments = drawn(op, sample, device=device) | {"return_state": True}
        empty = cut(op, arguments, 0, 0)
        if "cu_seqlens" in empty:
            empty["cu_seqlens"] = torch.zeros_like(empty["cu_seqlens"])
        y, state = op.function(**empty)
        assert y.shape[1] == 0
        if arguments.get("state") is not None:
            assert torch.equal(state, arguments["state"].to(state.dtype))
            assert state.data_ptr() != arguments["state"].data_ptr() or state.numel() == 0
        before = None if arguments.get("state") is None else arguments["state"].clone()
        op.function(**arguments)
        assert before is None or torch.equal(before, arguments["state"])


# ---- ops that are only a step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(("op", "sample", "backend"), STEPS)
def test_a_step_matches_float64(op, sample, backend, dtype):
    arguments = drawn(op, sample, dtype)
    exact = testing.expected_update(op, arguments)
    with on_or_empty(backend, arguments) as device:
        actual = testing.updated(op.function, op, prepare(arguments, device, requires_grad=False))
    for k, (a, e) in enumerate(zip(actual, exact, strict=True)):
        assert_close(a, e, f"output {k}")


@pytest.mark.parametrize(("op", "sample", "backend"), STEPS)
def test_the_weights_of_a_step_are_read_in_any_dtype(op, sample, backend):
    arguments = drawn(op, sample)
    for k, name in enumerate(op.float32):
        if arguments[name] is not None:
            arguments[name] = arguments[name].to((torch.bfloat16, torch.float16, torch.float64)[k % 3])
    exact = testing.expected_update(op, arguments)
    with on_or_empty(backend, arguments) as device:
        actual = testing.updated(op.function, op, prepare(arguments, device, requires_grad=False))
    for k, (a, e) in enumerate(zip(actual, exact, strict=True)):
        assert_close(a, e, f"output {k}")


@pytest.mark.parametrize("how", ["slice", "swapped", "every_other"])
@pytest.mark.parametrize(("op", "sample", "backend"), STEPS)
def test_the_strides_of_a_step_do_not_matter(op, sample, backend, how):
    arguments = drawn(op, sample)
    with on_or_empty(backend, arguments) as device, torch.no_grad():
        plain = testing.updated(op.function, op, prepare(arguments, device, requires_grad=False))
        moved = {n: scattered(v, how).to(device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        y = op.function(**moved)
    for a, b in zip((y, *(moved[n] for n in op.updates)), plain, strict=True):
        assert torch.equal(a, b) or how == "every_other"   # copied first, so other loads add up in another order
        assert_close(a, b.double(), how)


@pytest.mark.parametrize(("op", "sample", "backend"), STEPS)
def test_the_bits_of_a_step_depend_on_neither_run_nor_threads(op, sample, backend):
    arguments, threads, runs = drawn(op, sample, torch.bfloat16), torch.get_num_threads(), []
    try:
        for n in (1, 1, 2, 5) if backend == "cpu" else (1, 1):
            torch.set_num_threads(n)
            with on_or_empty(backend, arguments) as device:
                runs.append(testing.updated(op.function, op, prepare(arguments, device, requires_grad=False)))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert_same(other, runs[0], "run or threads")
