"""How fast? Limits of the card, pyseq's ops and models beside them, then the same ops beside every peer that imports.

    python -m benchmarks.gpu.bench [--dry-run] [--results FOLDER] [--seconds 460]

Medians of times between two events on the stream, over inputs that together are larger than the L2 cache, after 20
calls to warm up; steps, which are shorter than a launch, by replaying a graph. Whoever is timed is compared with
float64 first. Peers compile while they warm up and may die doing so: they run in a second process, after everything
of ours is on disk.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.peers import PeerMissing
from pyseq import testing
from pyseq.models import CausalLM, Config

from . import rooflines
from .check import options
from .device import WARM_UP, Call, Cuda, Device, Dry, ops, tensors
from .record import NotHere, Record
from .works import Make, Work, standard, tiny

# Of the largest value. One rounding to bfloat16 is 0.4 %; peers round products and sums too.
MAY_DIFFER = 0.03
OURS = "pyseq"
RESERVE = 180.0   # seconds kept for the peers
MODELS = {
    "mamba-130m": Config(d_model=768, n_layer=24, vocab_size=50280),
    "mamba-2.8b": Config(d_model=2560, n_layer=64, vocab_size=50280),
    "mamba2-130m": Config(d_model=768, n_layer=24, vocab_size=50288, layer="Mamba2"),
    "mamba2-2.7b": Config(d_model=2560, n_layer=64, vocab_size=50288, layer="Mamba2"),
}


def difference(actual: Any, expected: Any) -> float:
    """The largest error of any tensor, relative to its largest value. NaN is infinitely wrong."""
    worst = 0.0
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        e = e.detach().double()
        off = (a.detach().double().cpu() - e.cpu()).abs().max() / e.abs().max().clamp_min(1e-30).cpu()
        worst = max(worst, float(off.nan_to_num(nan=float("inf"))))
    return worst


def validated(device: Device, work: Work, make: Make) -> float:
    """The difference to float64 at the small shape."""
    x = work.draw(*work.small, dtype=torch.bfloat16, seed=1, device=device.device)
    exact = dataclasses.replace(x, **{k: v.double().cpu() for k, v in vars(x).items()})
    expected = work.exact(exact)()
    found = difference(make(x)(), expected)
    if not found <= MAY_DIFFER:
        raise RuntimeError(f"differs from float64 by {found:.2g} of the largest value: not timed")
    return found


def drawn(device: Device, work: Work, users: int) -> list[Any]:
    """Sets of inputs, together thrice the L2 cache, as far as memory allows for so many users of them."""
    first = work.draw(*work.shape, dtype=torch.bfloat16, seed=0, device=device.device)
    size = sum(t.nbytes for t in vars(first).values())
    most = int(device.free_bytes() / 2 / (size * (1 + 3 * users)))
    count = max(1, min(math.ceil(3 * device.l2_bytes() / size) + 1, most, 64))
    more = [work.draw(*work.shape, dtype=torch.bfloat16, seed=s, device=device.device) for s in range(1, count)]
    return [first, *more]


def timed(device: Device, work: Work, cases: dict[str, list[Call]]) -> dict[str, dict[str, float]]:
    """Seconds per call of every case; the cases take turns, five rounds of six calls each, one in a dry run."""
    per_call, replays = 1, cases
    if work.step:
        per_call = len(next(iter(cases.values())))
        replays = {who: [device.capture(partial(_all, calls))[0]] for who, calls in cases.items()}
    for calls in replays.values():
        device.time(calls, 1, warm_up=1 if device.dry else WARM_UP)
    samples: dict[str, list[float]] = {who: [] for who in cases}
    for _ in range(1 if device.dry else 5):
        for who, calls in replays.items():
            samples[who] += [s / per_call for s in device.time(calls, 6)]
    return {who: {"median": statistics.median(s), "minimum": min(s), "samples": len(s)} for who, s in samples.items()}


def _all(calls: list[Call]) -> list[Any]:
    return [call() for call in calls]


def bound(work: Work, limits: dict[str, float]) -> dict[str, Any]:
    """The time that the card's measured limits allow at best, and by which of them."""
    need = {"memory": work.bytes / limits["copy B/s"]} if "copy B/s" in limits else {}
    if "ex2/s" in limits:
        need["ex2"] = work.ex2 / limits["ex2/s"]
    if "bf16 product FLOP/s" in limits:
        need["products"] = work.flops / limits["bf16 product FLOP/s"]
    return {"bound": max(need.values()), "bound by": max(need, key=lambda k: need[k])} if need else {}


def measure(device: Device, work: Work, limits: dict[str, float], who: dict[str, Make]) -> dict[str, Any]:
    """Validates, then times everybody in `who`, ours first. A peer that fails is recorded and left out."""
    errors, failed = {}, {}
    for name, make in who.items():
        try:
            if device.dry and "compiled" in name:
                raise NotHere("compiles for a minute: not in a dry run")
            errors[name] = validated(device, work, make)
        except (PeerMissing, NotHere) as why:
            failed[name] = f"missing: {why}"
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:500]}"
    if OURS in failed:
        raise RuntimeError(failed[OURS])
    there = {name: who[name] for name in errors}
    if len(who) > 1 and len(there) == 1:
        return {"ok": None, "why": "no peer imports and is right: " + ", ".join(failed), "failed": failed}
    sets = drawn(device, work, len(there))
    cases = {name: [make(x) for x in sets] for name, make in there.items()}
    timings = timed(device, work, cases)
    ours = timings[OURS]["median"]
    found = {
        "shape": work.shape, "dtype": "bfloat16", "inputs": len(sets),
        "bytes": work.bytes, "ex2": work.ex2, "flops": work.flops,
        "timings": timings, "errors": errors, "failed": failed, "goal": work.goal, "targets": work.targets,
        "ratios": {name: t["median"] / ours for name, t in timings.items() if name != OURS}, **bound(work, limits),
    }
    share = f", {100 * found['bound'] / ours:.0f} % of its bound by {found['bound by']}" if "bound" in found else ""
    ratios = "".join(f", {name} {r:.2f}x" for name, r in found["ratios"].items())
    return {**found, "summary": f"{ours * 1e6:.1f} us{share}{ratios}"}


