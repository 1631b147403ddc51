"""Blocks, loops and longest paths of a kernel's machine code."""

from __future__ import annotations

import re
from collections.abc import Callable
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


JUMP_TABLE = re.compile(r"(BRX|JMX)U?\b")


def _label(instruction: Instruction) -> int | None:
    """The address that a branch, a call, or what prepares one, names."""
    if not re.match(r"(BRA|CALL|BSSY|WARPSYNC)\b", instruction.opcode):
        return None
    found = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
    return int(found[1], 16) if found else None


def _branches(instruction: Instruction) -> bool:
    """A warp that diverged takes BRA.DIV to a copy of the code that is slow and rarely run: not counted as a branch."""
    return bool(re.match(r"(BRA(?!\.DIV)|CALL)\b", instruction.opcode))


def _goes_on(instruction: Instruction) -> bool:
    """Whether the next instruction may follow."""
    leaves = re.match(r"(EXIT|RET|BRA(?!\.DIV))\b", instruction.opcode) or JUMP_TABLE.match(instruction.opcode)
    return not leaves or bool(instruction.predicate) or bool(re.search(r"\bU?P\d", instruction.operands))


def blocks(code: list[Instruction]) -> list[Block]:
    """The control flow graph; its first block is the entry.

    The text does not tell where a jump table leads: to those blocks behind it that nothing else leads to.
    """
    labels = {i.address: label for i in code if (label := _label(i)) is not None}
    ends = re.compile(r"(BRA|CALL|EXIT|RET|BRX|BRXU|JMX|JMXU)\b")
    leaders = {code[0].address} | {after.address for i, after in pairwise(code) if ends.match(i.opcode)}
    leaders |= set(labels.values()) & {i.address for i in code}
    index = {address: n for n, address in enumerate(sorted(leaders))}
    graph = [Block() for _ in index]
    led_to = {0, *(index[label] for label in labels.values() if label in index)}
    table = None
    for i, after in zip(code, [*code[1:], None], strict=True):
        if i.address in index:
            at = index[i.address]
            if table is not None and at not in led_to:
                graph[table].successors.append(at)
        graph[at].opcodes.append(i.opcode)
        label = labels.get(i.address)
        if _branches(i) and label in index and label != i.address:   # to itself: padding behind the end
            graph[at].successors.append(index[label])
        if after and after.address in index and _goes_on(i):
            graph[at].successors.append(index[after.address])
            led_to.add(index[after.address])
        table = at if JUMP_TABLE.match(i.opcode) else table
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


def longest_path(graph: list[Block], body: set[int], first: int, inner: dict[int, set[int]],
                 weight: Callable[[str], int] = lambda opcode: 1) -> list[str]:
    """Opcodes of the heaviest path from `first` through `body`, back to `first` or to an end of the kernel.

    The loops `inner` of `body` are passed through, and their instructions left out.
    """
    outermost_last = sorted(inner.items(), key=lambda item: len(item[1]))
    owner = {block: f for f, blocks_of_loop in outermost_last for block in blocks_of_loop}
    members: dict[int, set[int]] = {}
    for block in body:
        members.setdefault(owner.get(block, block), set()).add(block)
    heaviest: dict[int, int] = {}             # from a block on, if a path goes on from it to the end
    step: dict[int, int | None] = {}          # where that path goes
    for node in reversed(_reachable(graph)):  # what follows a block comes before it, but for the ways back
        if node not in members:
            continue
        after = {s for m in members[node] for s in graph[m].successors}
        ways = {owner.get(s, s) for s in after & body} - {node, first}
        on = max((w for w in sorted(ways) if w in heaviest), key=lambda w: heaviest[w], default=None)
        if on is not None or first in after or not after:
            own = 0 if node in inner else sum(map(weight, graph[node].opcodes))
            heaviest[node], step[node] = own + (heaviest[on] if on is not None else 0), on
    opcodes: list[str] = []
    at: int | None = owner.get(first, first)
    while at is not None and at in step:
        opcodes += [] if at in inner else graph[at].opcodes
        at = step[at]
    return opcodes
