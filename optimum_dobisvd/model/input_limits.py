"""How long a text a model can read, and which tokens: found on shapes alone, before a weight is read."""

from __future__ import annotations

import contextlib
import copy
import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # public, by PyTorch's page on extending it
from torch.utils._pytree import tree_leaves, tree_map_only

from .trial import token_embeddings

logger = logging.getLogger(__name__)

# Lookups in a table: the operation, and where among its arguments the dimension (None: the first) and the ids are.
_LOOKUPS: dict[Any, tuple[int | None, int]] = {
    torch.ops.aten.embedding.default: (None, 1),
    torch.ops.aten.gather.default: (1, 2),
    torch.ops.aten.index_select.default: (1, 2),
}
_READ_VALUES = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
_SHORT = 8  # tokens that any model can read
_LARGEST_IN_NUMBERS = 1 << 24
_OFFSETS = 8  # no table of positions has more rows in front that are not positions (OPT has 2, RoBERTa 2)


class _TooLong(Exception):
    """A position beyond a table."""


class _Unknown(Exception):
    """The passes cannot tell: the model takes one step a token."""


def token_limit(model: Any) -> int | None:
    """Return how many rows the input embedding has, the ids being below that; None where there is none to be found."""
    weight = getattr(token_embeddings(model), "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.dim() == 2 else None


def declared_positions(model: Any) -> int | None:
    """Return how many positions the configuration says the model was made for; None where it says nothing."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "block_size")
    found = (getattr(text, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def default_seqlen(model: Any, usual: int) -> int:
    """Return `usual`, or fewer where the model reads, or was made for, fewer positions."""
    declared = declared_positions(model)
    wanted = usual if declared is None else min(usual, declared)
    return position_limit(model, wanted) or wanted


def require_positions(model: Any, length: int, words: str) -> None:
    """Raise ValueError if the model cannot read windows of `length` tokens; `words` is what asks for them."""
    limit = position_limit(model, length)
    if limit is not None:
        raise ValueError(f"{words}, and {type(model).__name__} has {limit} positions: use {limit} or fewer")
    declared = declared_positions(model)
    if declared is not None and length > declared:
        logger.warning("%s, and %s was made for %d positions", words, type(model).__name__, declared)


def require_tokens(model: Any, largest: int, source: str) -> None:
    """Raise ValueError if the input embedding has no row for the token `largest`, which is in `source`."""
    limit = token_limit(model)
    if limit is not None and largest >= limit:
        raise ValueError(
            f"{source} has the token {largest}, and the embedding of {type(model).__name__} has {limit} rows: the "
            "tokenizer belongs to another model; pass the model's own"
        )


def position_limit(model: Any, length: int) -> int | None:
    """Return the longest window that the model can read; None where it can read `length` tokens.

    Not every model that declares a number of positions ends there: rotary ones compute beyond. So the model's own
    code is run, on a copy of which only shapes exist, token ids and positions being numbers; the lookup of a position
    that is not in a table fails, and so does a mask that is too small. Where the code cannot be run like that (it
    reads values of activations, or wants other inputs), nothing is known, and None is returned.
    """
    declared = declared_positions(model)
    if declared is not None and length + _OFFSETS <= declared:
        return None
    shapes = _meta_copy(model)
    if shapes is None:
        return None
    try:
        steps = _operations(shapes, _SHORT)
    except Exception:  # of any kind, by what the model's code does with tensors that have no values
        return None
    allowed = 4 * steps + 1000

    def fits(tokens: int) -> bool:
        try:
            _operations(shapes, tokens, allowed)
        except _Unknown:
            return True
        except Exception:  # a lookup beyond a table, or shapes that do not go together: the short window had none
            return False
        return True

    if length <= _SHORT or fits(length):
        return None
    low, high = _SHORT, length  # the first one fits, the last one does not
    if declared is not None and declared < high and fits(declared):
        low, high = (declared, declared + 1) if not fits(declared + 1) else (declared + 1, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _meta_copy(model: Any) -> Any:
    """Return the same architecture on meta; None where it cannot be made of the configuration alone."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    config = copy.deepcopy(config)
    with contextlib.suppress(AttributeError):
        del config.quantization_config
    try:
        with torch.device("meta"):
            # In bfloat16: grouped products of experts have no other shapes-only version.
            return type(model)(config).to(torch.bfloat16).eval()
    except Exception:  # the class may want more than its configuration
        return None


def _operations(model: Any, tokens: int, allowed: int | None = None) -> int:
    """Return how many operations one window of that many tokens takes; raises what the model raises on it."""
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with torch.no_grad(), _ShapesAndPositions(allowed) as mode:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return mode.operations


class _ShapesAndPositions(TorchDispatchMode):
    """Has whole numbers computed, and of everything else the shapes; a lookup beyond a table raises `_TooLong`."""

    def __init__(self, allowed: int | None) -> None:
        super().__init__()
        self.operations, self.allowed = 0, allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if self.allowed is not None and self.operations > self.allowed:
            raise _Unknown
        _check_lookup(func, args)
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        known = all(each.device.type != "meta" for each in tensors)
        if known and func in _READ_VALUES:
            return func(*args, **kwargs)
        meta = {**kwargs, "device": torch.device("meta")} if kwargs.get("device") is not None else kwargs
        shapes = func(*tree_map_only(Tensor, _to_meta, args), **tree_map_only(Tensor, _to_meta, meta))
        outputs = [each for each in tree_leaves(shapes) if isinstance(each, Tensor)]
        if not known or any(each.is_floating_point() or each.numel() > _LARGEST_IN_NUMBERS for each in outputs):
            return shapes
        return func(*args, **({**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs))


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "meta" else tensor.to("meta")


def _check_lookup(func: Any, args: Any) -> None:
    """Raise `_TooLong` if the operation looks up ids that its table does not have."""
    if func in _LOOKUPS:
        dimension, position = _LOOKUPS[func]
        lookups = [(0 if dimension is None else args[dimension], args[position])]
    elif func is torch.ops.aten.index.Tensor:
        lookups = [(at, ids) for at, ids in enumerate(args[1]) if ids is not None and ids.dtype != torch.bool]
    else:
        return
    for at, ids in lookups:
        if ids.device.type != "meta" and ids.numel() and int(ids.max()) >= args[0].shape[at]:
            raise _TooLong(f"id {int(ids.max())} in a table of {args[0].shape[at]}")
