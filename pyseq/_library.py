"""define(): a schema, a fake kernel and a gradient formula become operators of torch.library; REGISTRY lists the ops.

An op has up to three kernels, `<op>_forward`, `<op>_backward` and `<op>_step`, registered in namespace `pyseq`, and in
`pyseq_simt` when the emulator module is built: there the CUDA kernels run on the CPU, under the same schemas. C++ gives
the implementations (csrc/registry.cpp); everything that torch has to know about them is said here and in `ops/<op>.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad

from . import _C

HAS_SIMT = importlib.util.find_spec("pyseq._simt") is not None
if HAS_SIMT:
    from . import _simt

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIBRARIES = {
    namespace: torch.library.Library(namespace, "FRAGMENT")
    for namespace in ("pyseq", *(("pyseq_simt",) if HAS_SIMT else ()))
}
_namespace = "pyseq"


@contextlib.contextmanager
def use_namespace(namespace: str) -> Iterator[None]:
    """Calls inside run the kernels of that namespace: "pyseq", or "pyseq_simt" in tests of the CUDA twins."""
    global _namespace
    previous, _namespace = _namespace, namespace
    try:
        yield
    finally:
        _namespace = previous


def runs_on_gpu(t: torch.Tensor) -> bool:
    """Whether calls on `t` run the kernels made for a GPU: it is on one, or the emulator stands in for it."""
    return t.is_cuda or _namespace == "pyseq_simt"


@dataclass(frozen=True)
class Kernel:
    """One operator: its schema after the name, and what its outputs look like."""

    schema: str
    fake: Callable[..., Any]


def operator(op: str, kind: str) -> str:
    """What torch calls a kernel. An op that is only a step, `<layer>_step`, says so in its own name already."""
    return op if op == f"{op.removesuffix('_step')}_{kind}" else f"{op}_{kind}"


class Kernels:
    """The kernels of one op in one namespace, as callables: `.forward`, `.backward`, `.step`."""

    forward: Callable
    backward: Callable
    step: Callable

    def __init__(self, op: str, namespace: str) -> None:
        self._op, self._namespace = op, namespace

    def _add(self, kind: str, kernel: Kernel, save: Callable | None, gradient: Callable | None) -> None:
        name = operator(self._op, kind)
        library = _LIBRARIES[self._namespace]
        library.define(name + kernel.schema, tags=_TAGS)
        torch.library.register_fake(f"{self._namespace}::{name}", kernel.fake, lib=library)
        overload = getattr(getattr(torch.ops, self._namespace), name).default
        if gradient is not None:
            torch.library.register_autograd(
                f"{self._namespace}::{name}", gradient, setup_context=save, lib=library
            )
            setattr(self, kind, _differentiable(self._op, overload, save or _save_nothing, gradient))
        else:
            setattr(self, kind, overload)


def _save_nothing(ctx: Any, inputs: tuple, output: Any) -> None:
    pass


def _once_only(op: str) -> Callable:
    def gradient(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"pyseq.{op} has no double backward: its kernels compute first derivatives only. "
            f"pyseq.reference.{op} is plain PyTorch and differentiable twice."
        )

    return gradient


def _no_forward_mode(op: str) -> RuntimeError:
    return RuntimeError(
        f"pyseq.{op} has no forward-mode derivative. pyseq.reference.{op} is plain PyTorch and has one."
    )


def _differentiable(op: str, overload: Callable, save: Callable, gradient: Callable) -> Callable:
    """`overload`, routed by hand where register_autograd does not reach: torch.func transforms and forward mode."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return overload(*args)

        setup_context = staticmethod(save)
        backward = staticmethod(gradient)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise _no_forward_mode(op)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
            raise RuntimeError(
                f"pyseq.{op} cannot be vmapped: its arguments have a batch axis of their own. "
                f"pyseq.reference.{op} is plain PyTorch and can."
            )

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            if torch._C._are_functorch_transforms_active():
                return Function.apply(*args)
            if forward_ad._current_level >= 0 and any(
                isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args
            ):
                raise _no_forward_mode(op)
        return overload(*args)

    return call


@dataclass
class Op:
    """One row of the table that drives opcheck, the shared test bodies, `pyseq verify` and the benches."""

    name: str
    kernels: dict[str, Kernels] = field(default_factory=dict)   # by namespace
    function: Callable = field(default=_save_nothing)
    step: Callable | None = None
    time: tuple[str, ...] = ()      # arguments with a time axis, which is their second
    packs: bool = False             # takes cu_seqlens
    split_exact: bool = False       # forward bits do not depend on how a sequence is split
    float32: tuple[str, ...] = ()   # arguments read as float32 whatever they are: weights, A, D, biases
    operands: tuple[str, ...] = ()  # the arguments of its matrix products; where all of them have the type ...
    products: torch.dtype | None = None   # ... `products`, what multiplies its way into y is rounded to it
    updates: tuple[str, ...] = ()   # of an op that is only a step: the arguments that it writes to
    cublas: bool = False            # on CUDA the op is torch's own
    notes: Callable[[dict[str, Any]], list[str]] | None = None   # what explain() says about a call, if not the usual

    @property
    def active(self) -> Kernels:
        return self.kernels[_namespace]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in ("forward", "backward", "step") if hasattr(self.kernels["pyseq"], kind))

    @property
    def differentiable(self) -> bool:
        """False for an op that is only a step: its `function` is that step."""
        return "backward" in self.kinds

    @property
    def backends(self) -> tuple[str, ...]:
        """What was built: "cpu", "cuda" and, for tests, "simt"."""
        built = [("cpu", self.name in _C.cpu_ops), ("cuda", self.name in _C.cuda_ops)]
        built.append(("simt", HAS_SIMT and self.name in _simt.cuda_ops))
        return tuple(backend for backend, there in built if there)


REGISTRY: dict[str, Op] = {}


def define(
    name: str,
    *,
    forward: Kernel | None = None,
    backward: Kernel | None = None,
    step: Kernel | None = None,
    save: Callable[[Any, tuple, Any], None] = _save_nothing,
    gradient: Callable[..., Any] | None = None,
) -> Op:
    """Registers the kernels of an op and enters it into REGISTRY: forward, backward and gradient, or only a step.

    `save(ctx, inputs, output)` keeps what the gradient needs. `gradient(kernels, ctx, *grads)` calls
    `kernels.backward`, so that the gradient of an emulated forward runs emulated too; grads may be None.
    """
    op = Op(name)
    for namespace in _LIBRARIES:
        kernels = op.kernels[namespace] = Kernels(name, namespace)
        if forward is not None and backward is not None and gradient is not None:
            kernels._add("backward", backward, None, _once_only(name))
            kernels._add("forward", forward, save, _bind(gradient, kernels))
        if step is not None:
            kernels._add("step", step, None, None)
    REGISTRY[name] = op
    return op


def _bind(gradient: Callable, kernels: Kernels) -> Callable:
    return lambda ctx, *grads: gradient(kernels, ctx, *grads)


def refuse_gradient(step: str, tensors: Sequence[torch.Tensor | None], instead: str | None = None) -> None:
    """A step updates its state in place and has no gradient: asking for one must not be silently ignored."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"pyseq.{step} has no gradient, and an input requires grad: call it under torch.no_grad(), "
            + (instead or f"or pyseq.{step.removesuffix('_step')} on a sequence of length 1")
        )
