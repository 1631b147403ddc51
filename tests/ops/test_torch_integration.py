"""What torch expects of an operator: opcheck, compile, export, autocast, torch.func; and loud refusals for the rest."""

import pytest
import torch
from torch.autograd import forward_ad

import pyseq
from pyseq import testing
from pyseq._library import _LIBRARIES, REGISTRY, operator
from pyseq.samples import cast, samples
from pyseq.testing import as_tuple, gradients, prepare

EVERY = list(REGISTRY.values())
OPS = [op for op in EVERY if op.differentiable]
STEPS = [pytest.param(op, max((s for s in samples(op.name) if s.small), key=lambda s: len(s.draw())), id=op.name)
         for op in EVERY if not op.differentiable]
ONE_EACH = [pytest.param(op, max((s for s in samples(op.name) if s.small), key=lambda s: len(s.draw())), id=op.name)
            for op in OPS]
SMALL = [pytest.param(op, s, id=str(s)) for op in OPS for s in samples(op.name) if s.small]


def drawn(op, sample, requires_grad=False):
    return prepare(cast(sample.draw(), torch.float32, op.float32), "cpu", requires_grad=requires_grad)


def recorded(monkeypatch, op, kind, run):
    """The arguments that `run()` hands to the op's kernel."""
    calls, kernels = [], op.active
    call = getattr(kernels, kind)
    monkeypatch.setattr(kernels, kind, lambda *args: (calls.append(args), call(*args))[1])
    run()
    monkeypatch.undo()
    return calls


@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_opcheck(monkeypatch, op, sample):
    def forward_and_backward():
        gradients(op.function, drawn(op, sample, requires_grad=True))

    for kind in ("forward", "backward"):
        overload = getattr(torch.ops.pyseq, f"{op.name}_{kind}").default
        for args in recorded(monkeypatch, op, kind, forward_and_backward):
            args = tuple(a.detach().requires_grad_(a.requires_grad and kind == "forward")
                         if isinstance(a, torch.Tensor) else a for a in args)
            torch.library.opcheck(overload, args)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("op", "sample"), ONE_EACH)
def test_compiles_without_a_graph_break(op, sample, backend):
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, backend=backend)
    outputs, grads = gradients(compiled, drawn(op, sample, requires_grad=True))
    plain, plain_grads = gradients(op.function, drawn(op, sample, requires_grad=True))
    for a, b in zip((*outputs, *grads.values()), (*plain, *plain_grads.values()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("op", "sample"), ONE_EACH)
def test_exports(op, sample):
    class Module(torch.nn.Module):
        def forward(self, tensors):
            return op.function(**(options | tensors))

    arguments = drawn(op, sample)
    tensors = {n: v for n, v in arguments.items() if isinstance(v, torch.Tensor)}
    options = {n: v for n, v in arguments.items() if n not in tensors}
    program = torch.export.export(Module(), (tensors,))
    for a, b in zip(as_tuple(program.module()(tensors)), as_tuple(op.function(**arguments)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("op", "sample"), ONE_EACH)
def test_autocast_changes_nothing(op, sample):
    with torch.autocast("cpu", torch.bfloat16):
        inside = as_tuple(op.function(**drawn(op, sample)))
    for a, b in zip(inside, as_tuple(op.function(**drawn(op, sample))), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_torch_func_grad(op, sample):
    arguments = drawn(op, sample)
    leaves = {n: v for n, v in testing.differentiable(arguments).items() if n in arguments}
    values = torch.func.grad(lambda t: testing.loss(as_tuple(op.function(**(arguments | t)))))(leaves)
    _, exact = gradients(op.function, drawn(op, sample, requires_grad=True))
    for name, grad in values.items():
        assert torch.equal(grad, exact[name]), name


@pytest.mark.parametrize(("op", "sample"), ONE_EACH)
def test_double_backward_raises_and_names_the_reference(op, sample):
    arguments = drawn(op, sample, requires_grad=True)
    leaf = next(iter(testing.differentiable(arguments).values()))
    y = as_tuple(op.function(**arguments))[0]
    (grad,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"pyseq.reference.{op.name}"):
        torch.autograd.grad(grad.square().sum(), leaf)


@pytest.mark.parametrize(("op", "sample"), ONE_EACH)
def test_forward_mode_raises_and_names_the_reference(op, sample):
    arguments = drawn(op, sample)
    name, leaf = next(iter(testing.differentiable(arguments).items()))
    with pytest.raises(RuntimeError, match=f"pyseq.reference.{op.name}"), forward_ad.dual_level():
        op.function(**(arguments | {name: forward_ad.make_dual(leaf, torch.ones_like(leaf))}))
    with pytest.raises(RuntimeError, match=f"pyseq.reference.{op.name}"):
        torch.func.jvp(lambda t: op.function(**(arguments | {name: t})), (leaf,), (torch.ones_like(leaf),))


@pytest.mark.parametrize(("op", "sample"), ONE_EACH)
def test_vmap_raises_and_names_the_reference(op, sample):
    arguments = drawn(op, sample)
    name, leaf = next(iter(testing.differentiable(arguments).items()))
    with pytest.raises(RuntimeError, match=f"pyseq.reference.{op.name}"):
        torch.vmap(lambda t: op.function(**(arguments | {name: t})))(leaf[None])
    mapped = torch.vmap(lambda t: testing.reference_of(op)(**(arguments | {name: t})))(leaf[None])
    assert as_tuple(mapped)[0].shape[1:] == as_tuple(op.function(**arguments))[0].shape


@pytest.mark.parametrize("op", EVERY, ids=lambda op: op.name)
def test_every_namespace_has_the_same_schema(op):
    for kind in op.kinds:
        schemas = {
            str(getattr(getattr(torch.ops, ns), operator(op.name, kind)).default._schema).replace(f"{ns}::", "")
            for ns in _LIBRARIES
        }
        assert len(schemas) == 1


def test_explain_refuses_what_is_not_an_op():
    with pytest.raises(TypeError, match="rms_norm_gated"):
        pyseq.explain(torch.add)


@pytest.mark.parametrize(("op", "sample"), STEPS)
def test_a_step_alone_is_an_operator_like_any_other(monkeypatch, op, sample):
    overload = getattr(torch.ops.pyseq, operator(op.name, "step")).default

    def run():
        testing.updated(op.function, op, drawn(op, sample))

    for args in recorded(monkeypatch, op, "step", run):
        torch.library.opcheck(overload, args)
    plain = testing.updated(op.function, op, drawn(op, sample))
    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        compiled = torch.compile(op.function, fullgraph=True, backend=backend)
        for a, b in zip(testing.updated(compiled, op, drawn(op, sample)), plain, strict=True):
            assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        inside = testing.updated(op.function, op, drawn(op, sample))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(inside, plain, strict=True))


@pytest.mark.parametrize(("op", "sample"), STEPS)
def test_a_step_alone_with_grad_mode_on_is_refused(op, sample):
    with pytest.raises(RuntimeError, match=f"pyseq.{op.name} has no gradient"):
        op.function(**drawn(op, sample, requires_grad=True))
