"""Modules of a model that others stand in for, until the model is saved, converted or trained."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

_ATTRIBUTE = "dobisvd_substitutions"
RESTORE = "call optimum_dobisvd.restore_after_inference(model) first"
"""What to do about a model that has been optimized for inference, in words."""


class Substitute(nn.Module):
    """A module that stands in for one of a model."""

    def __format__(self, spec: str) -> str:
        # PEFT refuses a module with f"Target module {module} is not supported": the only place in its message where a
        # user can be told what to do instead. print(model), str and repr do not come here.
        return format(f"{self!r} (optimized for inference: {RESTORE})", spec)


class Substitutions:
    """What stands where, in the order in which it was put there. Originals keep their tensors.

    They are kept on the model itself, so that a copy of the model has its own. What orders the values of these tensors
    differently has methods `suspend`, after which they are as they would be without it, and `resume`.
    """

    def __init__(self) -> None:
        self._places: list[tuple[str, nn.Module, nn.Module]] = []

    def put(self, model: nn.Module, name: str, new: nn.Module) -> None:
        """Put a module in the place of the one of that name."""
        self._places.append((name, model.get_submodule(name), new))
        model.set_submodule(name, new)

    def take_away(self, model: nn.Module) -> None:
        """Put every original in its place again."""
        for name, original, new in reversed(self._places):
            model.set_submodule(name, original)
            tell(new, "suspend")

    def end(self, model: nn.Module) -> None:
        """Put every original in its place for good; what stood there has tensors of it back in their places."""
        self.take_away(model)
        for _, _, new in self._places:
            tell(new, "release")

    def put_back(self, model: nn.Module) -> None:
        """Undo `take_away`."""
        for name, _, new in self._places:
            model.set_submodule(name, new)
            tell(new, "resume")


def tell(module: nn.Module, method: str) -> None:
    """Call a method of what stands in for a module, if it has it."""
    if hasattr(module, method):
        getattr(module, method)()


def begin_substitutions(model: Any) -> Substitutions:
    """Return a record of what stands in for the model's modules; from now on the model cannot be trained."""
    record = Substitutions()
    setattr(model, _ATTRIBUTE, record)
    model.train = functools.partial(_train, model)
    return record


def has_substitutions(model: Any) -> bool:
    """Whether modules of the model have others standing in for them."""
    return _ATTRIBUTE in model.__dict__


def end_substitutions(model: Any) -> None:
    """Put every original in its place for good."""
    if has_substitutions(model):
        model.__dict__.pop(_ATTRIBUTE).end(model)
        model.__dict__.pop("train", None)


@contextlib.contextmanager
def originals(model: Any) -> Iterator[None]:
    """Have the originals in their places inside, and what stands in for them again afterwards."""
    record = model.__dict__.get(_ATTRIBUTE)
    if record is None:
        yield
        return
    record.take_away(model)
    try:
        yield
    finally:
        record.put_back(model)


def _train(model: Any, mode: bool = True) -> Any:
    if mode:
        raise ValueError(
            f"{type(model).__name__} was optimized for inference, and so it cannot be trained, nor an adapter on it: "
            f"{RESTORE}"
        )
    return type(model).train(model, False)
