"""benchmarks/results/<card>/*.json -> the card's section of docs/performance.md. What a file lacks is not shown.

    python -m benchmarks.gpu.report [results folder] [docs folder]      writes the page again, plots left as they are
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PARTS = ("check", "bench", "profile")


def cards(results: Path) -> list[Path]:
    """The folders that hold results of a GPU."""
    return sorted(folder for folder in results.iterdir() if any((folder / f"{part}.json").is_file() for part in PARTS))


def section(folder: Path) -> str:
    found = {part: json.loads(path.read_text()) for part in PARTS if (path := folder / f"{part}.json").is_file()}
    card = next(iter(found.values()))["card"]
    parts = [f"## GPU: {card}\n", "Printed by `make gpu` on this card; files in "
             f"`benchmarks/results/{folder.name}/`.\n"]
    for part, content in found.items():
        parts.append(_head(part, content))
        if part == "bench":
            parts += _bench(content)
        if part == "profile":
            parts += _profile(content)
    return "\n".join(parts)


def _head(part: str, content: dict[str, Any]) -> str:
    items = content["items"].values()
    counts = [sum(i["ok"] is value for i in items) for value in (True, False, None)]
    end = "" if content["finished"] else "; it did not run to its end"
    text = (f"- **gpu-{part}**, {content['date']}, commit {content['commit']}: {counts[0]} passed, {counts[1]} failed, "
            f"{counts[2]} not applicable{end}.")
    facts = ", ".join(f"{k} {v}" for k, v in content["properties"].items() if k != "name")
    failed = [f"    - failed: {name}: {_line(i.get('why', ''))}" for name, i in content["items"].items()
              if i["ok"] is False]
    return "\n".join([text, f"    - {facts}", *failed]) + "\n"


def _bench(content: dict[str, Any]) -> list[str]:
    limits = ", ".join(f"{name} {value:.3g}" for name, value in content.get("limits", {}).items())
    rows = []
    for name, item in content["items"].items():
        if item["ok"] and "timings" in item and not name.endswith(", peers"):
            beside = content["items"].get(f"{name}, peers", {})
            rows.append(_row(name, item, beside if beside.get("ok") else {}))
    models = [
        f"| {name} | {i['tokens per second']:.0f} tokens/s | {_share(i['bound'], i['seconds per step'])} |"
        for name, i in content["items"].items() if i["ok"] and "tokens per second" in i
    ]
    parts = [f"Limits, measured in the same run: {limits}.\n"] if limits else []
    if rows:
        parts.append("bfloat16 data. *bound* is the time that these limits allow at best, *of bound* is bound over "
                     "ours; peers took turns with pyseq.\n")
        parts.append("| work | pyseq | peers | bound | of bound |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n")
    if models:
        parts.append("| model | pyseq | of the bound by memory |\n|---|---|---|\n" + "\n".join(models) + "\n")
    return parts


def _row(name: str, item: dict[str, Any], beside: dict[str, Any]) -> str:
    ours = item["timings"]["pyseq"]["median"]
    goal = item.get("goal")
    verdict = "" if goal is None else f" (goal {_time(goal)}{', met' if ours <= goal else ''})"
    peers = []
    for who, ratio in beside.get("ratios", {}).items():
        target = beside["targets"].get(who)
        wanted = "" if target is None else f" (goal {target:g}x{', met' if ratio >= target else ''})"
        peers.append(f"{who} {_time(beside['timings'][who]['median'])}: **{ratio:.3g}x**{wanted}")
    peers += [f"{who}: {_line(why)}" for who, why in beside.get("failed", {}).items() if not why.startswith("missing")]
    bound = f"{_time(item['bound'])} ({item['bound by']})" if "bound" in item else ""
    share = _share(item["bound"], ours) if "bound" in item else ""
    return f"| {name} | {_time(ours)}{verdict} | {'<br>'.join(peers)} | {bound} | {share} |"


def _profile(content: dict[str, Any]) -> list[str]:
    rows = []
    for name, item in content["items"].items():
        if item["ok"] and "medians" in item:
            rows.append(f"- {name}: " + ", ".join(f"{what} {_time(s)}" for what, s in item["medians"].items()))
        if item["ok"] and isinstance(item.get("kernels"), dict):
            rows.append(f"- {name}: " + ", ".join(f"{what} {_time(s)}" for what, s in item["kernels"].items()))
        for kernel in item["kernels"] if item["ok"] and isinstance(item.get("kernels"), list) else []:
            values = {**kernel["issue active %"], **kernel["DRAM %"]}
            rows.append(f"- {kernel['kernel']}: " + ", ".join(f"{n} {v}" for n, v in values.items()))
    return ["\n".join(rows) + "\n"] if rows else []


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3f} ms"


def _share(bound: float, seconds: float) -> str:
    return f"{100 * bound / seconds:.0f} %"


def _line(text: str) -> str:
    """For one cell of a table."""
    return (text.splitlines() or [""])[0].replace("|", "/")[:120]


if __name__ == "__main__":
    from benchmarks import report

    root = Path(__file__).resolve().parent.parent.parent
    given = [Path(argument) for argument in sys.argv[1:]]
    results, docs = given or [root / "benchmarks" / "results", root / "docs"]
    (docs / "performance.md").write_text(report.page(results))
