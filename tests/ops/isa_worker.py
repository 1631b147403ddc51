"""Outputs and gradients of every sample on this process's instruction set, saved to the path given."""

import sys

import torch

from pyseq import testing
from pyseq._library import REGISTRY
from pyseq.samples import cast, samples

results = {}
for op in REGISTRY.values():
    for sample in samples(op.name):
        arguments = testing.prepare(cast(sample.draw(), torch.float32, op.float32), "cpu", requires_grad=True)
        if op.differentiable:
            outputs, grads = testing.gradients(op.function, arguments)
        else:
            outputs, grads = testing.updated(op.function, op, arguments), {}
        results |= {f"{sample}.{k}": y.detach() for k, y in enumerate(outputs)}
        results |= {f"{sample}.d{name}": grad for name, grad in grads.items()}
torch.save(results, sys.argv[1])
