"""benchmarks/results/*.json and <card>/*.json -> docs/performance.md and its plots: nothing that a file lacks."""

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import cards, section

HEAD = """# Performance

Every figure here comes from a file in `benchmarks/results/` and was printed by `make bench`. Medians on two threads;
the cases of a row took turns, so a ratio compares like with like. *bound* is the time that the machine's memory
bandwidth or its float32 units, both measured in the same run, would need at least; *of bound* is bound over ours. It is
above 100 % where data stay in the cache, or where bfloat16 products run at twice the rate of float32.
"""
NOTES = Path(__file__).parent / "notes.md"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _value(work: dict[str, Any], seconds: float) -> str:
    return f"{work['tokens'] / seconds:.0f} tok/s" if work.get("tokens") else _time(seconds)


def ratios(work: dict[str, Any]) -> dict[str, float]:
    """Peer over ours: how many times as long the peer takes."""
    names = list(work["timings"])
    ours = work["timings"][names[0]]["median"]
    return {n: work["timings"][n]["median"] / ours for n in names[1:]}


def _row(work: dict[str, Any]) -> str:
    names = list(work["timings"])
    ours = work["timings"][names[0]]
    peers = []
    for name, ratio in ratios(work).items():
        target = work["targets"].get(name)
        goal = "" if target is None else f" (goal {target:g}x{', met' if ratio >= target else ''})"
        peers.append(f"{name} {_value(work, work['timings'][name]['median'])}: **{ratio:.3g}x**{goal}")
    peers += [f"{name}: not installed" for name in work["missing"]]
    bound = f"{_time(work['bound'])} ({work['bound_by']})" if "bound" in work else ""
    share = f"{100 * work['bound'] / ours['median']:.0f} %" if "bound" in work else ""
    beside = "" if ours.get("probe") is None else f", at {ours['probe']:.0f} GB/s"
    return f"| {work['work']} | {_value(work, ours['median'])}{beside} | {'<br>'.join(peers)} | {bound} | {share} |"


def _plot(works: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [(w["work"], n, r) for w in works if w["targets"] for n, r in ratios(w).items() if not n.startswith("pyseq")]
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(bars) + 1.2), layout="constrained")
    axes.barh([f"{work}  |  {who}" for work, who, _ in bars], [r for *_, r in bars], color="#3b6fb6")
    axes.axvline(1, color="black", linewidth=0.8)
    for i, (*_, r) in enumerate(bars):
        axes.annotate(f" {r:.3g}x", (r, i), va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("time of the peer over time of pyseq (medians, two threads)")
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(x=0.12, y=0.01)
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def page(results: Path) -> str:
    """The text of docs/performance.md: machines with a results file, GPUs with a folder of them, the notes."""
    parts = [HEAD]
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text())
        works = _in_order(result)
        versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        parts.append(f"## {result['cpu']['model name']}, family {result['cpu']['cpu family']}, model "
                     f"{result['cpu']['model']}, {result['cores']} cores\n\n{result['date']}; {versions}.\n")
        parts.append("Machine, measured in the same run: "
                     + ", ".join(f"{k} {v}" for k, v in result["probe"].items()) + ".\n")
        if any(w["targets"] for w in works):
            parts.append(f"![Time of each peer over time of pyseq](performance-{path.stem}.png)\n")
        parts.append("| work | pyseq | peers | bound | of bound |\n|---|---|---|---|---|\n"
                     + "\n".join(_row(w) for w in works) + "\n")
    parts += [section(folder) for folder in cards(results)]
    parts.append(NOTES.read_text())
    return "\n".join(parts)


def _in_order(result: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(result["works"], key=lambda w: (not w["targets"], w["work"]))


def write(results: Path, docs: Path) -> None:
    """The page and its plots."""
    for path in sorted(results.glob("*.json")):
        works = _in_order(json.loads(path.read_text()))
        if any(w["targets"] for w in works):
            _plot(works, docs / f"performance-{path.stem}.png")
    (docs / "performance.md").write_text(page(results))
