"""A training run: from settings to a folder with checkpoints, a log and a curve."""

from __future__ import annotations

import copy
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyseq._cuda import usable_device
from pyseq.models import CausalLM

from . import checkpoint
from .batches import Batch, Batches, carried_state, final_rows, move
from .chart import Curve, draw
from .corpus import Corpus, open_corpus, prepare, text_files
from .evaluate import bits_per_byte
from .log import Log, read
from .model import fresh_model, load_model
from .optimizer import adamw, rate
from .settings import Settings


class Watcher:
    """What a run tells whoever watches. Every method may be overridden; none has to be."""

    def stage(self, name: str, done: int, total: int) -> None:
        """A part of the work other than training steps: `done` of `total`."""

    def begin(self, run: Run) -> None:
        """All is ready: the first step comes next."""

    def step(self, record: dict[str, Any]) -> None:
        """A step or an evaluation was logged."""


@dataclass(frozen=True)
class Result:
    checkpoint: Path
    curve: Curve
    picture: Path  # the curve, as a PNG
    log: Path
    step: int
    steps: int
    held_out: float | None  # bits per byte
    gzip: float
    xz: float
    parameters: int
    stopped_by: int | None  # the signal that ended the run early

    @property
    def complete(self) -> bool:
        return self.step == self.steps


def train(settings: Settings, out: Path, watcher: Watcher | None = None) -> Result:
    """Starts a run in the folder `out`, which must not hold one."""
    if checkpoint.checkpoints(out):
        raise ValueError(f"out: {out} already holds a run; resume it or choose another folder")
    usable_device(settings.device)
    watcher = watcher or Watcher()
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.sweep(out)
    torch.manual_seed(settings.seed)
    model, codec = fresh_model(settings)
    corpus = prepare(
        out / "data", text_files(settings.data), codec, settings.held_out, lambda d, n: watcher.stage("reading", d, n)
    )
    return Run(settings, out, corpus, model, watcher).go()


def resume(out: Path, watcher: Watcher | None = None) -> Result:
    """Goes on from the last checkpoint in `out`, with its settings, to the same bits as a run that never stopped."""
    found = checkpoint.checkpoints(out)
    if not found:
        raise ValueError(f"resume: {out} holds no checkpoint")
    checkpoint.sweep(out)
    facts = checkpoint.facts(found[-1])
    settings = Settings.from_json(facts["settings"])
    usable_device(settings.device)
    run = Run(settings, out, open_corpus(out / "data"), load_model(found[-1], settings), watcher or Watcher(), facts)
    run.restore(found[-1])
    return run.go()


