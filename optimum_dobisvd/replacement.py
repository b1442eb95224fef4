"""Putting compressed matrices in the place of a model's linears, with a way back."""

from __future__ import annotations

from collections.abc import Mapping
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
from .nn.placement import dense_weight, replace_with
from .storage import pack, pack_dense, unpack
from .storage.inner_forms import inner_form_named


class Replacement:
    """A context in which linears are replaced one by one; an error inside puts them all back.

    `errors` has the relative output error `||(W - W')X|| / ||WX||` of each, measured on the factors as they are stored
    (rounded as their storage rounds them), or None where there is no Gram to measure it with, and where another
    library rounds them later.

    Args:
        model: the model.
        layout: its linears; replaced ones are dropped from it if there is no way back.
        storages: by name, the storage of each linear that will be replaced.
        device: where errors are computed.
        undo_on_error: keep the dense linears until the end, so that there is a way back.
    """

    def __init__(
        self, model: Any, layout: Layout, storages: Mapping[str, str], device: torch.device, undo_on_error: bool
    ) -> None:
        self.errors: dict[str, float | None] = {}
        self._model = model
        self._layout = layout
        self._device = device
        self._undo_on_error = undo_on_error
        self._replaced: dict[str, Module] = {}
        self._storages = storages
        self._progress = tqdm(total=len(storages), desc="factorizing", unit="matrix")

    def put(self, name: str, factors: Factors, gram: Tensor | None) -> None:
        """Balance the factors, pack them, measure their error, and put them in the place of the linear `name`."""
        storage, weight = self._storages[name], weight_matrix(self._layout.linears[name])
        balanced = factors.balanced()
        if inner_form_named(storage) is not None:
            balanced = balanced.mixed()
        tensors = pack(storage, balanced.second, balanced.first, weight.dtype)
        rank = len(factors.first)
        stored = None
        if gram is not None and inner_form_named(storage) is None:
            second, first = unpack(storage, tensors, *weight.shape)
            stored = second.double() @ first.double()
        self._put(name, storage, rank, tensors, stored, gram)

    def put_rounded(self, name: str, gram: Tensor | None) -> None:
        """Round the whole matrix of the linear `name`, measure the error, and put it in its place."""
        storage, linear = self._storages[name], self._layout.linears[name]
        weight = dense_weight(linear)
        tensors, rounded = pack_dense(storage, weight.to(self._device), weight.dtype)
        stored = rounded if inner_form_named(storage) is None else None
        self._put(name, storage, None, tensors, stored, gram)

    def _put(
        self,
        name: str,
        storage: str,
        rank: int | None,
        tensors: dict[str, Tensor],
        stored: Tensor | None,
        gram: Tensor | None,
    ) -> None:
        linear = self._layout.linears[name]
        self.errors[name] = None
        if gram is not None and stored is not None:
            lost, total = output_error(dense_weight(linear).to(self._device), stored, gram)
            self.errors[name] = lost / total if total else 0.0
        replace_with(self._model, name, storage, rank, tensors)
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
