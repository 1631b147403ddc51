"""transformers 5.23.0 (Apache-2.0): Mamba and Mamba-2 on a CPU, the torch paths that run without their GPU kernels.

Timed: `mamba_selective_scan` as MambaMixer calls it (softplus of dt + bias, D skip, silu(z) gate included);
`mamba2_chunk_scan` as Mamba2Mixer calls it (softplus of dt + bias, D skip), at its default chunk of 256 or another;
one mixer of a 130 M model for one token; the whole model for a prompt (logits of the last token only) and for one token
a sequence, in inference mode, without torch.compile. The backward of Mamba's sequential path costs time quadratic in
the length (each step's gradient is padded to the whole sequence), so none is offered; that of Mamba-2 is torch's own.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import require
from .inputs import GatedDelta, Scan, Ssd, SsdStep

# At transformers' default initializer_range of 0.1 a random model of 24 layers is ill-conditioned: its float32 logits
# are 3e-4 away from its float64 ones, which would hide a wrong peer. At 0.02 they are 1.4e-6 away.
COMMON: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 24, "initializer_range": 0.02}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {   # the family's classes, and the geometry
    "mamba-130m": ("Mamba", {**COMMON, "vocab_size": 50280}),
    "mamba2-130m": (
        "Mamba2",
        {**COMMON, "vocab_size": 50288, "num_heads": 24, "head_dim": 64, "state_size": 128, "n_groups": 1,
         "tie_word_embeddings": True},
    ),
}


def selective_scan_forward(x: Scan) -> Callable[[], Tensor]:
    """Layout of MambaMixer: u, dt [B, D, T]; B, C [B, N, T] as slices of one x_proj output; z a half of in_proj's."""
    op = require("transformers.models.mamba.modeling_mamba", "transformers").mamba_selective_scan
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


def _chunk_scan(x: Ssd, chunk: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Layout of Mamba2Mixer: x, B, C as slices of one output of the convolution, dt of one output of in_proj."""
    modeling = require("transformers.models.mamba2.modeling_mamba2", "transformers")
    op = inspect.unwrap(modeling.mamba2_chunk_scan)   # not mamba-ssm's kernel, which it takes where that is installed
    joined = torch.cat([t.flatten(2) for t in (x.x, x.B, x.C)], -1)
    data, B, C = joined.split([x.x[0, 0].numel(), x.B[0, 0].numel(), x.C[0, 0].numel()], -1)
    dt = torch.cat([joined, x.dt], -1)[..., joined.shape[-1] :]

    def call(data: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
        heads, groups = (t.unflatten(-1, like.shape[2:]) for t, like in ((data, x.x), (B, x.B)))
        C = C.unflatten(-1, x.C.shape[2:])
        return op(heads, dt, A, groups, C, chunk_size=chunk, D=D, dt_bias=dt_bias, dt_softplus=True)

    return call, [data, dt, x.A, B, C, x.D, x.dt_bias]


def ssd_forward(x: Ssd, chunk: int = 256) -> Callable[[], Tensor]:
    op, tensors = _chunk_scan(x, chunk)

    @torch.inference_mode()
    def call() -> Tensor:
        return op(*tensors)

    return call


def ssd_forward_backward(x: Ssd, chunk: int = 256) -> Callable[[], tuple[Tensor, ...]]:
    """Gradients of x, dt, A, B, C, D, dt_bias."""
    op, tensors = _chunk_scan(x, chunk)
    leaves = [t.detach().requires_grad_() for t in tensors]
    shapes = [getattr(x, name).shape for name in ("x", "dt", "A", "B", "C", "D", "dt_bias")]

    def call() -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(op(*leaves), leaves, x.dy.to(torch.float32))
        return tuple(g.view(shape) for g, shape in zip(grads, shapes, strict=True))

    return call


def gated_delta_rule(x: GatedDelta, grad: bool, compiled: bool) -> Callable[[], Any]:
    """Qwen3-Next's torch_chunk_gated_delta_rule, chunk 64: y, or the gradients of q, k, v, g, beta."""
    modeling = require("transformers.models.qwen3_next.modeling_qwen3_next", "transformers")
    op = inspect.unwrap(modeling.torch_chunk_gated_delta_rule)
    if compiled:
        op = torch.compile(op, dynamic=False)
    tensors = [t.clone().requires_grad_(grad) for t in (x.q, x.k, x.v, x.g, x.beta)]

    def call() -> Any:
        with torch.set_grad_enabled(grad):
            y = op(*tensors)[0]
            return torch.autograd.grad(y, tensors, x.dy) if grad else y

    return call


def ssd_step(x: SsdStep) -> Callable[[], Tensor]:
    """dt, A, D and dt_bias expanded as Mamba2Mixer does."""
    modeling = require("transformers.models.mamba2.modeling_mamba2", "transformers")
    op = inspect.unwrap(modeling.mamba2_selective_state_update)
    _, _, width, states = x.state.shape
    dt = x.dt.unsqueeze(-1).expand(-1, -1, width)
    A = x.A[:, None, None].expand(-1, width, states)
    D, bias = (t[:, None].expand(-1, width) for t in (x.D, x.dt_bias))

    @torch.inference_mode()
    def call() -> Tensor:
        return op(x.state, x.x, dt, A, x.B, x.C, D, dt_bias=bias, dt_softplus=True)

    return call


def _config(name: str, **changes: Any) -> tuple[str, Any]:
    transformers = require("transformers", "transformers")
    family, geometry = MODELS[name]
    return family, getattr(transformers, f"{family}Config")(**{**geometry, **changes})


def model(
    name: str, state_dict: dict[str, Tensor] | None = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """The model for causal language modelling with the given weights, or random ones from seed 0."""
    family, config = _config(name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        m = getattr(require("transformers", "transformers"), f"{family}ForCausalLM")(config)
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


def mixer_step(name: str, batch: int = 1, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """One token [B, 1, 768] through one mixer (both projections, conv, scan), its cache updated in place."""
    from transformers import DynamicCache

    family, config = _config(name, num_hidden_layers=1)
    module = require(f"transformers.models.{family.lower()}.modeling_{family.lower()}", "transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = getattr(module, f"{family}Mixer")(config, layer_idx=0).to(dtype).eval()
        x = torch.randn(batch, 1, config.hidden_size).to(dtype)
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        mixer(x.expand(-1, 8, -1), cache_params=cache)

    @torch.inference_mode()
    def call() -> Tensor:
        return mixer(x, cache_params=cache)

    return call
