"""The state of a layer or a model as a value: clone it, pick rows, keep it in a file, put it back.

A state is any pytree of tensors whose first axis is the batch. A saved point is a clone; rolling back is handing the
clone (or a clone of it, if it is to be used again) to `model`, `step` or `generate`.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from pyseq.models.files import TensorFile, write_tensors

State = TypeVar("State")


def clone(state: State) -> State:
    """A copy that shares no memory and no graph with `state`."""
    return pytree.tree_map(lambda t: t.detach().clone(), state)


def detach(state: State) -> State:
    """The same memory without the graph: what truncated back-propagation through time carries to the next chunk."""
    return pytree.tree_map(lambda t: t.detach(), state)


def select(state: State, rows: torch.Tensor | list[int]) -> State:
    """A copy of the given rows of the batch (indices or a boolean mask), in that order, repeated if given twice."""
    return pytree.tree_map(lambda t: t[torch.as_tensor(rows, device=t.device)], state)


def copy_(target: State, source: State, rows: torch.Tensor | None = None) -> State:
    """Writes `source` into the memory of `target`: every row, or those where the mask `rows` is true."""
    for name, t, s in _pairs(target, source):
        if t.shape != s.shape:
            raise ValueError(f"source: {name} has shape {list(s.shape)}, expected {list(t.shape)}")
        if rows is None:
            t.copy_(s)
        else:
            t[rows] = s[rows].to(t.dtype)
    return target


def save(state: Any, path: str | os.PathLike[str]) -> None:
    """Writes `state` to a safetensors file, atomically."""
    leaves, _ = pytree.tree_flatten_with_path(state)
    write_tensors(path, {pytree.keystr(where).lstrip("."): leaf.detach() for where, leaf in leaves})


def load(path: str | os.PathLike[str], like: State) -> State:
    """Reads a state of the structure of `like` (say, `model.init_state(1)`), of any batch size, onto its device."""
    leaves, structure = pytree.tree_flatten_with_path(like)
    restored = []
    with TensorFile(path) as file:
        names = [pytree.keystr(where).lstrip(".") for where, _ in leaves]
        if set(names) != set(file.names()):
            wrong = sorted(set(names) ^ set(file.names()))
            raise ValueError(f"{path}: not a state of this model; {wrong[0]!r} is in only one of the two")
        batch = file.shape(names[0])[:1] if names else []
        for name, (_, leaf) in zip(names, leaves, strict=True):
            expected = batch + list(leaf.shape[1:])
            if file.shape(name) != expected:
                raise ValueError(f"{path}: {name} has shape {file.shape(name)}, expected {expected}")
            restored.append(file.read(name).to(leaf.device, leaf.dtype))
    return pytree.tree_unflatten(restored, structure)


def _pairs(target: Any, source: Any) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    ours, structure = pytree.tree_flatten_with_path(target)
    theirs, other = pytree.tree_flatten(source)
    if structure != other:
        raise ValueError(f"source has the structure {other}, expected {structure}")
    return [(pytree.keystr(where), t, s) for (where, t), s in zip(ours, theirs, strict=True)]
