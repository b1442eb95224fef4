"""The repeated blocks of a model: the outermost ones of every stack that text, or a processor's batch, passes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from .linears import is_linear
from .trial import Trial, token_embeddings

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass
class Stack:
    """Blocks that stand together, by full name."""

    blocks: dict[str, nn.Module] = field(default_factory=dict)

    def is_reached(self, trial: Trial) -> bool:
        """Return whether the pass went through any of them."""
        return any(trial.reaches(block) for block in self.blocks.values())


def find_stacks(model: nn.Module, trial: Trial | None) -> list[Stack]:
    """Return the stacks of blocks that hold linears, outermost first found, in the order of their names.

    A stack is a `ModuleList`, several of a kind in a `Sequential` or `ModuleDict`, or several of a kind in attributes
    that differ by a number. Containers that are never called are looked into; so are, in the end, all that are none.
    """
    stacks: dict[str, Stack] = {}
    for key, name, block in _walk(model, "", trial):
        stacks.setdefault(key, Stack()).blocks[name] = block
    with_linears = [stack for stack in stacks.values() if any(map(holds_linears, stack.blocks.values()))]
    # Linears side by side are heads or parts of something, where there are blocks made of several modules.
    wider = [stack for stack in with_linears if not all(map(is_linear, stack.blocks.values()))]
    return wider or with_linears


def holds_linears(module: nn.Module) -> bool:
    """Return whether the module is a linear, or has some in it."""
    return any(map(is_linear, module.modules()))


def stacks_beside_embeddings(model: nn.Module, stacks: list[Stack]) -> list[Stack]:
    """Return the stacks in the innermost module that holds the token embeddings and any stack.

    That tells the language model of a multimodal one from its towers where no pass could be tried.
    """
    embeddings = token_embeddings(model)
    path = next((name for name, module in model.named_modules() if module is embeddings), "")
    while path:
        path = path.rpartition(".")[0]
        inside = [stack for stack in stacks if all(f"{name}.".startswith(f"{path}.") for name in stack.blocks)]
        if path and inside:
            return inside
    return stacks


def _walk(module: nn.Module, path: str, trial: Trial | None) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield the stack's key, name and module of every block."""
    keys = _stack_keys(module)
    for name, child in module.named_children():
        full = f"{path}{name}"
        if name in keys and not _is_transparent(child, trial):
            yield f"{path}{keys[name]}", full, child
        else:
            yield from _walk(child, f"{full}.", trial)


def _is_transparent(module: nn.Module, trial: Trial | None) -> bool:
    """Whether it only holds blocks that somebody else calls."""
    if not isinstance(module, _CONTAINERS) or not _stack_keys(module):
        return False
    return not isinstance(module, nn.Sequential) if trial is None else module not in trial.calls


def _stack_keys(module: nn.Module) -> dict[str, str]:
    """Return the children that are blocks, if they are not looked into, each with a key that its stack shares."""
    children = dict(module.named_children())
    if isinstance(module, nn.ModuleList):
        return dict.fromkeys(children, "")
    parts = {name: child for name, child in children.items() if holds_linears(child) and not is_linear(child)}
    if isinstance(module, _CONTAINERS):
        keys = {name: type(child).__qualname__ for name, child in parts.items()}
    else:
        keys = {
            name: f"{re.sub(r'[0-9]+', '#', name)} {type(child).__qualname__}"
            for name, child in parts.items()
            if re.search(r"[0-9]", name)
        }
    alike = Counter(keys.values())
    if isinstance(module, _CONTAINERS) and any(count > 1 for count in alike.values()):
        return dict.fromkeys(keys, "")  # hybrids: blocks of another kind stand among them
    return {name: key for name, key in keys.items() if alike[key] > 1}
