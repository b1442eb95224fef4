"""Which rows of a linear's input or output belong to which tokens, in whatever order a model keeps its dimensions.

A model may keep tokens as `batch x seqlen`, as `seqlen x batch`, as one list, or in several streams or heads. From the
shape of a batch's activations alone that cannot always be told; from those of a single window it can. So where the
order of the tokens matters, windows are run one at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.experts import RoutedRows


def token_places(shape: torch.Size, mask: Tensor) -> Tensor | None:
    """Return the row numbers of every token in activations that are flattened to `rows x features`.

    `shape` is that of the activations without the features, `mask` (`batch x seqlen`) that of the tokens. The result
    is `(batch * seqlen) x others`, with several rows a token where there are several streams or heads. None where
    rows cannot be told apart: of a batch in another order, or where two dimensions are as long as the window.
    """
    windows, length = mask.shape
    rows = torch.arange(shape.numel()).reshape(shape)
    if windows == 1:
        fitting = [axis for axis, size in enumerate(shape) if size == length]
        return rows.movedim(fitting[0], 0).reshape(length, -1) if len(fitting) == 1 else None
    return rows.reshape(-1, 1) if shape == mask.shape and windows != length else None


def token_rows(name: str, activations: Tensor, mask: Tensor | None, routed: RoutedRows | None = None) -> Tensor:
    """Return the rows of a linear's input or output (`... x features`) that are no padding, `rows x features`.

    `mask` (`batch x seqlen`) is True for those; None is all. `routed` says which tokens the rows are, where they are
    not all of them in order. ValueError, naming the linear, if there is padding and the rows cannot be told apart.
    """
    flat = activations.reshape(-1, activations.shape[-1])
    if routed is not None and mask is not None and routed.total == mask.numel():
        return flat[mask.reshape(-1).to(flat.device)[routed.tokens]]
    rows = text_rows(name, activations.shape[:-1], mask)
    return flat if rows is None else flat[rows.to(flat.device)]


def text_rows(name: str, shape: torch.Size, mask: Tensor | None) -> Tensor | None:
    """Return the numbers of the rows that `token_rows` gives; None is all of them, in whatever order they are."""
    if mask is None or bool(mask.all()):
        return None
    places = token_places(shape, mask)
    if places is None:
        rows = f"{shape.numel()} rows ({' x '.join(map(str, shape))})"
        raise ValueError(
            f"{name} is given {rows} where the window has {mask.numel()} tokens, so padding cannot be told from text; "
            "calibrate on windows without padding, or list it in modules_to_not_convert"
        )
    return places[mask.reshape(-1).cpu()].flatten()
