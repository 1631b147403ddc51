"""Relatives of the models that this package reads, recognised so that the error can say what they are."""

from __future__ import annotations

import re
from typing import Any

from pyseq.models.layouts.sizes import LAYER

# transformers' models of Mamba or Mamba-2 layers with attention among or beside them.
HYBRIDS = ("bamba", "falcon_h1", "granitemoehybrid", "jamba", "nemotron_h", "zamba", "zamba2")
ATTENTION = re.compile(r"\.(Wqkv|q_proj|k_proj|v_proj|self_attn|self_attention|attention|mha)\.")
MLP = re.compile(r"backbone\.layers\.\d+\.(mlp|norm2)\.")
# What a tensor's name says of another RWKV, the later first: each keeps names of those before it.
RWKVS = (
    ("RWKV-7 with DeepEmbed (v7a, v7b)", re.compile(r"\.ffn\.(s_emb|s_emb_x|s[012])(\.|$)")),
    ("RWKV-6", re.compile(r"\.(att|attn|attention)\.(time_maa_|x_proj\.)|\.time_(maa|decay)_w[12]$")),
    ("RWKV-5", re.compile(r"\.(att|attention)\.time_faaaa$")),
    ("RWKV-4", re.compile(r"\.(att|attention)\.time_first$")),
)
RWKV_TYPES = {"rwkv": "RWKV-4", "rwkv5": "RWKV-5", "rwkv6": "RWKV-6"}


def refuse_hybrid(kind: Any) -> None:
    if kind in HYBRIDS:
        raise ValueError(f"config: model_type is {kind!r}, a hybrid with attention layers: this version reads none")
    if isinstance(kind, str) and kind in RWKV_TYPES:
        what = RWKV_TYPES[kind]
        raise ValueError(f"config: model_type is {kind!r}, {what}: of RWKV this version reads 7 alone, x070")
    if kind == "rwkv7":
        raise ValueError("config: model_type is 'rwkv7', but the tensors are not those of RWKV-7")


def refuse_rwkv(files: list[str]) -> None:
    """Raises if the tensors are those of an RWKV before 7, or of a variant of it."""
    for what, pattern in RWKVS:
        for name in files:
            if pattern.search(name):
                raise ValueError(f"checkpoint: {name!r} belongs to {what}: of RWKV this version reads 7 alone, x070")


def refuse_original(raw: dict[str, Any]) -> str:
    """The layer of an original checkpoint, "Mamba1" or "Mamba2"; raises for another, and for what is around it."""
    options = raw.get("ssm_cfg")
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"config: ssm_cfg must be an object, got {options!r}")
    for key, what in (("attn_layer_idx", "a hybrid with attention layers"), ("d_intermediate", "blocks with an MLP")):
        if raw.get(key):
            raise ValueError(f"config: {key} is {raw[key]!r}, {what}: this version reads none")
    layer = (options or {}).get("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise ValueError(f"config: ssm_cfg.layer is {layer!r}; this version reads 'Mamba1' and 'Mamba2' layers")
    return layer


def refuse_tensors(names: dict[str, str]) -> None:
    """Raises if the tensors are those of another model, whatever the config says."""
    for name, in_file in names.items():
        if ATTENTION.search(name):
            raise ValueError(f"checkpoint: {in_file!r} belongs to attention, a hybrid: this version reads none")
        if MLP.match(name):
            raise ValueError(f"checkpoint: {in_file!r} belongs to an MLP beside the layer: this version reads none")
    for layer in sorted({found.group(0) for name in names if (found := LAYER.match(name))}):
        if layer + "mixer.in_proj.weight" in names and layer + "mixer.A_log" not in names:
            what = "Mamba-3" if layer + "mixer.dt_bias" in names else "attention"
            raise ValueError(f"checkpoint: {layer}mixer has no A_log: {what}, which this version does not read")
