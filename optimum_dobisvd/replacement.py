"""Putting factors in the place of a model's linears, with a way back."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from tqdm.auto import tqdm

from .calibration.layout import Layout
from .factorization.errors import output_error
from .factorization.factors import Factors
from .nn.dense_linear import weight_matrix
from .nn.placement import dense_weight, replace_with_factors


class Replacement:
    """A context in which linears are replaced one by one; an error inside puts them all back.

    `errors` has the relative output error `||(W - W')X|| / ||WX||` of each, measured on the factors as they are stored
    (rounded to the weight's dtype), or None where there is no Gram to measure it with.

    Args:
        model: the model.
        layout: its linears; replaced ones are dropped from it if there is no way back.
        count: how many will be replaced, for the progress bar.
        device: where errors are computed.
        undo_on_error: keep the dense linears until the end, so that there is a way back.
    """

    def __init__(self, model: Any, layout: Layout, count: int, device: torch.device, undo_on_error: bool) -> None:
        self.errors: dict[str, float | None] = {}
        self._model = model
        self._layout = layout
        self._device = device
        self._undo_on_error = undo_on_error
        self._replaced: dict[str, Module] = {}
        self._progress = tqdm(total=count, desc="factorising", unit="matrix")

    def put(self, name: str, factors: Factors, gram: Tensor | None) -> None:
        """Balance the factors, round them, measure their error, and put them in the place of the linear `name`."""
        linear = self._layout.linears[name]
        dtype = weight_matrix(linear).dtype
        balanced = factors.balanced()
        stored = Factors(balanced.second.to(dtype), balanced.first.to(dtype))
        self.errors[name] = None
        if gram is not None:
            lost, total = output_error(dense_weight(linear).to(self._device), stored, gram)
            self.errors[name] = lost / total if total else 0.0
        replace_with_factors(self._model, name, stored)
        if self._undo_on_error:
            self._replaced[name] = linear
        else:
            del self._layout.linears[name]
        self._progress.update()

    def __enter__(self) -> Replacement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.close()
        if kind is not None:
            for name, linear in self._replaced.items():
                self._model.set_submodule(name, linear)