class Run:
    """The state of a run and its loop."""

    def __init__(
        self,
        settings: Settings,
        out: Path,
        corpus: Corpus,
        model: CausalLM,
        watcher: Watcher,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.settings, self.out, self.corpus, self.model, self.watcher = settings, out, corpus, model, watcher
        self.batches = Batches(corpus.train, settings.batch, settings.length, settings.seed, settings.carry_state)
        self.optimizer = self._adamw(model)
        self.rows: Any = None  # the carried state of each row, after the last batch
        facts = facts or {"step": 0, "steps": settings.steps, "held_out": None, "log_bytes": 0}
        self.step: int = facts["step"]
        self.steps: int | None = facts["steps"]
        self.held_out: float | None = facts["held_out"]
        self._log_bytes: int = facts["log_bytes"]

    def restore(self, path: Path) -> None:
        leaves = checkpoint.load_optimizer(path, self.model, self.optimizer)
        if leaves:
            like = self.model.init_state(self.settings.batch)
            self.rows = checkpoint.unflatten([leaf.to(self.settings.device) for leaf in leaves], like)
        checkpoint.restore_random(checkpoint.facts(path))

    def go(self) -> Result:
        began = time.monotonic()
        log = Log(self.out / "log.jsonl", self._log_bytes)
        try:
            if self.step == 0:
                self._evaluate(log)
            if self.steps is None:
                self.steps = self._steps_within(began)
            self.watcher.begin(self)
            with _signals() as caught:
                stopped_by = self._loop(log, self.steps, caught)
        finally:
            log.close()
        return self._result(stopped_by)

    def _loop(self, log: Log, steps: int, caught: list[int]) -> int | None:
        evaluate_every = self.settings.evaluate_every or -(-steps // 5)
        save_every = self.settings.save_every or -(-steps // 5)
        while self.step < steps and not caught:
            began = time.perf_counter()
            learning_rate = rate(
                self.step, steps, self.settings.warmup, self.settings.learning_rate, self.settings.final_rate
            )
            loss, norm, self.rows = self._update(self.model, self.optimizer, self.step, self.rows, learning_rate)
            self.step += 1
            seconds = time.perf_counter() - began
            record = {
                "step": self.step,
                "bytes": self._bytes_read,
                "loss": loss,
                "bits_per_byte": loss / math.log(2) / self.corpus.train.bytes_per_token,
                "learning_rate": learning_rate,
                "gradient_norm": norm,
                "tokens_per_second": round(self.settings.tokens_per_step / seconds, 1),
            }
            log.write(**record)
            self.watcher.step(record)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of step {self.step} is {loss}; try a lower learning rate")
            if self.step % evaluate_every == 0 or self.step == steps:
                self._evaluate(log)
            if self.step % save_every == 0:
                self._save(log)
        self._save(log)
        return caught[0] if caught and self.step < steps else None

    def _update(
        self, model: CausalLM, optimizer: torch.optim.Optimizer, step: int, rows: Any, learning_rate: float
    ) -> tuple[float, float, Any]:
        """One optimizer step: mean loss in nats per token, norm of the gradient before clipping, rows' state."""
        count = self.settings.accumulate
        total = torch.zeros((), device=self.settings.device)
        optimizer.zero_grad(set_to_none=True)
        for k in range(step * count, (step + 1) * count):
            batch = self.batches[k]
            loss, state = self._loss(model, batch, carried_state(rows, batch))
            rows = final_rows(state, batch) if self.settings.carry_state else None
            (loss / count).backward()
            total += loss.detach() / count
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        loss_value, norm_value = torch.stack([total, norm]).tolist()  # the one place where a step waits for its device
        return loss_value, norm_value, rows

    def _loss(self, model: CausalLM, batch: Batch, state: Any) -> tuple[Tensor, Any]:
        device = torch.device(self.settings.device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.bf16):
            out = model(move(batch.inputs, device), state, cu_seqlens=move(batch.cu_seqlens, device))
        return F.cross_entropy(out.logits[0].float(), move(batch.targets[0], device)), out.state

    def _evaluate(self, log: Log) -> None:
        self.held_out = bits_per_byte(
            self.model,
            self.corpus.held_out,
            bf16=self.settings.bf16,
            progress=lambda done, total: self.watcher.stage("evaluating", done, total),
        )
        record = {"step": self.step, "bytes": self._bytes_read, "held_out_bits_per_byte": self.held_out}
        log.write(**record)
        self.watcher.step(record)

    def _steps_within(self, began: float) -> int:
        """How many steps fit into the time limit, by timing some on a copy; an evaluation has been timed already."""
        assert self.settings.time_limit is not None
        evaluation = time.monotonic() - began
        model = copy.deepcopy(self.model)
        optimizer = self._adamw(model)
        seconds: list[float] = []
        limit = min(5.0, self.settings.time_limit / 20)
        measured = time.monotonic()
        while len(seconds) < 4 or time.monotonic() - measured < limit:
            self.watcher.stage("timing", min(99, int(100 * (time.monotonic() - measured) / limit)), 100)
            start = time.perf_counter()
            self._update(model, optimizer, len(seconds), None, 0.0)
            seconds.append(time.perf_counter() - start)
        self.watcher.stage("timing", 100, 100)
        left = self.settings.time_limit - (time.monotonic() - began) - 5 * evaluation
        return max(5, int(left / statistics.median(seconds[1:])))

    def _save(self, log: Log) -> None:
        facts = {
            "settings": self.settings.to_json(),
            "steps": self.steps,
            "held_out": self.held_out,
            "gzip": self.corpus.gzip,
            "xz": self.corpus.xz,
            "log_bytes": log.sync(),
        }
        checkpoint.save(self.out, self.step, self.model, self.optimizer, self.rows, facts)

    def _result(self, stopped_by: int | None) -> Result:
        parameters = sum(p.numel() for p in self.model.parameters())
        title = f"{parameters / 1e6:.2f} M parameters, step {self.step} of {self.steps}"
        curve = Curve.from_log(title, read(self.out / "log.jsonl"), self.corpus.gzip, self.corpus.xz)
        draw(curve, self.out / "curve.png")
        assert self.steps is not None
        return Result(
            checkpoint=checkpoint.checkpoints(self.out)[-1],
            curve=curve,
            picture=self.out / "curve.png",
            log=self.out / "log.jsonl",
            step=self.step,
            steps=self.steps,
            held_out=self.held_out,
            gzip=self.corpus.gzip,
            xz=self.corpus.xz,
            parameters=parameters,
            stopped_by=stopped_by,
        )

    @property
    def _bytes_read(self) -> int:
        return round(self.step * self.settings.tokens_per_step * self.corpus.train.bytes_per_token)

    def _adamw(self, model: CausalLM) -> torch.optim.AdamW:
        s = self.settings
        return adamw(model, s.learning_rate, s.weight_decay, (s.beta1, s.beta2))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM: the first ends the run after its step, a second one at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, frame: object) -> None:
        if caught:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        caught.append(number)

    before: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
