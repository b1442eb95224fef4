"""What a block computes with unrounded while its codes are learned: norms, biases, linears in 16 bits."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn


class RestOfBlocks:
    """A context in which it is trained, block by block; an error inside puts the values before back.

    What is frozen stays as it is, and what something outside its block has, too.

    Args:
        model: compressed, its linears not rounded yet, its gradients as the user left them.

    Raises:
        ValueError: all of the model is frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                self._places.setdefault(id(parameter), []).append(name)
        if not self._places:
            raise ValueError(
                f"rest_learning_rate trains what is not rounded, and every parameter of {type(model).__name__} is "
                "frozen: call model.requires_grad_(True), or leave it out"
            )
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        self._training: list[nn.Parameter] = []

    def of(self, name: str, block: nn.Module) -> list[nn.Parameter]:
        """Return the parameters of a block that are to be trained; their gradients are on until the next block's."""
        for parameter in self._training:
            parameter.requires_grad_(False)
        self._training = [each for each in block.parameters() if self._is_of(name, each)]
        for parameter in self._training:
            self._before.append((parameter, parameter.detach().clone()))
            parameter.requires_grad_(True)
        return self._training

    def _is_of(self, block: str, parameter: nn.Parameter) -> bool:
        places = self._places.get(id(parameter))
        return places is not None and all(place.startswith(f"{block}.") for place in places)

    def __enter__(self) -> RestOfBlocks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            with torch.no_grad():
                for parameter, value in self._before:
                    parameter.copy_(value)
