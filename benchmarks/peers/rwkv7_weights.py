"""Random RWKV-7 models under the names of the original checkpoints, and their equations token by token in float64.

    weights(layers, width, vocabulary)   a state dict; LoRA ranks 64, 64, 32, 128 as the 0.19 B model has
    logits(state_dict, tokens)           [T, vocabulary], what every peer must give
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD = 64
RANKS = {"w": 64, "a": 64, "v": 32, "g": 128}


def weights(layers: int, width: int, vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """Every matrix normal with variance 1 / columns; mixes, decays and rates spread as in a trained model."""
    g = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=g) / math.sqrt(columns)

    def spread(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g)

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": spread(0.5, 1.5, width), f"{name}.bias": spread(-0.1, 0.1, width)}

    w = {"emb.weight": 0.5 * torch.randn(vocabulary, width, generator=g), "head.weight": matrix(vocabulary, width)}
    w |= norm("ln_out") | norm("blocks.0.ln0")
    for i in range(layers):
        att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
        w |= norm(f"blocks.{i}.ln1") | norm(f"blocks.{i}.ln2") | norm(f"{att}.ln_x")
        w |= {f"{att}.x_{letter}": spread(0, 1, 1, 1, width) for letter in "rwkvag"}
        w |= {f"{att}.{name}.weight": matrix(width, width) for name in ("receptance", "key", "value", "output")}
        for letter, rank in RANKS.items():
            w[f"{att}.{letter}1"] = matrix(rank, width).T.contiguous()
            w[f"{att}.{letter}2"] = matrix(width, rank).T.contiguous()
        low, high = {"w0": (-6.0, 1.0), "a0": (-1.0, 1.0), "v0": (0.0, 1.0)}, {"k_k": (0.6, 0.8), "k_a": (0.9, 1.1)}
        w |= {f"{att}.{name}": spread(*ends, 1, 1, width) for name, ends in (low | high).items()}
        w[f"{att}.r_k"] = spread(-0.1, 0.1, width // HEAD, HEAD)
        w |= {f"{ffn}.x_k": spread(0, 1, 1, 1, width), f"{ffn}.key.weight": matrix(4 * width, width)}
        w[f"{ffn}.value.weight"] = matrix(width, 4 * width)
    return w


def logits(state_dict: dict[str, Tensor], tokens: Tensor) -> Tensor:
    w = {name: t.double() for name, t in state_dict.items()}
    width = w["emb.weight"].shape[1]
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    x = norm("blocks.0.ln0", w["emb.weight"][tokens])
    first = torch.empty(0)
    for i in range(layers):
        mixed, value = _time_mix(w, f"blocks.{i}.att", norm(f"blocks.{i}.ln1", x), first if i else None)
        first = first if i else value
        x = x + mixed
        h = norm(f"blocks.{i}.ln2", x)
        k = h + (_before(h) - h) * w[f"blocks.{i}.ffn.x_k"][0, 0]
        x = x + torch.relu(k @ w[f"blocks.{i}.ffn.key.weight"].T).square() @ w[f"blocks.{i}.ffn.value.weight"].T
    return norm("ln_out", x) @ w["head.weight"].T


def _before(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:-1]


def _time_mix(w: dict[str, Tensor], att: str, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output and the value, [T, width] each."""
    mixed = {letter: x + (_before(x) - x) * w[f"{att}.x_{letter}"][0, 0] for letter in "rwkvag"}

    def low_rank(letter: str, act: type[torch.nn.Module]) -> Tensor:
        return act()(mixed[letter] @ w[f"{att}.{letter}1"]) @ w[f"{att}.{letter}2"]

    r, k, v = (mixed[n[0]] @ w[f"{att}.{m}.weight"].T for n, m in (("r", "receptance"), ("k", "key"), ("v", "value")))
    log_w = -math.exp(-0.5) * torch.sigmoid(w[f"{att}.w0"][0, 0] + low_rank("w", torch.nn.Tanh))
    rate = torch.sigmoid(w[f"{att}.a0"][0, 0] + low_rank("a", torch.nn.Identity))
    if first is not None:
        v = v + (first - v) * torch.sigmoid(w[f"{att}.v0"][0, 0] + (mixed["v"] @ w[f"{att}.v1"]) @ w[f"{att}.v2"])
    gate = low_rank("g", torch.nn.Sigmoid)
    kappa = F.normalize((k * w[f"{att}.k_k"][0, 0]).unflatten(-1, (-1, HEAD)), dim=-1, eps=1e-12)
    k = k * (1 + (rate - 1) * w[f"{att}.k_a"][0, 0])
    r, log_w, k, heads, rate = (t.unflatten(-1, (-1, HEAD)) for t in (r, log_w, k, v, rate))
    S, ys = x.new_zeros(r.shape[1], HEAD, HEAD), []
    for t in range(x.shape[0]):
        p = torch.einsum("hkv,hk->hv", S, -kappa[t])
        S = log_w[t].exp()[..., None] * S + (kappa[t] * rate[t])[..., None] * p[:, None]
        S = S + k[t][..., None] * heads[t][:, None]
        ys.append(torch.einsum("hkv,hk->hv", S, r[t]))
    y = F.group_norm(torch.stack(ys).flatten(1), r.shape[1], w[f"{att}.ln_x.weight"], w[f"{att}.ln_x.bias"], 64e-5)
    y = y + ((r * k * w[f"{att}.r_k"]).sum(-1, keepdim=True) * heads).flatten(1)
    return (y * gate) @ w[f"{att}.output.weight"].T, v
