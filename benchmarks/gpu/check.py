"""Is everything right on this GPU? Every item is a process of its own: a fault in one leaves the others a device.

    python -m benchmarks.gpu.check [--dry-run] [--results FOLDER] [--seconds 460]
    python -m benchmarks.gpu.check [--dry-run] --item fuzz            one item, its result as JSON on the last line
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from . import fuzz, runtime
from .device import Cuda, Device, Dry, missing_kernels, ops
from .record import NotHere, Record

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


def built(device: Device) -> dict[str, Any]:
    """What this build holds; kernels that were to be there and are not are a failure."""
    from pyseq import _C

    there, missing = [op.name for op in ops(device)], missing_kernels()
    return {
        "ok": device.dry or not missing, "architectures": _C.cuda_architectures, "ops": there,
        "why": f"no CUDA kernels of {', '.join(missing)}" if missing else "",
        "summary": f"{device.backend} kernels of {', '.join(there)}, compiled for {_C.cuda_architectures}",
    }


# ---- the tests -------------------------------------------------------------------------------------------------------


def unimportable(tests: Path) -> dict[str, str]:
    """Test files that import at their top what is not installed here, and which module that is."""
    found = {}
    for path in sorted(tests.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in {n.split(".")[0] for n in names}:
                local = (path.parent / f"{name}.py").exists() or name == "conftest"
                if not local and importlib.util.find_spec(name) is None:
                    found[str(path.relative_to(tests.parent))] = name
    return found


def pytest_command(backend: str, left_out: dict[str, str], *, collect: bool) -> list[str]:
    """-W default: what the packages of this machine warn about is theirs. A test of a backend has it in its name."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests"), "-W", "default"]
    command += [f"--ignore={ROOT / path}" for path in left_out]
    if not importlib.util.find_spec("pytest_timeout"):
        command += ["-W", "ignore::pytest.PytestConfigWarning"]   # the suite's own setting of it
    command += ["-k", f"{backend} and not emulator"]
    if collect:
        return [*command, "--collect-only"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    return [*command, "--durations=5"]


def tests(device: Device, seconds: float) -> dict[str, Any]:
    """Every test of the suite that runs on this backend; in a dry run they are collected only."""
    if importlib.util.find_spec("pytest") is None:
        return {"ok": False, "why": f"pytest is not installed for {sys.executable}: the tests did not run"}
    left_out = unimportable(ROOT / "tests")
    if not device.dry:
        left_out["tests/simt"] = "pyseq._simt"   # the emulator is not built for a card
    for path, module in left_out.items():
        print(f"left out: {path}: {module} is not there", file=sys.stderr)
    command = pytest_command(device.backend, left_out, collect=device.dry)
    ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    summary = (ran.stdout.strip().splitlines() or [""])[-1].strip("= ")
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", ran.stdout, re.MULTILINE)
    return {
        "ok": ran.returncode == 0, "summary": summary, "failed": failed[:100], "left out": left_out,
        "why": "" if ran.returncode == 0 else "; ".join(failed[:3]) or summary,
        "output": "" if ran.returncode == 0 else (ran.stdout + ran.stderr)[-6000:],
    }


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------


def sanitizer_verdict(status: int, output: str) -> tuple[bool | None, str]:
    """Clean, not, or no answer, and why. A tool that printed no summary has looked at nothing."""
    if "Device not supported" in output:
        return None, "the tool refuses this device"
    summaries = re.findall(r"SUMMARY: (.*)", output)
    clean = [s for s in summaries if re.match(r"0 (errors|hazards)", s)]
    if status == 0 and summaries and len(clean) == len(summaries):
        return True, ""
    return False, "; ".join([f"status {status}", *(summaries or ["no summary"])])


def sanitizers(device: Device, seconds: float) -> dict[str, Any]:
    """The four tools over every kernel at its smallest shapes, side by side: each is mostly one busy processor."""
    target = [sys.executable, "-m", "benchmarks.gpu.runtime", "smallest"]
    if device.dry:
        subprocess.run(target, check=True, timeout=seconds)
        raise NotHere("no GPU: their target ran without them")
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise NotHere("compute-sanitizer is not on PATH")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}   # one allocation per tensor: exact bounds

    def one(name: str) -> tuple[str, dict[str, Any]]:
        command = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "5"]
        if name != "initcheck":   # that one must see torch's kernels too: they write what ours read
            command += ["--kernel-name", "kns=pyseq"]
        start = time.monotonic()
        try:
            ran = subprocess.run([*command, *target], capture_output=True, text=True, timeout=seconds, env=environment)
        except subprocess.TimeoutExpired:
            return name, {"ok": None, "why": f"not done after {seconds:.0f} s"}
        ok, why = sanitizer_verdict(ran.returncode, ran.stdout + ran.stderr)
        return name, {
            "ok": ok, "why": why, "seconds": round(time.monotonic() - start, 1),
            "output": "" if ok else (ran.stdout + ran.stderr)[-3000:],
        }

    with ThreadPoolExecutor(len(SANITIZERS)) as pool:
        found = dict(pool.map(one, SANITIZERS))
    wrong = [f"{n}: {f['why']}" for n, f in found.items() if f["ok"] is False]
    undone = [f"{n}: {f['why']}" for n, f in found.items() if f["ok"] is None]
    if len(undone) == len(found):
        raise NotHere("; ".join(undone))
    return {
        "ok": not wrong, "tools": found, "why": "; ".join(wrong),
        "summary": "; ".join([f"clean: {', '.join(n for n, f in found.items() if f['ok'])}", *undone]),
    }


