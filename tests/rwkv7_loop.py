"""RWKV-7 as its equations stand, token by token, on the tensors of a checkpoint of its authors.

Nothing here is pyseq's: a dictionary z of tensors under their names (LoRA matrices [D, rank] and [rank, D], vectors
[1, 1, D]), one vector x at a time, the state with rows for values and columns for keys.
"""

import math

import torch

HEAD = 64


def norm(x, z, name, eps=1e-5, groups=1):
    parts = x.view(groups, -1)
    centred = parts - parts.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    return scaled.reshape(-1) * z[name + ".weight"] + z[name + ".bias"]


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def time_mix(z, att, x, before, S, v_first, c=1, head=HEAD):
    """One token: (out, S, v_first); S [H, N values, N keys]."""
    def at(name):
        return z[att + name].reshape(-1)

    def lerp(letter):
        return x + (before - x) * at("x_" + letter)

    def low_rank(letter, inner=lambda u: u):
        return inner(lerp(letter) @ z[f"{att}{letter}1"]) @ z[f"{att}{letter}2"]

    r, k, v = (z[f"{att}{name}.weight"] @ lerp(name[0]) for name in ("receptance", "key", "value"))
    w = torch.exp(-math.exp(-0.5) * sigmoid(at("w0") + low_rank("w", torch.tanh)))
    alpha = sigmoid(at("a0") + low_rank("a"))
    g = low_rank("g", sigmoid)
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * sigmoid(at("v0") + low_rank("v"))
    kappa, r_k = k * at("k_k"), at("r_k")
    k = k * (1 + (alpha - 1) * at("k_a"))
    ys, bonus, states = [], [], []
    for h in range(len(x) // head):
        one = slice(h * head, (h + 1) * head)
        unit = kappa[one] / max(kappa[one].square().sum().sqrt().item(), 1e-12)
        state = S[h] * w[one] - torch.outer(S[h] @ unit, c * alpha[one] * unit) + torch.outer(v[one], k[one])
        states.append(state)
        ys.append(state @ r[one])
        bonus.append((r[one] * k[one] * r_k[one]).sum() * v[one])
    o = norm(torch.cat(ys), z, att + "ln_x", head * 1e-5, len(x) // head) + torch.cat(bonus)
    return z[att + "output.weight"] @ (o * g), torch.stack(states), v_first


def channel_mix(z, ffn, x, before):
    k = x + (before - x) * z[ffn + "x_k"].reshape(-1)
    return z[ffn + "value.weight"] @ torch.relu(z[ffn + "key.weight"] @ k) ** 2


def block(z, name, x, state, v_first, c=1, head=HEAD):
    """One token through a layer: (x, state, v_first), state = (last time-mix input, S, last channel-mix input)."""
    one = norm(x, z, name + "ln1")
    out, S, v_first = time_mix(z, name + "att.", one, state[0], state[1], v_first, c, head)
    x = x + out
    two = norm(x, z, name + "ln2")
    return x + channel_mix(z, name + "ffn.", two, state[2]), (one, S, two), v_first


def zeros(z, head=HEAD):
    D = z["blocks.0.ln1.weight"].numel()
    x = z["blocks.0.ln1.weight"].new_zeros(D)
    return x, x.new_zeros(D // head, head, head), x


def logits(z, ids, head=HEAD):
    """ids [T] -> [T, V], in float64."""
    z = {name: t.double() for name, t in z.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in z if name.startswith("blocks."))
    states, out = [zeros(z, head)] * layers, []
    for token in ids.tolist():
        x, v_first = norm(z["emb.weight"][token], z, "blocks.0.ln0"), None
        for i in range(layers):
            x, states[i], v_first = block(z, f"blocks.{i}.", x, states[i], v_first, head=head)
        out.append(z["head.weight"] @ norm(x, z, "ln_out"))
    return torch.stack(out)


def checkpoint(width=128, layers=2, vocab=61, ranks=(32, 64, 48, 24), head=HEAD, seed=0, dtype=torch.float32):
    """Random tensors under the authors' names, every one of them at work; ranks of w, a, v and g."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, std=0.3, mean=0.0):
        return (mean + std * torch.randn(shape, generator=generator)).to(dtype)

    def pair(name, mean=1.0):
        return {name + ".weight": draw(width, mean=mean, std=0.1), name + ".bias": draw(width, std=0.1)}

    def matrix(*shape):
        return draw(*shape, std=shape[-1] ** -0.5)

    z = {"emb.weight": draw(vocab, width), "head.weight": matrix(vocab, width)}
    z |= {**pair("ln_out"), **pair("blocks.0.ln0")}
    for i in range(layers):
        b = f"blocks.{i}."
        z |= {**pair(b + "ln1"), **pair(b + "ln2"), **pair(b + "att.ln_x")}
        for letter in "rwkvag":
            z[f"{b}att.x_{letter}"] = draw(1, 1, width, mean=0.5)
        for letter, rank in zip("wavg", ranks, strict=True):
            z[f"{b}att.{letter}1"] = matrix(rank, width).t().contiguous()
            z[f"{b}att.{letter}2"] = matrix(width, rank).t().contiguous()
            if letter != "g":
                z[f"{b}att.{letter}0"] = draw(1, 1, width, std=1.0)
        z[b + "att.k_k"], z[b + "att.k_a"] = draw(1, 1, width, mean=0.7), draw(1, 1, width, mean=1.0)
        z[b + "att.r_k"] = draw(width // head, head)
        for name in ("receptance", "key", "value", "output"):
            z[f"{b}att.{name}.weight"] = matrix(width, width)
        z[b + "ffn.x_k"] = draw(1, 1, width, mean=0.5)
        z[b + "ffn.key.weight"], z[b + "ffn.value.weight"] = matrix(4 * width, width), matrix(width, 4 * width)
    return z
