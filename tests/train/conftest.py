from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pyseq.train import Settings

WORDS = ("state", "scan", "the", "a", "of", "step", "gate", "return", "import", "lambda", "self", "for", "in", "not")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more, and the runs in other processes use one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of 40 small text files, some in subfolders, one of them not ASCII."""
    draw = random.Random(0)
    folder = tmp_path / "text"
    for i in range(40):
        path = folder / ("a", "b/c", ".")[i % 3] / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (" ".join(draw.choices(WORDS, k=6)) for _ in range(draw.randint(1, 12)))
        path.write_text("\n".join(lines) + ("\nÆther → ∂h/∂t\n" if i == 7 else "\n"), encoding="utf-8")
    return folder


@pytest.fixture
def tiny(text: Path) -> Settings:
    """A run of 20 steps that takes a second."""
    return Settings(
        data=(str(text),), d_model=8, layers=2, d_state=4, batch=2, length=16, steps=20, warmup=4, evaluate_every=5,
        save_every=10, held_out=400, carry_state=True,
    )  # fmt: skip
