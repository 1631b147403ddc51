"""benchmarks/cost_model.py: occupancy against NVIDIA's own calculator, times against cases worked by hand."""

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.cost_model import MACHINES, occupancy, pipes, seconds

HERE = Path(__file__).parent


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_occupancy_is_what_nvidia_computes(tmp_path):
    program = tmp_path / "occupancy"
    subprocess.run(["nvcc", "-x", "c++", HERE / "occupancy.cpp", "-o", program], check=True)
    draw = random.Random(0)
    lines, ours = [], []
    for _ in range(3000):
        machine = draw.choice(list(MACHINES.values()))
        registers, threads = draw.randrange(16, 256), 32 * draw.randrange(1, 33)
        static, dynamic = draw.randrange(0, 48 << 10, 4), draw.choice([0, draw.randrange(0, 180 << 10, 16)])
        number = int(re.sub(r"\D", "", machine.arch))
        lines.append(f"{number // 10} {number % 10} {machine.warps * 32} {machine.shared} {machine.shared_per_block} "
                     f"{registers} {threads} {static} {dynamic}")
        ours.append(occupancy(machine, registers, threads, static + dynamic))
    run = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    theirs = [int(line) for line in run.stdout.split()]
    assert [(line, a) for line, a, b in zip(lines, ours, theirs, strict=True) if a != b] == []
    assert {0, 1, 2, 4, 8} <= set(ours)


def test_the_fullest_pipe_sets_the_time():
    card = MACHINES["H200"]
    counts = {"issued": 100, "fma": 50, "alu": 30, "MUFU.EX2": 10, "SHFL": 5, "LDS.128": 2, "STS.32": 1, "LDG.128": 9}
    busy = pipes(card, counts)
    assert busy == {"issue": 100, "fp32": 50, "integer": 60, "special functions": 80, "shared memory": 4 * (5 + 8 + 1),
                    "matrix": 0}
    assert pipes(MACHINES["A100"], counts)["fp32"] == 100
    time, limit = seconds(card, {"issue": 132 * 4 * 1.98e6}, 132 * 8, 0)
    assert (limit, time) == ("issue", pytest.approx(1e-3))
    assert seconds(card, {"issue": 1}, 132, 4.3e9) == (pytest.approx(1e-3), "memory")
    assert seconds(card, {"issue": 133 * 4 * 1.98e6}, 133, 0)[0] == pytest.approx(2e-3)   # one multiprocessor has two
