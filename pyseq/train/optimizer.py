"""AdamW with the decay rules of Mamba, and the learning rate of a step."""

from __future__ import annotations

import math

import torch
from torch import nn


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: not for A_log, D, biases, norm weights, nor for what carries `_no_weight_decay`."""
    kept = name.rsplit(".", 1)[-1] in ("A_log", "D", "bias") or getattr(parameter, "_no_weight_decay", False)
    return parameter.ndim >= 2 and not kept


def adamw(model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=True)


def rate(step: int, steps: int, warmup: int, peak: float, final: float) -> float:
    """Learning rate of step 0 .. steps - 1: linear from peak / warmup to peak, then a cosine to final * peak."""
    warmup = min(warmup, steps // 2)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
