"""Checkpoints of tiny Mamba-2 models in the layouts of the original code and of Mistral."""

import json

import torch
from safetensors.torch import save_file

IDS = torch.arange(24).reshape(2, 12) % 61
ORIGINAL = {
    "d_model": 32,
    "n_layer": 2,
    "d_intermediate": 0,
    "vocab_size": 61,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 2},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
MISTRAL = {
    "dim": 32,
    "n_layers": 2,
    "vocab_size": 61,
    "n_groups": 2,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 1,
    "tie_embeddings": False,
    "model_type": "mamba",
}
# A model that it describes: the size of the state it does not say.
MISTRALS = {"tie_embeddings": False, "pad_vocab_size_multiple": 1, "layer_args": {"d_state": 128}}


def original(model):
    """Tensors as the original code writes them: `embedding`, and a tied head that is there twice."""
    tensors = {n.replace("embeddings", "embedding"): t.clone() for n, t in model.state_dict().items()}
    if model.config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    return tensors


def write(folder, tensors, config=ORIGINAL, weights="model.safetensors", name="config.json"):
    folder.mkdir(exist_ok=True)
    save_file({name: t.clone() for name, t in tensors.items()}, folder / weights)
    (folder / name).write_text(json.dumps(config))


def mistral(folder, model):
    tensors = {"model." + name: t for name, t in original(model).items()}
    write(folder, tensors, MISTRAL, "consolidated.safetensors", "params.json")
