"""Small RWKV-7 checkpoints in the layouts of its authors, of fla and of the class with lower-case letters."""

import json

import torch
from rwkv7_loop import checkpoint
from safetensors.torch import save_file

IDS = torch.arange(24).reshape(2, 12) % 61
RANKS = {"decay_low_rank_dim": 32, "a_low_rank_dim": 64, "v_low_rank_dim": 48, "gate_low_rank_dim": 24}
CONFIG = {
    "model_type": "rwkv7",
    "architectures": ["RWKV7ForCausalLM"],
    "attn": None,
    "attn_mode": "chunk",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "vocab_size": 61,
    "head_dim": 64,
    "num_heads": None,
    "hidden_ratio": 4.0,
    "intermediate_size": 512,
    **RANKS,
    "value_dim": [128, 128],
    "norm_first": True,
    "norm_bias": True,
    "norm_eps": 1e-5,
    "hidden_act": "sqrelu",
    "fuse_norm": False,
    "use_l2warp": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def authors(dtype=torch.float32, **options):
    """As trainers write it: the first layer holds matrices for v_first that it does not use."""
    z = checkpoint(dtype=dtype, **options)
    first = {"v0": torch.ones(1, 1, 128), "v1": torch.ones(128, 48), "v2": torch.ones(48, 128)}
    return {**z, **{"blocks.0.att." + name: t.to(dtype) for name, t in first.items()}}


def fla(z, old=False):
    """As the conversion script of fla names and turns them; `old`, with the mix in one tensor."""
    out = {
        "model.embeddings.weight": z["emb.weight"], "lm_head.weight": z["head.weight"],
        **{f"model.norm.{p}": z[f"ln_out.{p}"] for p in ("weight", "bias")},
    }  # fmt: skip
    heads = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    norms = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm"}
    for name, t in z.items():
        if not name.startswith("blocks."):
            continue
        _, i, part, *rest = name.split(".")
        to, leaf = f"model.layers.{i}.", rest[0]
        if part in norms:
            out[f"{to}{norms[part]}.{leaf}"] = t
        elif part == "ffn":
            out[".".join([to + "ffn", *rest])] = t.squeeze()
        elif leaf in heads:
            out[f"{to}attn.{heads[leaf]}.weight"] = t
        elif leaf == "ln_x":
            out[f"{to}attn.g_norm.{rest[1]}"] = t
        elif leaf[0] in "wavg" and leaf[1:] in ("0", "1", "2"):
            kind = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[leaf[1:]]
            out[f"{to}attn.{leaf[0]}_lora.lora.{kind}"] = t.squeeze() if leaf[1:] == "0" else t.t().contiguous()
        elif leaf.startswith("x_"):
            out[f"{to}attn.{leaf}"] = t
        else:
            out[f"{to}attn.{leaf}"] = t.squeeze()
    if old:
        for i in range(2):
            rows = [out.pop(f"model.layers.{i}.attn.x_{letter}").flatten() for letter in "rwkvag"]
            out[f"model.layers.{i}.attn.x_x"] = torch.stack(rows)
    return {name: t for name, t in out.items() if ".0.attn.v_lora" not in name}


def lower(z):
    """As Rwkv7ForCausalLM holds them."""
    return {name if name == "head.weight" else "model." + name: t for name, t in z.items()}


LOWER = {
    "model_type": "rwkv7", "architectures": ["Rwkv7ForCausalLM"], "hidden_size": 128, "num_hidden_layers": 2,
    "attention_hidden_size": 128, "head_dim": 64, "vocab_size": 61, "value_low_rank_dim": 48, "wkv_mode": "fused",
}  # fmt: skip


def write(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    save_file({name: t.clone() for name, t in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
