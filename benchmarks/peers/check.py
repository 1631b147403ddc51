"""Checks every peer against a float64 loop at a small shape, and llama.cpp's models against transformers'.

    python -m benchmarks.peers.check

Prints the largest error of each, divided by the largest value; ends with status 1 if one exceeds its bound. A peer
that is not installed is named and skipped.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import (
    PeerMissing,
    compiled_loop,
    fla_peer,
    gguf_file,
    inputs,
    llama_cpp_peer,
    mambapy_peer,
    rwkv7_weights,
    torch_conv,
    torch_ssd,
)
from . import transformers_peer as hf

OP_BOUND = 1e-5  # float32 sums over 128 steps and, for dA, over batch and time
LOGITS_BOUND = 1e-5
STEP = (2, 4, 16, 32, 2)   # batch, heads, width, states, groups


def scan_loop(x: inputs.Scan, bare: bool = False) -> Tensor:
    """The recurrence, step by step; `bare` leaves out D skip and gate."""
    dt = F.softplus(x.dt + x.dt_bias)
    h = x.u.new_zeros(x.u.shape[0], *x.A.shape)
    ys = []
    for t in range(x.u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * x.A) * h + (dt * x.u)[:, t, :, None] * x.B[:, t, None, :]
        ys.append((h * x.C[:, t, None, :]).sum(-1))
    y = torch.stack(ys, 1)
    return y if bare else (y + x.D * x.u) * F.silu(x.z)


def conv_loop(x: inputs.Conv, bare: bool = False) -> Tensor:
    """The sum over taps, sample by sample; `bare` leaves out bias and SiLU."""
    width, ys = x.weight.shape[1], []
    for t in range(x.x.shape[1]):
        taps = [x.weight[:, k] * x.x[:, t - width + 1 + k] for k in range(width) if t - width + 1 + k >= 0]
        ys.append(torch.stack(taps).sum(0))
    y = torch.stack(ys, 1)
    return y if bare else F.silu(y + x.bias)


def ssd_loop(x: inputs.Ssd, bare: bool = False, state: Tensor | None = None) -> Tensor:
    """The recurrence, token by token; `bare` leaves out the D skip."""
    dt, copies = F.softplus(x.dt + x.dt_bias), x.x.shape[2] // x.B.shape[2]
    B, C = (t.repeat_interleave(copies, 2).unsqueeze(-2) for t in (x.B, x.C))
    S = x.x.new_zeros(*x.x[:, 0].shape, x.B.shape[-1]) if state is None else state
    ys = []
    for t in range(x.x.shape[1]):
        S = torch.exp(dt[:, t] * x.A)[..., None, None] * S + (dt[..., None] * x.x)[:, t].unsqueeze(-1) * B[:, t]
        ys.append((S * C[:, t]).sum(-1))
    y = torch.stack(ys, 1)
    return y if bare else y + x.D[:, None] * x.x


def ssd_step_loop(x: inputs.SsdStep) -> Tensor:
    token = {name: getattr(x, name).unsqueeze(1) for name in ("x", "dt", "B", "C")}
    return ssd_loop(inputs.Ssd(**token, A=x.A, D=x.D, dt_bias=x.dt_bias, dy=token["x"]), state=x.state)[:, 0]


def delta_loop(x: inputs.Delta) -> Tensor:
    S, ys = torch.einsum("bhk,bhv->bhkv", x.k[:, 0], x.v[:, 0]) * 0, []
    for t in range(x.q.shape[1]):
        p = torch.einsum("bhkv,bhk->bhv", S, x.a[:, t])
        S = x.g[:, t].exp().unsqueeze(-1) * S + torch.einsum("bhk,bhv->bhkv", x.b[:, t], p)
        S = S + torch.einsum("bhk,bhv->bhkv", x.k[:, t], x.v[:, t])
        ys.append(torch.einsum("bhkv,bhk->bhv", S, x.q[:, t]))
    return torch.stack(ys, 1)


def gated_delta_loop(x: inputs.GatedDelta) -> Tensor:
    S, ys = torch.einsum("bhk,bhv->bhkv", x.k[:, 0], x.v[:, 0]) * 0, []
    for t in range(x.q.shape[1]):
        S = x.g[:, t, :, None, None].exp() * S
        u = x.beta[:, t, :, None] * (x.v[:, t] - torch.einsum("bhkv,bhk->bhv", S, x.k[:, t]))
        S = S + torch.einsum("bhk,bhv->bhkv", x.k[:, t], u)
        ys.append(torch.einsum("bhkv,bhk->bhv", S, x.q[:, t]) * x.q.shape[-1] ** -0.5)
    return torch.stack(ys, 1)


def gradients(loop: Callable[..., Tensor], x: object, names: str) -> list[Tensor]:
    leaves = [getattr(x, name).requires_grad_() for name in names.split()]
    return list(torch.autograd.grad(loop(x), leaves, x.dy))


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def model_error(name: str) -> float:
    """llama.cpp's logits against transformers', both float32, 24 layers: whole prompt, last token, one step more."""
    m = hf.model(name, vocab_size=512)
    tokens = torch.randint(512, (100,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = m(tokens[None]).logits[0]
        steps = torch.arange(16).view(2, 8)
        after = m(torch.cat([steps, steps[:, -1:]], 1)).logits[1, -1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        gguf_file.write(path, m.state_dict())
        with llama_cpp_peer.Model(path) as llama:
            whole = error(llama.logits(tokens), want)
            prompt = error(llama.prefill(tokens)(), want[-1])
            step = error(llama.decode(2)(), after)
            ours = error(hf.decode(m, 2)()[1], after)
    return max(whole, prompt, step, ours)


def rwkv7_error() -> float:
    """llama.cpp's logits against the equations: whole prompt, last token, one step more."""
    w = rwkv7_weights.weights(3, 128, 512)
    tokens = torch.randint(512, (100,), generator=torch.Generator().manual_seed(1))
    want, steps = rwkv7_weights.logits(w, tokens), torch.arange(16).view(2, 8)
    after = rwkv7_weights.logits(w, torch.cat([steps[1], steps[1, -1:]]))[-1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        gguf_file.write_rwkv7(path, w)
        with llama_cpp_peer.Model(path) as llama:
            whole = error(llama.logits(tokens), want)
            prompt = error(llama.prefill(tokens)(), want[-1])
            step = error(llama.decode(2)(), after)
    return max(whole, prompt, step)


def main() -> int:
    torch.set_num_threads(2)
    scan, conv = inputs.scan(2, 128, 64, 16), inputs.conv(2, 128, 64)
    ssd, grouped = inputs.ssd(2, 192, 4, 16, 32), inputs.ssd(2, 150, 4, 16, 32, 2)
    scan64, conv64, ssd64, grouped64 = map(inputs.double, (scan, conv, ssd, grouped))
    y, bare, filtered = scan_loop(scan64), scan_loop(scan64, bare=True), conv_loop(conv64)
    dual, pairs = ssd_loop(ssd64), ssd_loop(grouped64)
    dscan = gradients(scan_loop, scan64, "u dt A B C D z dt_bias")
    dconv = gradients(conv_loop, conv64, "x weight bias")
    delta, gated = inputs.delta(1, 128, 4, 64), inputs.gated_delta(1, 128, 4, 64)
    delta64, gated64 = map(inputs.double, (delta, gated))
    rule, gate = delta_loop(delta64), gated_delta_loop(gated64)
    dgate = gradients(gated_delta_loop, gated64, "q k v g beta")
    ddual, dpairs = (gradients(ssd_loop, x, "x dt A B C D dt_bias") for x in (ssd64, grouped64))

    def op(run: Callable[[], Callable[[], object]], *want: Tensor) -> Callable[[], float]:
        def compare() -> float:
            got = run()()
            return max(error(g, w) for g, w in zip(got if isinstance(got, tuple) else (got,), want, strict=True))

        return compare

    token = ssd_step_loop(inputs.double(inputs.ssd_step(*STEP)))
    loop_both = compiled_loop.selective_scan_forward_backward
    checks: dict[str, tuple[Callable[[], float], float]] = {
        "transformers selective_scan forward": (op(lambda: hf.selective_scan_forward(scan), y), OP_BOUND),
        "mambapy selective_scan forward": (op(lambda: mambapy_peer.selective_scan_forward(scan), y), OP_BOUND),
        "mambapy selective_scan gradients": (
            op(lambda: mambapy_peer.selective_scan_forward_backward(scan), *dscan),
            OP_BOUND,
        ),
        "compiled loop forward": (op(lambda: compiled_loop.selective_scan_forward(scan), y), OP_BOUND),
        "compiled loop gradients, split": (op(lambda: loop_both(scan, "split"), *dscan), OP_BOUND),
        "compiled loop gradients, slice": (op(lambda: loop_both(scan, "slice"), *dscan), OP_BOUND),
        "llama.cpp ssm_scan forward": (op(lambda: llama_cpp_peer.ssm_scan_forward(scan), bare), OP_BOUND),
        "torch conv1d forward": (op(lambda: torch_conv.conv1d_forward(conv), filtered), OP_BOUND),
        "torch conv1d gradients": (op(lambda: torch_conv.conv1d_forward_backward(conv), *dconv), OP_BOUND),
        "compiled shift-add forward": (op(lambda: torch_conv.shift_add_forward(conv), filtered), OP_BOUND),
        "compiled shift-add gradients": (op(lambda: torch_conv.shift_add_forward_backward(conv), *dconv), OP_BOUND),
        "llama.cpp ssm_conv forward": (
            op(lambda: llama_cpp_peer.ssm_conv_forward(conv), conv_loop(conv64, bare=True)),
            OP_BOUND,
        ),
        "transformers ssd forward": (op(lambda: hf.ssd_forward(grouped), pairs), OP_BOUND),
        "transformers ssd forward, chunk 64": (op(lambda: hf.ssd_forward(grouped, 64), pairs), OP_BOUND),
        "transformers ssd gradients": (op(lambda: hf.ssd_forward_backward(grouped), *dpairs), OP_BOUND),
        "transformers ssd gradients, chunk 64": (op(lambda: hf.ssd_forward_backward(grouped, 64), *dpairs), OP_BOUND),
        "transformers ssd step": (op(lambda: hf.ssd_step(inputs.ssd_step(*STEP)), token), OP_BOUND),
        "fla naive chunk forward": (op(lambda: fla_peer.ssd(grouped, False, naive=True), pairs), OP_BOUND),
        "fla naive chunk gradients": (op(lambda: fla_peer.ssd(grouped, True, naive=True), *dpairs), OP_BOUND),
        "torch ssd listing forward": (op(lambda: torch_ssd.ssd_forward(ssd, False), dual), OP_BOUND),
        "torch ssd listing gradients": (op(lambda: torch_ssd.ssd_forward_backward(ssd, False), *ddual), OP_BOUND),
        "torch ssd compiled forward": (op(lambda: torch_ssd.ssd_forward(ssd, True), dual), OP_BOUND),
        "torch ssd compiled gradients": (op(lambda: torch_ssd.ssd_forward_backward(ssd, True), *ddual), OP_BOUND),
        "llama.cpp ssd forward": (
            op(lambda: llama_cpp_peer.ssd_forward(grouped), ssd_loop(grouped64, bare=True)),
            OP_BOUND,
        ),
        "fla naive delta rule, recurrence": (
            op(lambda: fla_peer.delta_rule(delta, False, "recurrence"), rule),
            OP_BOUND,
        ),
        "fla naive delta rule, chunks": (op(lambda: fla_peer.delta_rule(delta, False, "chunks"), rule), OP_BOUND),
        "llama.cpp delta rule forward": (op(lambda: llama_cpp_peer.delta_rule_forward(delta), rule), OP_BOUND),
        "fla naive gated delta rule": (op(lambda: fla_peer.gated_delta_rule(gated, False, True), gate), OP_BOUND),
        "fla naive gated delta rule gradients": (
            op(lambda: fla_peer.gated_delta_rule(gated, True, True), *dgate),
            OP_BOUND,
        ),
        "transformers gated delta rule": (op(lambda: hf.gated_delta_rule(gated, False, False), gate), OP_BOUND),
        "transformers gated delta rule gradients": (
            op(lambda: hf.gated_delta_rule(gated, True, False), *dgate),
            OP_BOUND,
        ),
        "llama.cpp gated delta rule forward": (
            op(lambda: llama_cpp_peer.gated_delta_rule_forward(gated), gate),
            OP_BOUND,
        ),
        "llama.cpp mamba against transformers": (lambda: model_error("mamba-130m"), LOGITS_BOUND),
        "llama.cpp mamba2 against transformers": (lambda: model_error("mamba2-130m"), LOGITS_BOUND),
        "llama.cpp rwkv7 against its equations": (rwkv7_error, LOGITS_BOUND),
    }
    failed = 0
    for name, (check, bound) in checks.items():
        try:
            e = check()
        except PeerMissing as missing:
            print(f"{name:40s} skipped: {missing}")
            continue
        failed += not e <= bound
        print(f"{name:40s} {e:.1e}{'' if e <= bound else f'   above {bound:.0e}'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
