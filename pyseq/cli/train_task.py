"""`pyseq train --task`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.progress import TextColumn
from rich.table import Table

from .output import bar, print_json, results

# What of the command's options a task takes; the rest is of text.
TAKES = (
    "task", "heads", "negative", "lengths", "layer", "d_model", "layers", "steps", "batch", "length", "learning_rate",
    "final_rate", "warmup", "weight_decay", "clip", "seed", "device",
)  # fmt: skip


def train_task(task: str | None, given: dict[str, Any], out: Path | None, json: bool) -> None:
    from pyseq._cuda import usable_device
    from pyseq.tasks import Settings, train

    if task is None:
        alone = next(n for n in ("heads", "negative", "lengths") if n in given)
        raise typer.BadParameter("goes with --task", param_hint=f"--{alone}")
    for name in given:
        if name not in TAKES:
            option = "PATH" if name == "data" else f"--{name.replace('_', '-')}"
            raise typer.BadParameter("does not go with --task", param_hint=option)
    values = dict(given)
    if "length" in values:
        values["train"] = (min(3, values["length"]), values.pop("length"))
    if "lengths" in values:
        values["lengths"] = whole_numbers(values["lengths"])
    values["device"] = usable_device(values.get("device"))
    settings = Settings(**values)
    with bar() as progress:
        progress.columns = (*progress.columns, TextColumn("loss {task.fields[loss]:.4f}"))
        shown = progress.add_task(f"training on {settings.task}", total=settings.steps, loss=float("nan"))
        result = train(settings, out, lambda step, loss: progress.update(shown, completed=step, loss=loss))
    if json:
        print_json(result.to_json())
        return
    table = Table("length", "answers right", "words right")
    for column in table.columns:
        column.justify = "right"
    for a in result.accuracies:
        table.add_row(str(a.length), f"{a.token:.3f}", f"{a.sequence:.3f}")
    console = results()
    console.print(table)
    console.print(
        f"{settings.task}, {settings.layer}, {result.parameters} parameters, trained on lengths "
        f"{settings.train[0]} to {settings.train[1]}; a guess is right {result.chance:.3f} of the time"
    )
    if out is not None:
        console.print(f"run         {out}", soft_wrap=True)


def whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected lengths such as 40,128", param_hint="--lengths") from None
