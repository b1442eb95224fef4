"""Which linears of a model read the same input: seen in one pass over a few tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def shared_inputs(model: Any, linears: Mapping[str, nn.Module], inputs: Mapping[str, Any] | None) -> list[list[str]]:
    """Return the names of linears that read one and the same tensor, in the order in which they are called.

    One that reads it after a change in place reads another input.

    Experts that no token was routed to are taken to be like those of the same class that some were.

    Args:
        model: in evaluation mode.
        linears: those to look at, by name.
        inputs: what to call the model with; None is a few tokens.

    Raises:
        ValueError: the model cannot be called so; says what to pass.
    """
    # Tensors are kept while ids are compared, so that none has the id of one that is gone.
    read: dict[str, list[tuple[Tensor, int]]] = defaultdict(list)
    names = {id(module): name for name, module in linears.items()}

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        if given:
            read[names[id(module)]].append((given[0], _version(given[0])))

    hooks = [module.register_forward_pre_hook(note) for module in linears.values()]
    try:
        device = next(model.parameters()).device
        given = model.dummy_inputs if inputs is None else inputs
        model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in given.items()})
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be called with a few tokens to see which linears read the same input "
            f"({type(error).__name__}: {error}): pass inputs=, what the model is called with"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    by_inputs: dict[tuple[tuple[int, int], ...], list[str]] = defaultdict(list)
    for name, tensors in read.items():
        by_inputs[tuple((id(tensor), version) for tensor, version in tensors)].append(name)
    found = [group for group in by_inputs.values() if len(group) > 1]
    return found + _alike(model, found, [name for name in linears if name not in read])


def _version(tensor: Tensor) -> int:
    """Return how often it was changed in place, which tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _alike(model: nn.Module, found: list[list[str]], unseen: list[str]) -> list[list[str]]:
    """Groups among linears that were not called, as they are in other modules of the same class."""
    patterns: dict[tuple[type, tuple[str, ...]], None] = {}
    for group in found:
        parents = {name.rpartition(".")[0] for name in group}
        if len(parents) == 1:
            owner = model.get_submodule(parents.pop())
            patterns[type(owner), tuple(name.rpartition(".")[2] for name in group)] = None
    children: dict[str, list[str]] = defaultdict(list)
    for name in unseen:
        children[name.rpartition(".")[0]].append(name.rpartition(".")[2])
    groups = []
    for parent, there in children.items():
        for kind, pattern in patterns:
            if type(model.get_submodule(parent)) is kind and set(pattern) <= set(there):
                groups.append([f"{parent}.{child}" if parent else child for child in pattern])
    return groups
