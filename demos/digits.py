"""Digits drawn from a text through CrossWKV: docs/digits.json and docs/digits.png.

A text such as "a thin seven" is read letter by letter into the state of CrossWKV, and the patches of an image read that
state: there is no other way from the text to the image. The generator learns by flow matching (Lipman et al., 2023) on
scikit-learn's 1797 digits of 8 x 8 pixels: x[t] = (1 - t) noise + t image, and the model gives the velocity
image - noise. A classifier that has seen real digits alone then reads what was drawn.

    pip install scikit-learn
    python -m demos.digits          # some minutes on one core
    python -m demos.digits --draw   # the picture alone, from the numbers
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import pyseq
from pyseq.layers import CrossWKVState
from pyseq.models import state as states
from pyseq.train.optimizer import adamw, rate

DOCS = Path(__file__).parent.parent / "docs"
NUMBERS, PICTURE = DOCS / "digits.json", DOCS / "digits.png"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHTS = ("thin", "bold")
LETTERS = " abcdefghijklmnopqrstuvwxyz"
KINDS = [(d, w) for w in range(2) for d in range(10)]
WIDTH, PATCHES, LONGEST = 64, 16, len("a thin three")
EACH, STEPS, FLOW, BATCH = 20, 1500, 24, 48   # drawn per text; training steps; steps of the flow; images per step


def text(digit: int, weight: int) -> str:
    return f"a {WEIGHTS[weight]} {NAMES[digit]}"


def letters(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Numbers of the letters and where there are any, [B, LONGEST]."""
    ids = torch.tensor([[LETTERS.index(c) for c in t.ljust(LONGEST)] for t in texts])
    return ids, torch.arange(LONGEST) < torch.tensor([len(t) for t in texts])[:, None]


class Block(nn.Module):
    """x reads the text; then its patches mix, then its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.read = pyseq.CrossWKV(WIDTH, WIDTH, head_size=32)
        self.patches = nn.Sequential(nn.Linear(PATCHES, 64), nn.GELU(), nn.Linear(64, PATCHES))
        self.channels = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.time = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, when: Tensor, absorbed: CrossWKVState) -> Tensor:
        x = x + self.time(when)[:, None]
        x = x + self.read(self.norms[0](x), state=absorbed)[0]
        x = x + self.patches(self.norms[1](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[2](x))


class Generator(nn.Module):
    """The velocity at images x [B, 16, 4], 2 x 2 pixels to a patch, at times t [B], told texts that were absorbed."""

    def __init__(self) -> None:
        super().__init__()
        self.letter = nn.Embedding(len(LETTERS), WIDTH)
        self.into = nn.Linear(4, WIDTH)
        self.place = nn.Parameter(0.3 * torch.randn(PATCHES, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4))

    def absorb(self, texts: list[str], rows: Tensor) -> list[CrossWKVState]:
        """Per block what is to be read of texts[rows], each text absorbed once."""
        ids, mask = letters(texts)
        context = self.letter(ids)
        return [states.select(block.read.absorb(context, context_mask=mask), rows) for block in self.blocks]

    def forward(self, x: Tensor, t: Tensor, absorbed: list[CrossWKVState]) -> Tensor:
        waves = t[:, None] * torch.exp(torch.linspace(0, math.log(200), WIDTH // 2))
        when = torch.cat([waves.sin(), waves.cos()], 1)
        x = self.into(x) + self.place
        for block, state in zip(self.blocks, absorbed, strict=True):
            x = block(x, when, state)
        return self.out(x)


def to_patches(images: Tensor) -> Tensor:
    return images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, PATCHES, 4)


def to_images(patches: Tensor) -> Tensor:
    return patches.view(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 8, 8)


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Images from -1 to 1, their digits, and whether they have more ink than the median of their digit."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 8 - 1
    digits, ink = torch.tensor(found.target), images.mean((1, 2))
    middles = torch.stack([ink[digits == d].median() for d in range(10)])
    return images, digits, (ink > middles[digits]).long()


def fit(model: Generator, steps: int) -> list[float]:
    images, digits, weights = data()
    patches = to_patches(images)
    texts, told = [text(d, w) for d, w in KINDS], 10 * weights + digits
    optimizer, random, losses = adamw(model, 3e-3, 0.01, (0.9, 0.99)), torch.Generator().manual_seed(0), []
    for step in range(steps):
        rows = torch.randint(len(patches), (BATCH,), generator=random)
        noise = torch.randn(BATCH, PATCHES, 4, generator=random)
        t = torch.rand(BATCH, generator=random)
        x = torch.lerp(noise, patches[rows], t[:, None, None])
        velocity = model(x, t, model.absorb(texts, told[rows]))
        loss = (velocity - (patches[rows] - noise)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, 100, 3e-3, 0.02)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: loss {sum(losses[-200:]) / 200:.4f}", flush=True)
    return losses


@torch.no_grad()
def generate(model: Generator, texts: list[str], seed: int) -> Tensor:
    """EACH images per text, [B, 8, 8] from -1 to 1, by Heun's rule along the flow. A text is absorbed once."""
    rows = torch.arange(len(texts)).repeat_interleave(EACH)
    absorbed = model.absorb(texts, rows)
    x = torch.randn(len(rows), PATCHES, 4, generator=torch.Generator().manual_seed(seed))
    for i in range(FLOW):
        now, then = (torch.full((len(rows),), j / FLOW) for j in (i, i + 1))
        slope = model(x, now, absorbed)
        x = x + (slope + model(x + slope / FLOW, then, absorbed)) / (2 * FLOW)
    return to_images(x).clamp(-1, 1)


