"""Subclasses of linears: which of them compute nothing but the product."""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from .linears import as_matrix, is_dense_linear, is_linear

_ROWS = 3
# Inputs of several magnitudes, so that clipping and activations show.
_MAGNITUDES = (0.1, 1.0, 100.0)
_LARGEST_ERROR = {torch.float64: 1e-9, torch.float32: 1e-4}


def computes_like_linear(module: nn.Module) -> bool:
    """Whether a module is a linear, or a subclass of one that gives the same outputs: tried on random inputs.

    A copy of it is tried, with random weights, so it may be on meta. One whose weight is packed, and one with modules,
    parameters or buffers of its own, is taken for something else.
    """
    if is_dense_linear(module):
        return True
    if not is_linear(module) or type(module.weight) is not nn.Parameter or not module.weight.is_floating_point():
        return False
    own = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    return not own and module.weight.dim() == 2 and _outcome(_Probe(module))


class _Probe:
    """A module as a key of the cache: by its class, shape and plain attributes, which decide what it computes."""

    def __init__(self, module: Any) -> None:
        self.module = module
        plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        settings = tuple(sorted((name, repr(value)) for name, value in plain.items()))
        self.key: Hashable = (type(module), module.weight.shape, module.weight.dtype, module.bias is None, settings)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Probe) and self.key == other.key


@functools.lru_cache(maxsize=256)
def _outcome(probe: _Probe) -> bool:
    module, generator = probe.module, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(module.weight.dtype)

    tried = copy.copy(module)
    weight, bias = random(*module.weight.shape), None if module.bias is None else random(len(module.bias))
    values = {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
    tried.__dict__["_parameters"] = values
    matrix = as_matrix(module, weight)
    x = torch.cat([magnitude * random(1, _ROWS, matrix.shape[1]) for magnitude in _MAGNITUDES])
    try:
        with torch.no_grad():
            found = type(module).forward(tried, x)
    except Exception:  # whatever else it needs: it is no linear then
        return False
    expected = nn.functional.linear(x, matrix, bias)
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    scale = expected.double().norm(dim=-1)
    return bool(((found.double() - expected.double()).norm(dim=-1) <= _LARGEST_ERROR.get(x.dtype, 2e-2) * scale).all())
