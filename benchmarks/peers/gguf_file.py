"""Weights of Mamba, Mamba-2 and RWKV-7 as files for llama.cpp, written with gguf 0.19.0 (MIT)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import require


def write(
    path: Path, state_dict: dict[str, Tensor], kind: str = "f32", groups: int = 1, norm_eps: float = 1e-5
) -> None:
    """Original or transformers' names -> GGUF of architecture "mamba" or "mamba2", without a vocabulary, head tied.

    `kind` is "f32", "f16" or "bf16" and applies to the matrices; vectors, A and the conv stay float32, as llama.cpp's
    own converter leaves them. `groups` are those of B and C, Mamba-2 only.
    """
    gguf = require("gguf", "gguf")
    w = {name.removeprefix("backbone.").replace("embeddings.", "embedding."): t for name, t in state_dict.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))
    first = {name.removeprefix("layers.0.mixer."): t for name, t in w.items() if name.startswith("layers.0.mixer.")}
    second = "x_proj.weight" not in first
    out = gguf.GGUFWriter(path, "mamba2" if second else "mamba")
    out.add_context_length(1 << 20)
    out.add_embedding_length(w["embedding.weight"].shape[1])
    out.add_feed_forward_length(0)
    out.add_head_count(0)
    out.add_block_count(layers)
    _sizes(out, first, groups if second else None)
    out.add_layer_norm_rms_eps(norm_eps)
    out.add_tokenizer_model("no_vocab")
    out.add_vocab_size(w["embedding.weight"].shape[0])

    vector, matrix = _adders(gguf, out, kind)
    matrix("token_embd.weight", w["embedding.weight"])
    vector("output_norm.weight", w["norm_f.weight"])
    for i in range(layers):
        m, b = f"layers.{i}.mixer", f"blk.{i}"
        vector(f"{b}.attn_norm.weight", w[f"layers.{i}.norm.weight"])
        matrix(f"{b}.ssm_in.weight", w[f"{m}.in_proj.weight"])
        vector(f"{b}.ssm_conv1d.weight", w[f"{m}.conv1d.weight"].squeeze(1))
        vector(f"{b}.ssm_conv1d.bias", w[f"{m}.conv1d.bias"])
        A = -torch.exp(w[f"{m}.A_log"].float())
        if second:   # a number per head, and the norm by group
            vector(f"{b}.ssm_dt.bias", w[f"{m}.dt_bias"])
            vector(f"{b}.ssm_a", A.unsqueeze(1))
            vector(f"{b}.ssm_d", w[f"{m}.D"].unsqueeze(1))
            vector(f"{b}.ssm_norm.weight", w[f"{m}.norm.weight"].view(groups, -1))
        else:
            matrix(f"{b}.ssm_x.weight", w[f"{m}.x_proj.weight"])
            matrix(f"{b}.ssm_dt.weight", w[f"{m}.dt_proj.weight"])
            vector(f"{b}.ssm_dt.bias", w[f"{m}.dt_proj.bias"])
            vector(f"{b}.ssm_a", A)
            vector(f"{b}.ssm_d", w[f"{m}.D"])
        matrix(f"{b}.ssm_out.weight", w[f"{m}.out_proj.weight"])
    _finish(out)


def write_rwkv7(path: Path, w: dict[str, Tensor], kind: str = "f32") -> None:
    """The original authors' names -> GGUF of architecture "rwkv7", without a vocabulary.

    `kind` applies to the matrices, those of low rank among them, which are stored transposed.
    """
    gguf = require("gguf", "gguf")
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    vocabulary, width = w["emb.weight"].shape
    rank = {letter: w[f"blocks.{layers - 1}.att.{letter}1"].shape[1] for letter in "wavg"}
    out = gguf.GGUFWriter(path, "rwkv7")
    out.add_context_length(1 << 20)
    out.add_embedding_length(width)
    out.add_block_count(layers)
    out.add_layer_norm_eps(1e-5)
    out.add_wkv_head_size(w["blocks.0.att.r_k"].shape[1])
    out.add_decay_lora_rank(rank["w"])
    out.add_iclr_lora_rank(rank["a"])
    out.add_value_residual_mix_lora_rank(rank["v"])
    out.add_gate_lora_rank(rank["g"])
    out.add_feed_forward_length(w["blocks.0.ffn.key.weight"].shape[0])
    out.add_head_count(0)
    out.add_tokenizer_model("no_vocab")
    out.add_vocab_size(vocabulary)
    vector, matrix = _adders(gguf, out, kind)

    def norm(name: str, of: str) -> None:
        vector(f"{name}.weight", w[f"{of}.weight"])
        vector(f"{name}.bias", w[f"{of}.bias"])

    matrix("token_embd.weight", w["emb.weight"])
    matrix("output.weight", w["head.weight"])
    norm("token_embd_norm", "blocks.0.ln0")
    norm("output_norm", "ln_out")
    for i in range(layers):
        att, ffn, b = f"blocks.{i}.att", f"blocks.{i}.ffn", f"blk.{i}"
        norm(f"{b}.attn_norm", f"blocks.{i}.ln1")
        norm(f"{b}.attn_norm_2", f"blocks.{i}.ln2")
        norm(f"{b}.time_mix_ln", f"{att}.ln_x")
        vector(f"{b}.time_mix_lerp_fused.weight", torch.stack([w[f"{att}.x_{letter}"] for letter in "rwkvag"]))
        for letter in "wavg":   # the first layer has no use for v: a's stand in
            name = "a" if letter == "v" and i == 0 else letter
            matrix(f"{b}.time_mix_{letter}1.weight", w[f"{att}.{name}1"].T)
            matrix(f"{b}.time_mix_{letter}2.weight", w[f"{att}.{name}2"].T)
            if letter != "g":
                vector(f"{b}.time_mix_{letter}0.weight", w[f"{att}.{name}0"].flatten())
        for name in ("k_k", "k_a", "r_k"):
            vector(f"{b}.time_mix_{name}.weight", w[f"{att}.{name}"].flatten())
        for name in ("key", "value", "receptance", "output"):
            matrix(f"{b}.time_mix_{name}.weight", w[f"{att}.{name}.weight"])
        vector(f"{b}.channel_mix_lerp_k.weight", w[f"{ffn}.x_k"])
        matrix(f"{b}.channel_mix_key.weight", w[f"{ffn}.key.weight"])
        matrix(f"{b}.channel_mix_value.weight", w[f"{ffn}.value.weight"])
    _finish(out)


def _adders(gguf: Any, out: Any, kind: str) -> tuple[Callable[[str, Tensor], None], Callable[[str, Tensor], None]]:
    """What adds a float32 vector, and a matrix of `kind`."""
    if kind not in ("f32", "f16", "bf16"):
        raise ValueError(f"kind must be f32, f16 or bf16, not {kind!r}")

    def vector(name: str, t: Tensor) -> None:
        out.add_tensor(name, t.detach().float().contiguous().numpy())

    def matrix(name: str, t: Tensor) -> None:
        if kind == "bf16":
            bits = t.detach().bfloat16().contiguous().view(torch.int16).numpy().view("uint8")
            out.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            out.add_tensor(name, t.detach().to(torch.float16 if kind == "f16" else torch.float32).contiguous().numpy())

    return vector, matrix


def _finish(out: Any) -> None:
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _sizes(out: Any, first: dict[str, Tensor], groups: int | None) -> None:
    """From the weights of the first mixer; llama.cpp calls Mamba-2's number of heads its rank of dt."""
    channels = first["out_proj.weight"].shape[1]
    out.add_ssm_conv_kernel(first["conv1d.weight"].shape[-1])
    out.add_ssm_inner_size(channels)
    if groups is None:
        out.add_ssm_state_size(first["A_log"].shape[1])
        out.add_ssm_time_step_rank(first["dt_proj.weight"].shape[1])
        return
    out.add_ssm_state_size((first["conv1d.weight"].shape[0] - channels) // (2 * groups))
    out.add_ssm_time_step_rank(first["A_log"].shape[0])
    out.add_ssm_group_count(groups)
