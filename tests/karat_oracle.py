"""KArAt edge by edge, in loops over scalars, without batches or features; the reference of layer and operator."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kan_basis import make_basis
from models.operator import KArAtOperator

BASES = {
    "fourier": dict(grid=2),
    "spline": dict(grid=2, order=2, grid_range=(-2, 2)),
    "wavelet": dict(wavelet="mexican_hat"),
    "rational": dict(degrees=(3, 2), version="B"),
    "chebyshev": dict(order=2),
    "radial": dict(grid=3, grid_range=(-1, 1)),
}

STAGES = [
    dict(depth=1),
    *(dict(depth=d, modular=True, mode=m) for d in (2, 3) for m in ("phi1_w2", "w1_phi2")),
    *(dict(depth=d, modular=False) for d in (2, 3)),
]


def basis(name):
    return make_basis(name, **BASES[name])


@torch.no_grad()
def randomised(module: nn.Module) -> nn.Module:
    """Float64 parameters without the special values of an initialisation; wavelets keep a positive scale."""
    for name, p in module.double().named_parameters():
        p.copy_(torch.randn_like(p) * 0.5 + (1.0 if "scale" in name or "coefficients" in name else 0.0))
    return module


def operator(name="fourier", N=5, h=2, r=3, **options):
    return randomised(KArAtOperator(N, h, basis(name), r, **options))


@torch.no_grad()
def literal_sums(layer, head: int, row: list) -> list:
    """out_p = sum_q scale_base_pq b(x_q) + scale_basis_pq basis(x_q; theta_pq) of one row."""
    out = []
    for p in range(layer.out_features):
        total = 0.0
        for q in range(layer.in_features):
            x, theta = torch.as_tensor(row[q], dtype=torch.float64), layer.coefficients[head, p, q]
            total = total + layer.scale_basis[head, p, q] * layer.basis(x, theta)
            if layer.base_fn is not None:
                total = total + layer.scale_base[head, p, q] * layer.base_fn(x)
        out.append(total)
    return out


def literal_sigma(operator, head: int, row: list) -> list:
    """sigma of one row of scores: W Phi, Phi W or Phi alone, whichever parameters there are."""
    if operator.project_in is not None:
        row = [sum(w * x for w, x in zip(weights, row)) for weights in operator.project_in[head]]
    for layer in operator.layers:
        row = literal_sums(layer, head, row)
    if operator.project_out is not None:
        row = [sum(w * x for w, x in zip(weights, row)) for weights in operator.project_out[head]]
    return row


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation allocated, in `elements`."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out
