"""Every op with CUDA kernels, on the emulator: launched for each kind, the same bits in every order of threads and
blocks, right also where approximate instructions are as wrong as a GPU's may be."""

import itertools
import re

import pytest
import torch
from emulated import CSRC
from kinds import OPS, computed

from pyseq import testing
from pyseq._library import HAS_SIMT, REGISTRY
from pyseq.samples import cast, samples
from pyseq.testing import assert_close, prepare

if HAS_SIMT:
    from pyseq import _simt

CASES = [pytest.param(op, s, id=str(s)) for op in OPS for s in samples(op.name)]


@pytest.fixture(autouse=True)
def as_before():
    yield
    if HAS_SIMT:
        _simt.reset()


def some(arguments):
    """Whether there is anything to compute."""
    return all(v.numel() for v in arguments.values() if isinstance(v, torch.Tensor) and v.dim() > 1)


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_bits_do_not_depend_on_the_order_of_threads_and_blocks(op, sample):
    every = list(itertools.product((0, 1, 2), repeat=2))
    first = None
    for schedule, blocks in every if sample.small else [(0, 0), (1, 2), (2, 1)]:
        _simt.set_schedule(schedule)
        _simt.set_block_order(blocks)
        launched, results = computed(op, sample, torch.float32)
        first = first or results
        if some(sample.draw()):
            assert all(launched.values()), f"a kind was not launched: {launched}"
        for kind, tensors in results.items():
            for k, (a, b) in enumerate(zip(tensors, first[kind], strict=True)):
                assert a is b or torch.equal(a, b), f"{kind}, result {k}: other bits in order {schedule}, {blocks}"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_kernel_is_launched_by_some_sample(op):
    sources = [path.read_text() for path in (CSRC / op.name).glob("*.cu*")]
    kernels = {name for text in sources for name in re.findall(r"\b(\w+_kernel)\(", text) if "__global__" in text}
    for sample, dtype in itertools.product(samples(op.name), (torch.float32, torch.bfloat16, torch.float16)):
        computed(op, sample, dtype)
        kernels -= {name.split("<")[0] for name in _simt.launches()}
        if not kernels:
            return
    assert not kernels, "no sample launches these"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_approximate_instructions_may_be_off(op, sample, dtype):
    arguments = prepare(cast(sample.draw(), dtype, op.float32), "cpu", requires_grad=False)
    _simt.set_noise(1 + len(sample.name))
    _, results = computed(op, sample, dtype)
    if not op.differentiable:
        exact = testing.expected_update(op, arguments)
        pairs = [(a, e, "output") for a, e in zip(results["step"], exact, strict=True)]
    else:
        exact, exact_grads = testing.expected(op, arguments)
        pairs = [(a, e, "output") for a, e in zip(results["forward"], exact, strict=True)]
        grads = zip(results["backward"], exact_grads.values(), strict=True)
        pairs += [(a, e, "gradient") for a, e in grads if a is not None]
    products = testing.products_of(op, arguments)
    for k, (actual, wanted, kind) in enumerate(pairs):
        assert_close(actual, wanted, f"{kind} {k}", kind, products)


@pytest.mark.skipif(not HAS_SIMT, reason="the emulator module was not built: there is no CUDA toolkit")
def test_noise_changes_results():
    op = REGISTRY["rms_norm_gated"]
    sample = next(s for s in samples(op.name) if s.name == "wide_groups")
    exact = computed(op, sample, torch.float32)[1]["forward"][0]
    _simt.set_noise(1)
    first, second = (computed(op, sample, torch.float32)[1]["forward"][0] for _ in range(2))
    _simt.set_noise(2)
    other = computed(op, sample, torch.float32)[1]["forward"][0]
    assert torch.equal(first, second) and not torch.equal(first, exact) and not torch.equal(first, other)
    torch.testing.assert_close(first, exact, rtol=2e-6, atol=1e-7)
