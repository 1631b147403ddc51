"""Checkpoints of a run: a folder `step-00000120` per checkpoint, whole or absent.

    step-00000120/            what `model.save_pretrained` writes (config.json, model.safetensors, ...), and
        optimizer.safetensors   exp_avg.<parameter>, exp_avg_sq.<parameter>, step.<parameter>, state.<i>
        trainer.json            settings, step, log position, random state, results
    latest                    a link to the last one

A checkpoint is written under another name, flushed to the disk and then renamed; an older one goes only after that.
Whatever interrupts (a signal, a full disk, a power cut), the last folder with its right name is complete.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

Facts = dict[str, Any]
KEPT = 2
_PREFIX, _PARTIAL = "step-", ".partial-"


def save(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Any, facts: Facts) -> Path:
    """Writes a checkpoint of `step` into the folder of the run. `rows` is the carried state or None."""
    final = run / f"{_PREFIX}{step:08d}"
    if final.exists():
        return final
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=run))
    try:
        model.save_pretrained(partial)  # type: ignore[operator]
        leaves = [] if rows is None else tree_flatten(rows)[0]
        tensors = _moments(model, optimizer) | {f"state.{i}": leaf for i, leaf in enumerate(leaves)}
        save_file({name: leaf.contiguous() for name, leaf in tensors.items()}, partial / "optimizer.safetensors")
        facts = {**facts, "step": step, "random": base64.b64encode(bytes(torch.get_rng_state().tolist())).decode()}
        (partial / "trainer.json").write_text(json.dumps(facts, indent=1))
        for path in sorted(partial.rglob("*")):
            _flush(path)
        _flush(partial)
        partial.chmod(0o755)
        os.rename(partial, final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how the library reports a failed write
            raise OSError(f"cannot write the checkpoint of step {step}: {error}") from error
        raise
    _link(run, final)
    _flush(run)
    for old in checkpoints(run)[:-KEPT]:
        doomed = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=run))
        os.replace(old, doomed)
        shutil.rmtree(doomed)
    return final


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob(f"{_PREFIX}*") if path.is_dir()) if run.is_dir() else []


def sweep(run: Path) -> None:
    """Removes what an interrupted write or removal left."""
    for path in run.glob(f"{_PARTIAL}*"):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def facts(checkpoint: Path) -> Facts:
    try:
        values = json.loads((checkpoint / "trainer.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint} is not a checkpoint of a run: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{checkpoint / 'trainer.json'}: expected an object")
    return values


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Restores the moments; returns the leaves of the carried state, none if there was none."""
    try:
        tensors = load_file(checkpoint / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{checkpoint / 'optimizer.safetensors'}: {error}") from error
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = {}
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                name = f"{kind}.{names[parameter]}"
                shape = torch.Size([]) if kind == "step" else parameter.shape
                if name not in tensors or tensors[name].shape != shape:
                    path = checkpoint / "optimizer.safetensors"
                    raise ValueError(f"{path}: {name} is missing or not of shape {list(shape)}")
                state[kind] = tensors[name].to(parameter.device)
            optimizer.state[parameter] = state
    return [tensors[f"state.{i}"] for i in range(sum(name.startswith("state.") for name in tensors))]


def restore_random(facts: Facts) -> None:
    torch.set_rng_state(torch.tensor(list(base64.b64decode(facts["random"])), dtype=torch.uint8))


def unflatten(leaves: list[Tensor], like: Any) -> Any:
    """The pytree of the shape of `like` with these leaves."""
    structure = tree_flatten(like)[1]
    if len(leaves) != structure.num_leaves:
        raise ValueError(f"carried state: {len(leaves)} tensors, expected {structure.num_leaves}")
    return tree_unflatten(leaves, structure)


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{kind}.{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def _link(run: Path, target: Path) -> None:
    partial = run / f"{_PARTIAL}link"
    partial.unlink(missing_ok=True)
    partial.symlink_to(target.name)
    os.replace(partial, run / "latest")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
