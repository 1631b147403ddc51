"""Linear layer: y = x W^T + b."""

import torch


def linear(x, weight, bias=None):
    """x [..., in]; weight [out, in], or a PackedLinear; bias [out]. Returns y [..., out] in x's dtype."""
    if not isinstance(weight, torch.Tensor):
        weight = weight.unpack()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ weight.to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)
