"""Weights of Mamba and Mamba-2 as files for llama.cpp, written with gguf 0.19.0 (MIT)."""

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
    if kind not in ("f32", "f16", "bf16"):
        raise ValueError(f"kind must be f32, f16 or bf16, not {kind!r}")
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

    def vector(name: str, t: Tensor) -> None:
        out.add_tensor(name, t.detach().float().contiguous().numpy())

    def matrix(name: str, t: Tensor) -> None:
        if kind == "bf16":
            bits = t.detach().bfloat16().contiguous().view(torch.int16).numpy().view("uint8")
            out.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            out.add_tensor(name, t.detach().to(torch.float16 if kind == "f16" else torch.float32).contiguous().numpy())

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