def judge(images: Tensor, asked: Tensor) -> dict[str, float]:
    """How often a classifier of real digits sees the digit that was asked for; and how often in real ones it had not
    seen."""
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import SVC

    real, digits, _ = data()
    flat, judge = real.flatten(1).numpy(), SVC(gamma=0.02)
    unseen = cross_val_score(judge, flat, digits.numpy(), cv=5).mean()
    said = judge.fit(flat, digits.numpy()).predict(images.flatten(1).numpy())
    return {"drawn_as_asked": float((said == asked.numpy()).mean()), "classifier_on_unseen_real_digits": float(unseen)}


def run(steps: int) -> dict:
    torch.manual_seed(0)
    model, began = Generator(), time.monotonic()
    losses = fit(model, steps)
    texts = [text(d, w) for d, w in KINDS]
    images = generate(model, texts, seed=1)
    asked, weights = torch.tensor(KINDS).repeat_interleave(EACH, 0).T
    # The same letters in another order are another text: "a bold one" backwards says nothing that was learnt.
    backwards = generate(model, [t[::-1] for t in texts], seed=1)
    ink = (images.mean((1, 2)) + 1) / 2
    real, digits, real_weights = data()
    real_ink = (real.mean((1, 2)) + 1) / 2
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "seconds": round(time.monotonic() - began),
        "final_loss": sum(losses[-200:]) / 200,
        "generated": len(images),
        **judge(images, asked),
        "drawn_as_asked_text_backwards": judge(backwards, asked)["drawn_as_asked"],
        "ink": {name: float(ink[weights == w].mean()) for w, name in enumerate(WEIGHTS)},
        "ink_of_real_digits": {name: float(real_ink[real_weights == w].mean()) for w, name in enumerate(WEIGHTS)},
        "shown": [_levels(images[(asked == d) & (weights == w)][:3]) for w in range(2) for d in range(10)],
        "shown_real": [_levels(real[(digits == d) & (real_weights == w)][:1]) for w in range(2) for d in range(10)],
    }


def _levels(images: Tensor) -> list[str]:
    """Each image as 64 hexadecimal levels."""
    levels = ((images + 1) * 7.5).round().long().flatten(1)
    return ["".join(f"{v:x}" for v in image) for image in levels.tolist()]


def draw(found: dict, path: Path) -> None:
    """Per weight a row of real digits and three of drawn ones. Ink is grey, and what has none is clear."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), dpi=110, layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    grid = figure.subplots(8, 10)
    for row in range(8):
        weight, which = divmod(row, 4)
        for digit in range(10):
            axes, place = grid[row][digit], 10 * weight + digit
            image = found["shown_real"][place][0] if which == 0 else found["shown"][place][which - 1]
            ink = torch.tensor([int(v, 16) / 15 for v in image]).view(8, 8, 1)
            colour = (0.5, 0.5, 0.5) if which == 0 else (0.12, 0.62, 0.43)
            axes.imshow(torch.cat([torch.tensor(colour).expand(8, 8, 3), ink], 2).numpy())
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_facecolor("none")
            for spine in axes.spines.values():
                spine.set_color("#8080804d")
            if row == 0:
                axes.set_title(NAMES[digit], color="#808080", fontsize=9)
        label = f"real,\n{WEIGHTS[weight]}" if which == 0 else f'"a {WEIGHTS[weight]} …"'
        grid[row][0].set_ylabel(label, color="#808080", fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--draw", action="store_true", help="the picture alone, from the numbers in docs/")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not given.draw:
        NUMBERS.write_text(json.dumps(run(given.steps), indent=1) + "\n")
    found = json.loads(NUMBERS.read_text())
    draw(found, PICTURE)
    print(json.dumps({k: v for k, v in found.items() if not k.startswith("shown")}, indent=1))
    print(f"{NUMBERS}\n{PICTURE}")


if __name__ == "__main__":
    main()