# ---- the part --------------------------------------------------------------------------------------------------------


def fuzzing(device: Device, seconds: float) -> dict[str, Any]:
    draws, longest = (6, 12) if device.dry else (1000, fuzz.LONGEST)
    return fuzz.run(device, seconds, draws, longest)


# Name: what it does, and the most seconds that it may take.
ITEMS: dict[str, tuple[Callable[[Device, float], dict[str, Any]], float]] = {
    "built": (lambda device, _: built(device), 60),
    "graphs": (lambda device, _: runtime.graphs(device), 60),
    "streams": (lambda device, _: runtime.streams(device), 60),
    "second device": (lambda device, _: runtime.second_device(device), 60),
    "tests": (tests, 180),
    "fuzz": (fuzzing, 80),
    "big offsets": (lambda device, _: runtime.big_offsets(device), 90),
    "compute-sanitizer": (sanitizers, 110),
}
STARTING = 20   # seconds that a process may take to import torch and find the device, beside its item


def child(name: str, device: Device, seconds: float) -> dict[str, Any]:
    """One item in this process."""
    try:
        return ITEMS[name][0](device, seconds)
    except NotHere as why:
        return {"ok": None, "why": str(why)}
    except subprocess.TimeoutExpired:
        return {"ok": False, "why": f"not done after {seconds:.0f} s"}


def in_process(name: str, dry: bool, seconds: float) -> dict[str, Any]:
    """One item in a process of its own. What it printed is kept when it dies without an answer."""
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--item", name, "--seconds", str(seconds)]
    command += ["--dry-run"] if dry else []
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds + STARTING)
    except subprocess.TimeoutExpired:
        return {"ok": False, "why": f"not done after {seconds:.0f} s"}
    for message in ran.stderr.splitlines():
        if message.startswith("left out:"):
            print(message, flush=True)
    try:
        return json.loads(ran.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (ran.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        return {"ok": False, "why": f"status {ran.returncode}: {last[:500]}", "output": ran.stderr[-6000:]}


def options(description: str | None, argv: list[str] | None = None, **extra: dict[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: the emulator, tiny shapes, one round")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that gets <card>/<part>.json")
    parser.add_argument("--seconds", type=float, default=460, help="what the part may take; what is left then, failed")
    for name, settings in extra.items():
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_args(argv)


def main() -> int:
    asked = options(__doc__, item={"choices": ITEMS, "help": "only this one, in this process"})
    if asked.item:
        device: Device = Dry() if asked.dry_run else Cuda()
        print(json.dumps(child(asked.item, device, asked.seconds)))
        return 0
    record = Record("check", asked.results, asked.seconds)
    for name, (_, most) in ITEMS.items():
        record.item(name, partial(in_process, name, asked.dry_run, min(most, record.left() - STARTING)))
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
