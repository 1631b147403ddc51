"""How a training run shows itself on standard error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pyseq.train import Watcher
from pyseq.train.loop import Run

from .output import messages


class _Steps(Progress):
    """A bar, and below it a line of facts."""

    facts = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.facts:
            yield Text(self.facts, style="dim")


class TrainingBars(Watcher):
    """Shows the stages and the steps of a run."""

    def __init__(self) -> None:
        self.progress = _Steps(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=messages(),
        )
        self._tasks: dict[str, TaskID] = {}
        self._loss = self._bits = self._speed = 0.0
        self._held_out = ""

    def stage(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = self.progress.add_task(name, total=total)
        self.progress.update(self._tasks[name], completed=done, total=total)
        if done >= total:
            self.progress.remove_task(self._tasks.pop(name))

    def begin(self, run: Run) -> None:
        parameters = sum(p.numel() for p in run.model.parameters())
        train, held_out, settings = run.corpus.train, run.corpus.held_out, run.settings
        self.progress.console.print(
            f"{parameters / 1e6:.2f} M parameters, {train.text_bytes / 1e6:.2f} MB of text to train on, "
            f"{held_out.text_bytes / 1e6:.2f} MB held out, {run.steps} steps of {settings.tokens_per_step} tokens"
        )
        self._tasks["training"] = self.progress.add_task("training", total=run.steps, completed=run.step)

    def step(self, record: dict[str, Any]) -> None:
        if "held_out_bits_per_byte" in record:
            bits = record["held_out_bits_per_byte"]
            self._held_out = f"  held-out {bits:.3f}"
            self.progress.console.print(f"step {record['step']}: held-out text {bits:.3f} bits per byte")
            self._show()
            return
        # One step is noisy: show means over about the last ten.
        share = 0.1 if self._speed else 1.0
        self._loss += share * (record["loss"] - self._loss)
        self._bits += share * (record["bits_per_byte"] - self._bits)
        self._speed += share * (record["tokens_per_second"] - self._speed)
        self._show()
        self.progress.update(self._tasks["training"], completed=record["step"])

    def _show(self) -> None:
        if self._speed:   # not before the first step
            self.progress.facts = (
                f"loss {self._loss:.3f}  bits per byte {self._bits:.3f}{self._held_out}  {self._speed:,.0f} tokens/s"
            )
