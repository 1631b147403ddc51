"""benchmarks/cost_model.py: occupancy against NVIDIA's own calculator, times against cases worked by hand."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import predictions
from benchmarks.budgets import BUDGETS
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


def test_iterations_follow_from_the_instruction_that_names_a_loop():
    launch = predictions.Launch("kernel", blocks=3, bytes_moved=0, instructions={"MUFU.EX2 -STG.16": 80, "STG.16": 30},
                                iterations={"MUFU.EX2 STG.16": 2})
    loops = [{"issued": 20, "MUFU.EX2": 4}, {"issued": 9, "MUFU.EX2": 1}, {"issued": 7, "MUFU.EX2": 1, "STG.16": 3}]
    counts = predictions.executed({"threads": 64, "outside": {"issued": 5}, "loops": loops}, launch)
    assert counts == {"issued": 6 * 5 + 20 * 20 + (10 + 2) * 7, "MUFU.EX2": 80 + 10 + 2, "STG.16": 30 + 2 * 3}
    with pytest.raises(KeyError, match="no loop has SHFL"):
        predictions.loop_with("SHFL", loops)


def test_the_page_is_what_the_budgets_say():
    written = predictions.page(json.loads(BUDGETS.read_text()))
    assert predictions.PAGE.read_text() == written, "make predictions"
