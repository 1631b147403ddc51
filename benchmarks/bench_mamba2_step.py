"""mamba2_step against the same step an op at a time, as Mamba2.stepper runs it on a CPU.

Roofline, a layer of mamba2-130m (H 24, P 64, N 128, one group) in float32: the state, read and written, is 1.57 MB a
row of the batch, what else moves 0.1 MB; for one row all of it stays in the caches between calls, unlike in a model.
"""

import pytest
import torch

from benchmarks.peers import inputs
from pyseq._library import REGISTRY

H, P, N = 24, 64, 128


def fused(x):
    kernel, arguments = REGISTRY["mamba2_step"].active.step, tuple(vars(x).values())
    return lambda: kernel(*arguments, 0.0, float("inf"), 1e-5, H * P, False)


def by_ops(x):
    conv, ssd, norm = (REGISTRY[n].active for n in ("causal_conv1d", "ssd", "rms_norm_gated"))

    def call():
        u, B, C = conv.step(x.conv_state, x.xBC, x.conv_weight, x.conv_bias, True).split_with_sizes([H * P, N, N], -1)
        parts = u.unflatten(1, (H, P)), x.dt, x.A, B[:, None], C[:, None], x.D, None, x.dt_bias
        y = ssd.step(x.state, *parts, True, 0.0, float("inf"))
        return norm.forward(y.flatten(1), x.norm_weight, x.z, None, 1e-5, H * P, False)[0]

    return call


@pytest.mark.parametrize("batch", [1, 8])
def test_mamba2_step(compare, batch):
    def made():
        return inputs.mamba2_step(batch, H, P, N)

    with torch.inference_mode():
        compare(f"mamba2_step, batch {batch}, float32",
                {"pyseq": lambda: fused(made()), "pyseq, op by op": lambda: by_ops(made())},
                bytes=4 * batch * (2 * H * P * N + 8 * (H * P + 2 * N) + 2 * H * P))
