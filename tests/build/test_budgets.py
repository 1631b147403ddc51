"""benchmarks/budgets.py: what is planted in kernels is found in their machine code and refused by name."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import budgets, control_flow, machine_code
from benchmarks.machine_code import histogram, read

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


def compiled(folder, *flags):
    target = folder / f"kernels{len(flags)}.o"
    command = ["nvcc", "-arch=sm_90a", "-std=c++20", *flags, "-c", HERE / "planted_kernels.cu", "-o", target]
    subprocess.run(command, check=True)
    return target


@pytest.fixture(scope="module")
def binaries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return compiled(folder), compiled(folder, "-DGROWN=1")


@pytest.fixture(scope="module")
def kernels(binaries):
    return tuple(read(binary) for binary in binaries)


@needs_nvcc
def test_loops_and_counts_are_read(kernels):
    nested = next(k for k in kernels[0] if k.name == "nested_kernel")
    outer, inner = nested.loops
    assert (outer.depth, outer.innermost, inner.depth, inner.innermost) == (1, False, 2, True)
    common = {"issued", "fma", "alu"}
    assert {k: n for k, n in inner.counts.items() if k not in common} == {"LDG.32": 1, "MUFU.EX2": 1}
    assert {k: n for k, n in outer.counts.items() if k not in common} == {
        "BAR": 2, "LDS.32": 1, "SHFL": 1, "STG.32": 1, "STS.32": 1}
    assert 4 <= inner.counts["issued"] <= 20
    assert (nested.arch, nested.shared, nested.stack, nested.threads) == ("sm_90a", 512, 0, 128)
    assert 8 <= nested.registers <= 32
    assert re.fullmatch(r"\d+\.\d+", nested.toolkit)
    assert [k.name for k in kernels[0]] == [
        "nested_kernel", "registers_kernel", "retired_kernel", "template_kernel<16>"]


PLANTED = {
    "registers": r"registers_kernel, sm_90a: \d+ registers, \d+ allowed",
    "issue slots": r"registers_kernel, sm_90a, loop 0: \d+ issue slots an iteration, \d+ allowed",
    "narrow loads": r"template_kernel<16>, sm_90a, loop 0: 4 LDG.32 an iteration, 1 LDG.128 allowed",
    "spill": r"spill_kernel, sm_90a: registers spilled to local memory: \d+ LDL.*; 0 allowed",
    "global atomic": r"global_atomic_kernel, sm_90a: float atomics.*: 1 RED\w*\.E\.ADD\.F32.*; 0 allowed",
    "shared atomic": r"shared_atomic_kernel, sm_90a: float atomics.*: 1 ATOMS\.CAS.*; 0 allowed",
    "float64": r"float64_kernel, sm_90a: float64 arithmetic: 1 DMUL.*; 0 allowed",
    "no launch bounds": r"unbounded_kernel, sm_90a: has no __launch_bounds__",
    "no budget": r"spill_kernel, sm_90a: has no budget.*",
    "no kernel": r"retired_kernel, sm_90a: has a budget, but is not in the build",
}
FORBIDDEN = ("spill", "global atomic", "shared atomic", "float64")


@needs_nvcc
@pytest.mark.parametrize("planted", PLANTED)
def test_planted_growth_is_refused(kernels, planted):
    small, grown = kernels
    failures = budgets.check(grown, budgets.budgets_of(small)).failures
    assert any(re.fullmatch(PLANTED[planted], line) for line in failures), failures


@needs_nvcc
def test_kernels_as_budgeted_pass(kernels):
    verdict = budgets.check(kernels[0], budgets.budgets_of(kernels[0]))
    assert verdict == budgets.Verdict()
    refused = {line.split(",")[0] for line in budgets.check(kernels[1], budgets.budgets_of(kernels[1])).failures}
    assert refused == {"spill_kernel", "global_atomic_kernel", "shared_atomic_kernel", "float64_kernel",
                       "unbounded_kernel"}


@needs_nvcc
def test_smaller_kernels_pass_with_a_hint(kernels):
    small, grown = ([k for k in built if k.name == "registers_kernel"] for built in kernels)
    verdict = budgets.check(small, budgets.budgets_of(grown))
    assert not verdict.failures
    assert re.fullmatch(r"registers_kernel, sm_90a: \d+ registers, \d+ in the budget", verdict.hints[0])
    assert re.fullmatch(r"registers_kernel, sm_90a, loop 0: \d+ issue slots .*, \d+ in the budget", verdict.hints[1])


@needs_nvcc
def test_under_another_nvcc_counts_are_warnings_and_the_forbidden_stays_so(kernels):
    small, grown = kernels
    verdict = budgets.check(grown, budgets.budgets_of(small) | {"nvcc": "1.0"})
    for planted in ("registers", "issue slots", "narrow loads"):
        assert any(re.fullmatch(PLANTED[planted], line) for line in verdict.warnings)
        assert not any(re.fullmatch(PLANTED[planted], line) for line in verdict.failures)
    for planted in FORBIDDEN:
        assert any(re.fullmatch(PLANTED[planted], line) for line in verdict.failures)


@needs_nvcc
def test_command(binaries, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budgets, "BUDGETS", tmp_path / "budgets.json")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["budgets", *map(str, arguments)])
        return budgets.main(), capsys.readouterr().out

    passed = "4 kernels for sm_90a: no spills, float atomics or float64, 0 warnings\n"
    assert run("--update", binaries[0]) == (0, f"{tmp_path}/budgets.json: written\n{passed}")
    assert run(binaries[0]) == (0, passed)
    status, output = run(binaries[1])
    assert status == 1
    assert "failure: float64_kernel, sm_90a: float64 arithmetic" in output


def test_every_kernel_of_the_sources_has_a_budget():
    committed = json.loads(budgets.BUDGETS.read_text())
    budgeted = {name.split("<")[0] for name in committed["kernels"]}
    sources = "\n".join(f.read_text() for f in [*ROOT.glob("csrc/*/*.cu"), *ROOT.glob("csrc/*/*.cuh")])
    kernels = set(re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", sources))
    assert len(kernels) == sources.count("__global__ void")
    assert budgeted == kernels
    assert all(sorted(archs) == ["sm_120", "sm_80", "sm_90a"] for archs in committed["kernels"].values())
    assert budgets.text(committed) == budgets.BUDGETS.read_text()


# ---- the control flow graph, from instructions written by hand ------------------------------------------------------


def graph(*lines):
    code = []
    for line in lines:
        address, predicate, opcode, operands = re.fullmatch(r"(\w+): (@!?P0 )?(\S+) ?(.*)", line).groups()
        code.append(control_flow.Instruction(int(address, 16), (predicate or "").strip(), opcode, operands))
    return control_flow.blocks(code)


def test_code_out_of_line_belongs_to_its_loop_and_is_none():
    g = graph("0: MOV", "1: MUFU.RCP", "2: @P0 BRA 0x6", "3: FMUL", "4: @!P0 BRA 0x1", "5: EXIT",
              "6: FFMA", "7: BRA 0x3", "8: BRA 0x8")
    loops = control_flow.natural_loops(g)
    assert len(loops) == 1
    (first, body), = loops.items()
    assert histogram(control_flow.longest_path(g, body, first, {})) == {"issued": 6, "fma": 2, "alu": 0, "MUFU.RCP": 1}


def test_of_two_branches_the_longer_one_is_counted():
    g = graph("0: MOV", "1: ISETP", "2: @P0 BRA 0x5", "3: LDG.E.128", "4: BRA 0x8", "5: LDG.E.U16", "6: LDG.E.U16",
              "7: LDG.E.U16", "8: @P0 BRA 0x1", "9: EXIT")
    (first, body), = control_flow.natural_loops(g).items()
    assert control_flow.longest_path(g, body, first, {}).count("LDG.E.U16") == 3
    assert "LDG.E.128" not in control_flow.longest_path(g, body, first, {})


def test_the_path_with_wide_accesses_is_counted_beside_the_longest():
    g = graph("0: MOV", "1: FADD", "2: @P0 BRA 0x5", "3: LDG.E.128", "4: BRA 0x8", "5: LDG.E.U16", "6: LDG.E.U16",
              "7: LDG.E.U16", "8: @P0 BRA 0xb", "9: LDG.E", "a: FADD", "b: @P0 BRA 0x1", "c: EXIT")
    (first, body), = control_flow.natural_loops(g).items()
    assert control_flow.longest_path(g, body, first, {}).count("LDG.E.U16") == 3
    assert machine_code.wide_path(g, body, first, {}) == ["FADD", "BRA", "LDG.E.128", "BRA", "BRA", "BRA"]
    g = graph("0: MOV", "1: LDG.E.U16", "2: @P0 BRA 0x1", "3: EXIT")
    assert machine_code.wide_path(g, {1}, 1, {}) == []


def test_loops_inside_are_left_out():
    g = graph("0: MOV", "1: IADD3", "2: FADD", "3: @P0 BRA 0x2", "4: STG.E", "5: @P0 BRA 0x1", "6: EXIT")
    loops = control_flow.natural_loops(g)
    assert {first: len(body) for first, body in loops.items()} == {1: 3, 2: 1}
    assert control_flow.longest_path(g, loops[1], 1, {2: loops[2]}) == ["IADD3", "STG.E", "BRA"]
    assert control_flow.longest_path(g, set(range(len(g))), 0, loops) == ["MOV", "EXIT"]


def test_uniform_predicates_and_diverged_warps():
    g = graph("0: BRA.DIV UR4, 0x4", "1: SHFL.BFLY", "2: BRA.U UP0, 0x0", "3: EXIT", "4: WARPSYNC", "5: BRA 0x2")
    loops = control_flow.natural_loops(g)
    assert [control_flow.longest_path(g, body, first, {}) for first, body in loops.items()] == [
        ["BRA.DIV", "SHFL.BFLY", "BRA.U"]]


def test_a_jump_table_leads_to_what_nothing_else_leads_to():
    g = graph("0: MOV", "1: @P0 BRA 0x8", "2: BRX R2 -0x3", "3: FADD", "4: BRA 0x8", "5: FMUL", "6: FMUL", "7: BRA 0x8",
              "8: @P0 BRA 0x1", "9: EXIT", "a: BRA 0xa")
    (first, body), = control_flow.natural_loops(g).items()
    assert control_flow.longest_path(g, body, first, {}) == ["BRA", "BRX", "FMUL", "FMUL", "BRA", "BRA"]
