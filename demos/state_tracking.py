"""One layer, two tasks, with and without negative eigenvalues: docs/state_tracking.json and docs/state_tracking.png.

Gated DeltaNet on words of 3 to 40 tokens, measured on words of up to 512. Its transition is exp(g) (I - beta k k^T):
with beta in [0, 1] its eigenvalues are in [0, 1], with beta in [0, 2] they go down to -1.

    python -m demos.state_tracking            # 8 runs; finished ones in runs/state_tracking are kept
    python -m demos.state_tracking --draw     # the picture alone, from the numbers
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from safetensors.torch import load_file

from pyseq.tasks import Settings, find, train
from pyseq.tasks.model import Tagger

DOCS = Path(__file__).parent.parent / "docs"
NUMBERS, PICTURE = DOCS / "state_tracking.json", DOCS / "state_tracking.png"
LENGTHS = (40, 64, 128, 256, 512)
TITLES = {"parity": "parity of a bit string", "s3-swaps": "products of swaps in S3"}
SEEDS = (0, 1)
# Both are in the middle of what is light and what is dark: the picture stands on either page.
COLOURS = {True: "#1f9e6e", False: "#e0662f"}
INK = "#808080"


def runs() -> list[Settings]:
    common = {"train": (3, 40), "lengths": LENGTHS, "steps": 500, "warmup": 50, "samples": 256}
    return [
        Settings(task=task, negative=negative, seed=seed, **common)  # type: ignore[arg-type]
        for seed in SEEDS for task in TITLES for negative in (True, False)
    ]  # fmt: skip


def collect(folder: Path) -> list[dict]:
    found = []
    for settings in runs():
        out = folder / f"{settings.task}-{'negative' if settings.negative else 'positive'}-{settings.seed}"
        if not (out / "result.json").exists():
            train(settings, out)
        found.append(json.loads((out / "result.json").read_text()) | learnt(settings, out))
        line = ", ".join(f"{a['length']}: {a['sequence']:.3f}" for a in found[-1]["accuracies"])
        print(f"{out.name}: beta {found[-1]['beta']}, decay {found[-1]['decay']}")
        print(f"{out.name}: loss {found[-1]['final_loss']:.4f}, words right at length {line}", flush=True)
    return found


@torch.no_grad()
def learnt(settings: Settings, out: Path) -> dict[str, list]:
    """beta and exp(g) of every token (the last one begins a word) in every head."""
    task = find(settings.task)
    model = Tagger(task, settings)
    model.load_state_dict(load_file(out / "model.safetensors"))
    block = model.blocks[0]
    x = block.norm1(model.embedding(torch.arange(task.tokens)), None)[0]
    values = {"beta": block.mixer._beta(x), "decay": block.mixer.decay(x).exp()}
    return {name: [[round(v, 4) for v in row] for row in value.tolist()] for name, value in values.items()}


def draw(results: list[dict], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=110, layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    for axes, (task, title) in zip(figure.subplots(1, 2, sharey=True), TITLES.items(), strict=True):
        chosen = [r for r in results if r["settings"]["task"] == task]
        for negative in (True, False):
            lines = [r["accuracies"] for r in chosen if r["settings"]["negative"] is negative]
            for line in lines:
                axes.plot(LENGTHS, [a["token"] for a in line], color=COLOURS[negative], alpha=0.45, linewidth=1)
            middle = [statistics.median(a["token"] for a in at) for at in zip(*lines, strict=True)]
            label = "eigenvalues from -1 to 1" if negative else "eigenvalues from 0 to 1"
            axes.plot(LENGTHS, middle, color=COLOURS[negative], marker="o", linewidth=2.5, label=label)
        axes.axhline(chosen[0]["chance"], color=INK, linestyle=":", label="a guess")
        axes.axvline(chosen[0]["settings"]["train"][1], color=INK, linestyle="--", label="longest word trained on")
        axes.set_xscale("log", base=2)
        axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axes.minorticks_off()
        axes.set_ylim(0, 1.05)
        _neutral(axes, title)
    axes = figure.axes[0]
    axes.set_ylabel("answers that are right", color=INK)
    axes.legend(loc="lower left", fontsize=8, facecolor="none", edgecolor=INK, labelcolor=INK)
    figure.savefig(path, metadata={"Software": None})


def _neutral(axes: object, title: str) -> None:
    """Words and lines in a grey that can be read on white and on black."""
    axes.set_title(title, color=INK)  # type: ignore[attr-defined]
    axes.set_xlabel("length of the word", color=INK)  # type: ignore[attr-defined]
    axes.set_facecolor("none")  # type: ignore[attr-defined]
    axes.grid(color=INK, alpha=0.25)  # type: ignore[attr-defined]
    axes.tick_params(colors=INK)  # type: ignore[attr-defined]
    for spine in axes.spines.values():  # type: ignore[attr-defined]
        spine.set_color(INK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--draw", action="store_true", help="the picture alone, from the numbers in docs/")
    parser.add_argument("--runs", type=Path, default=Path("runs/state_tracking"), help="folder of the runs")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not given.draw:
        NUMBERS.write_text(json.dumps(collect(given.runs), indent=1) + "\n")
    draw(json.loads(NUMBERS.read_text()), PICTURE)
    print(f"{NUMBERS}\n{PICTURE}")


if __name__ == "__main__":
    main()
