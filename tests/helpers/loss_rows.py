"""Provide small inputs for the tests of the reference losses."""

import math

import torch

T, D, V = 6, 3, 5
IGNORED = 2


def tensors(seed=0, dtype=torch.float64):
    """Return hidden [T, D], weight [V, D] and targets [T] with one ignored row."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(V, (T,), generator=generator)
    targets[IGNORED] = -100
    return hidden, weight, targets


def row_vector(seed, low=-1.0, high=1.0):
    return torch.empty(T, dtype=torch.float64).uniform_(low, high, generator=torch.Generator().manual_seed(seed))


def probabilities_by_loop(hidden, weight, temperature=1.0, softcap=None, bias=None):
    """Return softmax by definition, in Python floats."""
    table = []
    for h in hidden.tolist():
        z = [sum(a * b for a, b in zip(h, w, strict=True)) for w in weight.tolist()]
        z = z if bias is None else [value + b for value, b in zip(z, bias.tolist(), strict=True)]
        z = z if softcap is None else [softcap * math.tanh(value / softcap) for value in z]
        e = [math.exp(value / temperature) for value in z]
        table.append([value / sum(e) for value in e])
    return table
