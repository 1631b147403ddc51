"""Blocks, loops and longest paths of a kernel's machine code."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    predicate: str    # "@!P0", or empty
    opcode: str       # with its modifiers: "LDG.E.128.CONSTANT"
    operands: str


@dataclass
class Block:
    opcodes: list[str] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


def _target(instruction: Instruction) -> int | None:
    """Where it may branch to. A warp that diverged takes BRA.DIV to a copy of the code that is slow and rarely run."""
    if re.match(r"(BRX|JMX)U?\b", instruction.opcode):
        raise ValueError(f"{instruction.opcode} at {instruction.address:#x}: a jump table, which cannot be followed")
    if not re.match(r"(BRA|CALL)\b", instruction.opcode) or instruction.opcode.startswith("BRA.DIV"):
        return None
    found = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
    return int(found[1], 16) if found else None


def _goes_on(instruction: Instruction) -> bool:
    """Whether the next instruction may follow."""
    leaves = re.match(r"(EXIT|RET|BRA(?!\.DIV))\b", instruction.opcode)
    return not leaves or bool(instruction.predicate) or bool(re.search(r"\bU?P\d", instruction.operands))


def blocks(code: list[Instruction]) -> list[Block]:
    """The control flow graph; its first block is the entry."""
    targets = {i.address: t for i in code if (t := _target(i)) not in (None, i.address)}   # to itself: padding
    leaders = {code[0].address, *targets.values()}
    leaders |= {after.address for i, after in pairwise(code) if re.match(r"(BRA|CALL|EXIT|RET)\b", i.opcode)}
    index = {address: n for n, address in enumerate(sorted(leaders))}
    graph = [Block() for _ in index]
    current = graph[0]
    for i, after in zip(code, [*code[1:], None], strict=True):
        current = graph[index[i.address]] if i.address in index else current
        current.opcodes.append(i.opcode)
        if i.address in targets:
            current.successors.append(index[targets[i.address]])
        if after and after.address in index and _goes_on(i):
            current.successors.append(index[after.address])
    return graph


def _reachable(graph: list[Block]) -> list[int]:
    """Blocks in reverse postorder."""
    order: list[int] = []
    seen, stack = {0}, [(0, iter(graph[0].successors))]
    while stack:
        node, following = stack[-1]
        step = next((s for s in following if s not in seen), None)
        if step is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(step)
            stack.append((step, iter(graph[step].successors)))
    return order[::-1]


def natural_loops(graph: list[Block]) -> dict[int, set[int]]:
    """First block -> blocks of its loop. A back edge ends at a block that every path to the edge passes through."""
    order = _reachable(graph)
    predecessors: dict[int, list[int]] = {n: [] for n in order}
    for n in order:
        for s in graph[n].successors:
            predecessors[s].append(n)
    dominators = {n: set(order) for n in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for n in order[1:]:
            new = {n} | set.intersection(*(dominators[p] for p in predecessors[n]))
            changed |= new != dominators[n]
            dominators[n] = new
    loops: dict[int, set[int]] = {}
    for n in order:
        for first in set(graph[n].successors) & dominators[n]:
            body, work = loops.setdefault(first, {first}), [n]
            while work:
                block = work.pop()
                if block not in body:
                    body.add(block)
                    work += predecessors[block]
    return loops


def longest_path(graph: list[Block], body: set[int], first: int, inner: dict[int, set[int]]) -> list[str]:
    """Opcodes of the longest path from `first` through `body`, back to `first` or to an end of the kernel.

    The loops `inner` of `body` are passed through, and their instructions left out.
    """
    outermost_last = sorted(inner.items(), key=lambda item: len(item[1]))
    owner = {block: f for f, blocks_of_loop in outermost_last for block in blocks_of_loop}
    members: dict[int, set[int]] = {}
    for block in body:
        members.setdefault(owner.get(block, block), set()).add(block)
    longest: dict[int, int] = {}              # instructions from a block on, if a path goes on from it to the end
    step: dict[int, int | None] = {}          # where that path goes
    for node in reversed(_reachable(graph)):  # what follows a block comes before it, but for the ways back
        if node not in members:
            continue
        after = {s for m in members[node] for s in graph[m].successors}
        ways = {owner.get(s, s) for s in after & body} - {node, first}
        on = max((w for w in sorted(ways) if w in longest), key=lambda w: longest[w], default=None)
        if on is not None or first in after or not after:
            own = 0 if node in inner else len(graph[node].opcodes)
            longest[node], step[node] = own + (longest[on] if on is not None else 0), on
    opcodes: list[str] = []
    at: int | None = owner.get(first, first)
    while at is not None and at in step:
        opcodes += [] if at in inner else graph[at].opcodes
        at = step[at]
    return opcodes