# ---- models ----------------------------------------------------------------------------------------------------------


def decode(device: Device, config: Config, batch: int, limits: dict[str, float]) -> dict[str, Any]:
    """Tokens per second of generate(), greedy, after a prompt of 8: the difference of two lengths, so that the prompt
    and whatever is prepared once do not count."""
    model = CausalLM(config, device=device.device, dtype=torch.bfloat16).eval()
    prompt = torch.arange(batch * 8, device=device.device).view(batch, 8) % config.vocab_size
    few, many = (1, 3) if device.dry else (16, 144)

    def run(tokens: int) -> float:
        device.synchronize()
        start = time.perf_counter()
        model.generate(prompt, tokens, temperature=0)
        device.synchronize()
        return time.perf_counter() - start

    run(few)
    rounds = [(run(many) - run(few)) / (many - few) for _ in range(1 if device.dry else 3)]
    seconds = max(statistics.median(rounds), 1e-9)
    weights = sum(p.nbytes for p in model.parameters())
    state = sum(t.nbytes for t in tensors(model.init_state(batch)))
    moved = weights + 2 * state
    least = moved / limits["copy B/s"] if "copy B/s" in limits else 0.0
    return {
        "batch": batch, "tokens per second": batch / seconds, "seconds per step": seconds, "bytes": moved,
        "bound": least, "bound by": "memory",
        "summary": f"{batch / seconds:.0f} tokens/s, {100 * least / seconds:.0f} % of its bound by memory",
    }


def model_items(device: Device, limits: dict[str, float]) -> dict[str, Callable[[], dict[str, Any]]]:
    if device.dry:
        second = {"layer": "Mamba2", "layer_args": {"d_state": 16, "headdim": 16}}
        configs = {"mamba": Config(16, 2, 64), "mamba2": Config(16, 2, 64, **second)}
        return {f"generate tiny {name}, batch 2": partial(decode, device, c, 2, limits) for name, c in configs.items()}
    return {
        f"generate {name}, batch {batch}": partial(decode, device, config, batch, limits)
        for name, config in MODELS.items() for batch in (1, 64)
    }


# ---- the part --------------------------------------------------------------------------------------------------------


def ours_first(record: Record, device: Device, works: list[Work]) -> None:
    limits: dict[str, float] = {}
    for name, run in (("copy", rooflines.copy), ("bf16 product", rooflines.matmul), ("units", rooflines.kernels)):
        found = record.item(f"roofline: {name}", partial(_shown, run, device), 60)
        limits |= {k: v for k, v in found.items() if k.endswith("/s")}
    record.content["limits"] = limits
    for work in works:
        record.item(work.name, partial(_on, device, work, limits, {OURS: work.ours}), 40)
    for name, run_model in model_items(device, limits).items():
        record.item(name, run_model, 60)


def peers_after(record: Record, device: Device, works: list[Work]) -> None:
    for work in works:
        if work.peers:
            everybody = {OURS: work.ours, **work.peers}
            record.item(f"{work.name}, peers", partial(_on, device, work, record.content["limits"], everybody), 90)


def _shown(run: Callable[[Device], dict[str, float]], device: Device) -> dict[str, Any]:
    found = run(device)
    return {**found, "summary": ", ".join(f"{k} {v:.3g}" for k, v in found.items())}


def _on(device: Device, work: Work, limits: dict[str, float], who: dict[str, Make]) -> dict[str, Any]:
    if work.op not in {op.name for op in ops(device)}:
        raise NotHere(f"no {device.backend} kernel of {work.op} in this build")
    with testing.on(device.backend):
        return measure(device, work, limits, who)


def main() -> int:
    asked = options(__doc__, peers={"action": "store_true", "help": "the second process: adds the peers to the file"})
    device: Device = Dry() if asked.dry_run else Cuda()
    works = tiny() if device.dry else standard()
    record = Record("bench", asked.results, asked.seconds, resume=asked.peers)
    if asked.peers:
        peers_after(record, device, works)
        return record.finish()
    record.deadline -= min(RESERVE, asked.seconds / 3)
    ours_first(record, device, works)
    seconds = record.left() + min(RESERVE, asked.seconds / 3)
    command = [sys.executable, "-m", "benchmarks.gpu.bench", "--peers", "--seconds", str(seconds)]
    command += ["--results", str(asked.results), *(["--dry-run"] if asked.dry_run else [])]
    status = subprocess.run(command, timeout=seconds + 30).returncode
    if status not in (0, 1):
        print(f"gpu-bench: the process of the peers ended with status {status}; {record.path} holds what it had done")
    return status


if __name__ == "__main__":
    sys.exit(main())
