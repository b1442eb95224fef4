"""The dense linears that a compressed model's linears stand for, back in their places for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ..calibration.temporarily import weights_device
from ..structures.base import CompressedLinear


@contextmanager
def dense_again(model: nn.Module, dense: dict[str, nn.Module], block: str, *, release: bool) -> Iterator[None]:
    """A context in which the dense linears of a block are in their places again.

    `dense` has them by name, as those of other blocks; `release` lets go of them at the end.
    """
    inside = {name: linear for name, linear in dense.items() if f"{name}.".startswith(f"{block}.")}
    now = {name: model.get_submodule(name) for name in inside}
    homes = {name: weights_device(linear) for name, linear in inside.items()}
    try:
        for name, linear in inside.items():  # the block may be on the compute device meanwhile
            model.set_submodule(name, linear.to(weights_device(now[name])))
        yield
    finally:
        for name, module in now.items():
            model.set_submodule(name, module)
            inside[name].to(homes[name])
            if release:
                del dense[name]


def unrounded(waiting: Mapping[str, CompressedLinear]) -> dict[str, nn.Module]:
    """Return compressed linears as they are now, to stand for the dense ones where these are gone."""
    found: dict[str, nn.Module] = {}
    for name, module in waiting.items():
        found[name] = twin = copy.copy(module)
        twin._modules = dict(module._modules)  # or it would be rounded with the other
    return found
