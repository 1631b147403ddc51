"""Mamba and FalconMamba: the layouts of transformers and of the original code."""

from __future__ import annotations

import math
from typing import Any

from pyseq.models.config import Config
from pyseq.models.files import Tensors
from pyseq.models.layouts.sizes import FIRST, Sizes, match, match_expand, of_original, of_transformers, shape


class MambaSizes(Sizes):
    """With the geometry of the layers."""

    def __init__(self, tensors: Tensors, names: dict[str, str]) -> None:
        super().__init__(tensors, names)
        if FIRST + "A_log" in names and len(tensors.shape(names[FIRST + "A_log"])) == 1:
            raise ValueError(
                "checkpoint: A_log has one dimension, as in Mamba-2; the config says Mamba (model_type, ssm_cfg.layer)"
            )
        self.d_inner, self.d_state = shape(tensors, names, FIRST + "A_log", 2)
        self.d_conv = shape(tensors, names, FIRST + "conv1d.weight", 3)[2]
        self.dt_rank = shape(tensors, names, FIRST + "dt_proj.weight", 2)[1]
        self.bias = FIRST + "in_proj.bias" in names
        self.conv_bias = FIRST + "conv1d.bias" in names

    def layer_args(self) -> dict[str, Any]:
        keys = ("d_inner", "d_state", "d_conv", "dt_rank", "bias", "conv_bias")
        return {key: getattr(self, key) for key in keys}

    def match_rank(self, claimed: Any, key: str) -> None:
        match({key: math.ceil(self.d_model / 16) if claimed == "auto" else claimed}, key, self.dt_rank)


def from_transformers(raw: dict[str, Any], tensors: Tensors, names: dict[str, str]) -> Config:
    sizes = MambaSizes(tensors, names)
    match(raw, "state_size", sizes.d_state)
    match(raw, "conv_kernel", sizes.d_conv)
    match(raw, "use_bias", sizes.bias)
    match(raw, "use_conv_bias", sizes.conv_bias)
    sizes.match_rank(raw.get("time_step_rank", "auto"), "time_step_rank")
    if raw.get("intermediate_size") is not None:  # FalconMamba's config also says expand = 16, and means 2
        match(raw, "intermediate_size", sizes.d_inner)
    else:
        match_expand(raw.get("expand", 2), sizes.d_inner, sizes.d_model)
    args = sizes.layer_args()
    if raw["model_type"] == "falcon_mamba":
        args["mixer_rms_eps"] = raw.get("mixer_rms_eps", 1e-6)
    return of_transformers(raw, sizes, "Mamba", args, tie=None)


def from_original(raw: dict[str, Any], tensors: Tensors, names: dict[str, str]) -> Config:
    sizes, options = MambaSizes(tensors, names), raw.get("ssm_cfg") or {}
    match(options, "d_state", sizes.d_state)
    match(options, "d_conv", sizes.d_conv)
    match(options, "bias", sizes.bias)
    match(options, "conv_bias", sizes.conv_bias)
    sizes.match_rank(options.get("dt_rank", "auto"), "ssm_cfg.dt_rank")
    match_expand(options.get("expand", 2), sizes.d_inner, sizes.d_model)
    # 0 is <|endoftext|> of the GPT-NeoX tokenizer that every original checkpoint uses.
    return of_original(raw, sizes, "Mamba", sizes.layer_args(), bos=None, eos=0)


def to_transformers(config: Config) -> dict[str, Any]:
    args = config.layer_args
    falcon = args.get("mixer_rms_eps") is not None
    inner = args.get("d_inner") or int(args.get("expand", 2) * config.d_model)
    rank = args.get("dt_rank", "auto")
    return {
        "architectures": ["FalconMambaForCausalLM" if falcon else "MambaForCausalLM"],
        "model_type": "falcon_mamba" if falcon else "mamba",
        "intermediate_size": inner,
        "expand": inner // config.d_model,
        "state_size": args.get("d_state", 16),
        "conv_kernel": args.get("d_conv", 4),
        "time_step_rank": math.ceil(config.d_model / 16) if rank == "auto" else rank,
        "use_bias": args.get("bias", False),
        "use_conv_bias": args.get("conv_bias", True),
        **({"mixer_rms_eps": args["mixer_rms_eps"]} if falcon else {}),
    }
