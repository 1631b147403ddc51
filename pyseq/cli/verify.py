"""`pyseq verify`"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from .output import Json, Threads, bar, clear_failures, print_json, results, use_threads

if TYPE_CHECKING:
    import torch

    from pyseq._library import Op
    from pyseq.samples import Sample


@dataclass
class Errors:
    """The largest errors of an op over its samples, in units of what rounding explains: above 1 is wrong.

    None: the op has no such kernel.
    """

    op: str
    backend: str
    dtype: str
    forward: float | None = None
    gradients: float | None = None
    step: float | None = None
    worst: str = ""  # the sample with the largest of them

    @property
    def largest(self) -> float:
        return _largest(self.forward, self.gradients, self.step) or 0.0

    def take(self, sample: str, forward: float | None, gradients: float | None, step: float | None) -> None:
        if (_largest(forward, gradients, step) or 0.0) >= self.largest:
            self.worst = sample
        self.forward = _largest(self.forward, forward)
        self.gradients = _largest(self.gradients, gradients)
        self.step = _largest(self.step, step)


def _largest(*errors: float | None) -> float | None:
    return max((e for e in errors if e is not None), default=None)


@clear_failures
def verify(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops to check.", show_default="all")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compare every op on this machine with the float64 reference.

    Forward, gradients and steps, over all samples and dtypes. Errors are in units of the error that rounding explains;
    more than 1 is wrong, and the exit code is then 1.
    """
    use_threads(threads)
    from pyseq import testing
    from pyseq._library import REGISTRY
    from pyseq.samples import samples

    names = ops or list(REGISTRY)
    for name in names:
        if name not in REGISTRY:
            raise typer.BadParameter(f"{name!r}: expected some of {', '.join(REGISTRY)}", param_hint="OPS")
    cases = [
        (REGISTRY[name], sample, backend, dtype)
        for name in names
        for backend in testing.backends(REGISTRY[name])
        if backend != "simt"
        for dtype in testing.DTYPES
        for sample in samples(name)
    ]
    rows: dict[tuple[str, str, str], Errors] = {}
    with bar() as progress:
        for op, sample, backend, dtype in progress.track(cases, description="verifying"):
            kind = str(dtype).removeprefix("torch.")
            row = rows.setdefault((op.name, backend, kind), Errors(op.name, backend, kind))
            row.take(sample.name, *errors(op, sample, backend, dtype))
    passed = all(row.largest <= 1 for row in rows.values())
    if json:
        print_json({"passed": passed, "errors": [asdict(row) for row in rows.values()]})
    else:
        results().print(table(rows.values()))
        results().print(
            "1 = the error that rounding explains. " + ("All within it." if passed else "[red]Beyond it.[/red]")
        )
    if not passed:
        raise typer.Exit(1)


def table(rows: Any) -> Table:
    shown = Table(Column("op", no_wrap=True), "backend", "dtype", "forward", "gradients", "step", "worst sample")
    for row in rows:
        values = ("-" if v is None else f"{v:.3f}" for v in (row.forward, row.gradients, row.step))
        shown.add_row(row.op, row.backend, row.dtype, *values, row.worst, style="red" if row.largest > 1 else None)
    return shown


def errors(
    op: Op, sample: Sample, backend: str, dtype: torch.dtype
) -> tuple[float | None, float | None, float | None]:
    """Forward, gradients, step."""
    from pyseq import testing
    from pyseq.samples import cast

    arguments = testing.prepare(cast(sample.draw(), dtype, op.float32), "cpu", requires_grad=False)
    if not op.differentiable:
        with testing.on(backend) as device:
            moved = testing.prepare(arguments, device, requires_grad=False)
            actual = testing.updated(op.function, op, moved)
        expected = testing.expected_update(op, arguments)
        return None, None, max(testing.error(a, e) for a, e in zip(actual, expected, strict=True))
    exact, exact_gradients = testing.expected(op, arguments)
    products = testing.products_of(op, arguments)
    with testing.on(backend) as device:
        outputs, gradients = testing.gradients(op.function, testing.prepare(arguments, device, requires_grad=True))
        stepped = steps(op, testing.prepare(arguments, device, requires_grad=False))
    forward = [testing.error(y, e, "output", products) for y, e in zip(outputs, exact, strict=True)]
    gradient = [
        testing.error(g, exact_gradients[name], "gradient", testing.products_in(name, products))
        for name, g in gradients.items()
    ]
    step = None if stepped is None else testing.error(stepped, exact[0])
    return max(forward, default=0.0), max(gradient, default=0.0), step


def steps(op: Op, arguments: dict[str, Any]) -> torch.Tensor | None:
    """The outputs [B, T, ...] of the op's step, token by token; None for an op without steps, or packed sequences."""
    import torch

    if op.step is None or not op.time or arguments.get("cu_seqlens") is not None:
        return None
    time = {name: arguments[name] for name in op.time if arguments.get(name) is not None}
    options = {n: v for n, v in arguments.items() if n not in (*time, "state", "return_state", "cu_seqlens")}
    length = next(iter(time.values())).shape[1]
    with torch.no_grad():
        y, state = op.function(**{**arguments, **{n: v[:, :0] for n, v in time.items()}, "return_state": True})
        ys = [op.step(state, **{n: v[:, t] for n, v in time.items()}, **options) for t in range(length)]
        return torch.stack(ys, dim=1) if ys else y
