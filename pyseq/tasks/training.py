"""Training on words of some lengths, measuring on others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyseq._cuda import usable_device
from pyseq.train.optimizer import adamw, rate

from .model import Tagger
from .problems import IGNORED, Task, find
from .settings import Settings

Watch = Callable[[int, float], None]   # told of every step: how many are done, and its loss


@dataclass(frozen=True)
class Accuracy:
    """Of words of a length: the share of the answers that are right, and of the words with every answer right."""

    length: int
    token: float
    sequence: float


@dataclass(frozen=True)
class Result:
    settings: Settings
    parameters: int
    chance: float   # the share of right answers of a guess
    losses: list[float]   # per step
    accuracies: list[Accuracy]   # per length to be measured

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings.to_json(),
            "parameters": self.parameters,
            "chance": self.chance,
            "final_loss": self.losses[-1],
            "accuracies": [asdict(a) for a in self.accuracies],
        }


def train(settings: Settings, out: Path | None = None, watch: Watch | None = None) -> Result:
    """Trains a model from random weights; into the folder `out` go result.json, log.jsonl and model.safetensors."""
    usable_device(settings.device)
    if out is not None:
        if (out / "result.json").exists():
            raise ValueError(f"out: {out} already holds a run; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    task = find(settings.task)
    model = Tagger(task, settings)
    losses = _fit(model, task, settings, watch)
    accuracies = [measure(model, task, length, settings) for length in settings.lengths]
    parameters = sum(p.numel() for p in model.parameters())
    result = Result(settings, parameters, 1 / task.classes, losses, accuracies)
    if out is not None:
        from safetensors.torch import save_file

        save_file({name: p.contiguous() for name, p in model.state_dict().items()}, out / "model.safetensors")
        lines = (json.dumps({"step": i + 1, "loss": loss}) for i, loss in enumerate(losses))
        (out / "log.jsonl").write_text("\n".join(lines) + "\n")
        (out / "result.json").write_text(json.dumps(result.to_json(), indent=1) + "\n")
    return result


def _fit(model: Tagger, task: Task, s: Settings, watch: Watch | None) -> list[float]:
    optimizer = adamw(model, s.learning_rate, s.weight_decay, (0.9, 0.98))
    lengths, random, losses = task.lengths(*s.train), torch.Generator().manual_seed(s.seed), []
    for step in range(s.steps):
        length = lengths[int(torch.randint(len(lengths), (), generator=random))]
        tokens, targets = _on(s.device, *task.sample(s.batch, length, _seed(s.seed, step)))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, s.steps, s.warmup, s.learning_rate, s.final_rate)
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of step {step + 1} is {losses[-1]}; try a lower learning rate")
        if watch is not None:
            watch(step + 1, losses[-1])
    return losses


@torch.no_grad()
def measure(model: Tagger, task: Task, length: int, s: Settings) -> Accuracy:
    """On words that training never draws from the same seed: theirs are negative."""
    answers = right = whole = 0
    for begin in range(0, s.samples, s.batch):
        count = min(s.batch, s.samples - begin)
        tokens, targets = _on(s.device, *task.sample(count, length, -_seed(s.seed, begin) - 1))
        asked = targets != IGNORED
        hits = (model(tokens).argmax(-1) == targets) & asked
        answers += int(asked.sum())
        right += int(hits.sum())
        whole += int((hits == asked).all(1).sum())
    return Accuracy(length, right / answers, whole / s.samples)


def _seed(seed: int, step: int) -> int:
    return seed * 1_000_003 + step


def _on(device: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(device) for t in tensors)
