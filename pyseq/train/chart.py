"""The loss curve of a run, as a PNG and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Curve:
    """Bits per byte against the bytes of text read; gzip and xz on the held-out text."""

    title: str
    train: list[tuple[float, float]]
    held_out: list[tuple[float, float]]
    gzip: float
    xz: float

    @classmethod
    def from_log(cls, title: str, records: Sequence[dict[str, Any]], gzip: float, xz: float) -> Curve:
        def points(name: str) -> list[tuple[float, float]]:
            return [(r["bytes"], r[name]) for r in records if name in r]

        return cls(title, _smooth(points("bits_per_byte")), points("held_out_bits_per_byte"), gzip, xz)


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over groups of consecutive steps, at most 200 of them."""
    size = -(-len(points) // 200)
    groups = [points[i : i + size] for i in range(0, len(points), max(1, size))]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def draw(curve: Curve, path: Path) -> None:
    """Writes the PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for points, label, style in ((curve.train, "train", {}), (curve.held_out, "held-out", {"marker": "o"})):
        if points:
            axes.plot([x / 1e6 for x, _ in points], [y for _, y in points], label=label, **style)  # type: ignore[arg-type]
    axes.axhline(curve.gzip, color="tab:gray", linestyle="--", label=f"gzip -9 on held-out: {curve.gzip:.2f}")
    axes.axhline(curve.xz, color="tab:gray", linestyle=":", label=f"xz -9e on held-out: {curve.xz:.2f}")
    axes.set(title=curve.title, xlabel="text read (millions of bytes)", ylabel="loss (bits per byte)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png")
    partial.replace(path)


def as_text(curve: Curve, width: int = 64, height: int = 12) -> str:
    """The curve in braille dots, two by four to a character, with a level line for xz."""
    points = curve.train + curve.held_out
    if not points:
        return ""
    right = max(x for x, _ in points)
    top = max(max(y for _, y in points), curve.gzip)
    grid = [[0] * width for _ in range(height)]

    def dot(x: float, y: float) -> None:
        column = min(2 * width - 1, int(x / right * (2 * width - 1)))
        row = min(4 * height - 1, int((1 - y / top) * (4 * height - 1)))
        bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
        grid[row // 4][column // 2] |= bits[row % 4][column % 2]

    for (x0, y0), (x1, y1) in zip(curve.train, curve.train[1:], strict=False):
        for i in range(2 * width + 1):
            share = i / (2 * width)
            dot(x0 + share * (x1 - x0), y0 + share * (y1 - y0))
    for i in range(0, 2 * width, 3):
        dot(i / (2 * width) * right, curve.xz)
    lines = []
    for i, row in enumerate(grid):
        label = f"{top * (1 - i / (height - 1)):5.2f}" if i % 3 == 0 or i == height - 1 else " " * 5
        lines.append(f"{label} ┤" + "".join(chr(0x2800 + cell) if cell else " " for cell in row))
    lines.append(" " * 6 + "└" + "─" * width)
    lines.append(" " * 7 + "0" + f"{right / 1e6:.2g} MB read".rjust(width - 1))
    return "\n".join(lines)
