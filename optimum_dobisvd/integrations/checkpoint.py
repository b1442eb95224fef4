"""Checks of a compressed checkpoint's files against the modules they are for, from the headers alone."""

from __future__ import annotations

import difflib
import re
from typing import Any

from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..nn.low_rank_linear import LowRankLinear


def module_names_in(model: Any, names: list[str]) -> dict[str, str]:
    """Map module names of config.json to names in this model.

    They are the same, unless a headless model (`AutoModel`) reads a checkpoint of one with a head, or the reverse;
    then the base model's prefix comes off or on. ValueError names a module that is nowhere.
    """
    present = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    mapped = {}
    for name in names:
        candidates = (name, name.removeprefix(prefix), prefix + name)
        found = next((candidate for candidate in candidates if candidate in present), None)
        if found is None:
            near = difflib.get_close_matches(name, present, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            raise ValueError(
                f"config.json lists a compressed module {name}, which {type(model).__name__} does not have{hint}: the "
                "checkpoint belongs to another architecture, or its config.json was edited"
            )
        mapped[name] = found
    return mapped


def check_factors(model: Any, files: list[str]) -> None:
    """Every factor of every `LowRankLinear` is in the files, with its shape, and no factor is without a module.

    Raises:
        ValueError: names the tensor, what is wrong with it, and the remedy. Nothing has been allocated by then.
    """
    if any(not str(file).endswith(".safetensors") for file in files):
        raise ValueError(f"a dobi_svd checkpoint is stored in safetensors, found {files[0]}")
    shapes = _shapes_by_model_name(model, files)
    expected: dict[str, list[int]] = {}
    dense = set()
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            dense.add(f"{name}.weight")
            for key, parameter in module.named_parameters():
                expected[f"{name}.{key}"] = list(parameter.shape)
    for tensor, shape in expected.items():
        if tensor not in shapes:
            raise ValueError(
                f"the checkpoint lacks {tensor}, which config.json promises: it is incomplete, copy it again"
            )
        if shapes[tensor] != shape:
            raise ValueError(
                f"{tensor} has shape {shapes[tensor]} in the checkpoint and {shape} by config.json: one of the "
                "two belongs to another compression; copy both from the same one"
            )
    for tensor in shapes:
        if tensor in dense and 0 not in shapes[tensor]:
            raise ValueError(
                f"the checkpoint holds a dense {tensor} beside its factors: files of two models were mixed"
            )
        if tensor.endswith((".first.weight", ".second.weight", ".second.bias")) and tensor not in expected:
            owner = tensor.rsplit(".", 2)[0]
            if model_has(model, owner) and not model_has(model, tensor.rsplit(".", 1)[0]):
                raise ValueError(f"the checkpoint holds {tensor}, but config.json does not list {owner} as compressed")
    _check_nothing_else_is_missing(model, shapes)


def _check_nothing_else_is_missing(model: Any, shapes: dict[str, list[int]]) -> None:
    """Other weights must be there, too. Only a head may be untrained, where another class was saved than is loaded."""
    other_class = type(model).__name__ not in (model.config.architectures or ())
    head = [] if getattr(model, model.base_model_prefix, model) is model else [model.base_model_prefix + "."]
    tied = set(model.all_tied_weights_keys)
    optional = [
        re.compile(pattern)
        for pattern in [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    ]
    for name in model.state_dict():
        may_be_new = other_class and head and not name.startswith(head[0])
        if name not in shapes and name not in tied and not may_be_new:
            if any(pattern.search(name) for pattern in optional):
                continue
            raise ValueError(f"the checkpoint lacks {name}: it is incomplete, copy it again")


def model_has(model: Any, name: str) -> bool:
    """Whether the model has a submodule of that name."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _shapes_by_model_name(model: Any, files: list[str]) -> dict[str, list[int]]:
    """Shapes of all tensors in the files, under the names transformers will load them to."""
    # Private, all of it, but only transformers knows how this architecture's keys are renamed on load.
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    expected = model.state_dict()
    shapes = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
                shapes[name] = handle.get_slice(key).get_shape()
    return shapes
