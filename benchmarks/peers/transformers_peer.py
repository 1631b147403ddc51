"""transformers 5.23.0 (Apache-2.0): Mamba on a CPU, the sequential torch path that runs without its GPU kernels.

Timed: `mamba_selective_scan` as MambaMixer calls it (softplus of dt + bias, D skip, silu(z) gate included); one mixer
of mamba-130m for one token; the whole MambaForCausalLM for a prompt (logits of the last token only) and for one token
a sequence, in inference mode, without torch.compile. The backward of the sequential path costs time
quadratic in the length (each step's gradient is padded to the whole sequence), so none is offered.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import require
from .inputs import Scan

# At transformers' default initializer_range of 0.1 a random model of 24 layers is ill-conditioned: its float32 logits
# are 3e-4 away from its float64 ones, which would hide a wrong peer. At 0.02 they are 1.4e-6 away.
MAMBA_130M: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 24,
    "vocab_size": 50280,
    "initializer_range": 0.02,
}


def _modeling() -> Any:
    return require("transformers.models.mamba.modeling_mamba", "transformers")


def selective_scan_forward(x: Scan) -> Callable[[], Tensor]:
    """Layout of MambaMixer: u, dt [B, D, T]; B, C [B, N, T] as slices of one x_proj output; z a half of in_proj's."""
    op = _modeling().mamba_selective_scan
    u, dt = (t.transpose(1, 2).contiguous() for t in (x.u, x.dt))
    n, rank = x.A.shape[1], -(-x.u.shape[2] // 32)
    projected = torch.cat([x.u.new_zeros(*x.u.shape[:2], rank), x.B, x.C], dim=-1)
    _, b, c = (t.transpose(1, 2) for t in projected.split([rank, n, n], dim=-1))
    z = torch.cat([x.u, x.z], dim=-1).transpose(1, 2).chunk(2, dim=1)[1]

    @torch.inference_mode()
    def call() -> Tensor:
        y = op(u, dt, x.A, b, c, D=x.D, z=z, delta_bias=x.dt_bias, delta_softplus=True)
        return y.transpose(1, 2)

    return call


def model(state_dict: dict[str, Tensor] | None = None, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """MambaForCausalLM with the given weights, or random ones from seed 0; the geometry of mamba-130m by default."""
    require("transformers", "transformers")
    from transformers import MambaConfig, MambaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        m = MambaForCausalLM(MambaConfig(**{**MAMBA_130M, **config}))
    if state_dict is not None:
        m.load_state_dict(state_dict)
    return m.to(dtype).eval()


def prefill(m: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """tokens [B, T]; fills a new cache; returns the logits [B, vocabulary] of the last token."""

    @torch.inference_mode()
    def call() -> Tensor:
        return m(tokens, use_cache=True, logits_to_keep=1).logits[:, -1]

    return call


def decode(m: Any, batch: int) -> Callable[[], Tensor]:
    """One token for each of `batch` sequences, which follow a prompt of 8; the same token every time (no sampling)."""
    tokens = torch.arange(batch * 8).view(batch, 8) % m.config.vocab_size
    with torch.inference_mode():
        cache = m(tokens, use_cache=True, logits_to_keep=1).cache_params
    last = tokens[:, -1:]

    @torch.inference_mode()
    def call() -> Tensor:
        return m(last, cache_params=cache, use_cache=True).logits[:, -1]

    return call


def mixer_step(batch: int = 1, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """One token [B, 1, 768] through one MambaMixer (both projections, conv, scan), its cache updated in place."""
    modeling = _modeling()
    from transformers import DynamicCache, MambaConfig

    config = MambaConfig(**{**MAMBA_130M, "num_hidden_layers": 1})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = modeling.MambaMixer(config, layer_idx=0).to(dtype).eval()
        x = torch.randn(batch, 1, config.hidden_size).to(dtype)
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        mixer(x.expand(-1, 8, -1), cache_params=cache)

    @torch.inference_mode()
    def call() -> Tensor:
        return mixer(x, cache_params=cache)

    return call
