"""Checks of a compressed checkpoint's files against the modules they are for, from the headers alone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..nn.compressed_linear import CompressedLinear
from ..nn.eight_bit_linear import EightBitLinear
from .bnb_linear import bnb_tensors, is_bnb_form

_WHOLE_DTYPES = {torch.int8: "I8", torch.int16: "I16", torch.int32: "I32"}


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
    """Every tensor of every compressed linear is in the files, with its shape and dtype, and none is without a module.

    Scales of 8-bit tensors are read, and must be above zero and finite.

    Raises:
        ValueError: names the tensor, what is wrong with it, and the remedy. No weight has been allocated by then.
    """
    if any(not str(file).endswith(".safetensors") for file in files):
        raise ValueError(f"a dobi_svd checkpoint is stored in safetensors, found {files[0]}")
    eight_bit = [(name, module) for name, module in model.named_modules() if isinstance(module, EightBitLinear)]
    scales = {f"{name}.{key}" for name, module in eight_bit for key in module.tensors() if key.endswith("scale")}
    found = _headers_by_model_name(model, files, scales)
    shapes = {tensor: shape for tensor, (shape, _) in found.items()}
    expected: dict[str, tuple[list[int], str | None]] = {}
    dense = set()
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            dense.add(f"{name}.weight")
            expected |= _tensors_of(name, module)
    for tensor, (shape, dtype) in expected.items():
        _check_tensor(tensor, shape, dtype, found.get(tensor))
    for tensor in shapes:
        if tensor in dense and 0 not in shapes[tensor]:
            raise ValueError(
                f"the checkpoint holds a dense {tensor} beside its factors: files of two models were mixed"
            )
        _check_is_listed(model, tensor, expected)
    _check_nothing_else_is_missing(model, shapes)


def _tensors_of(name: str, module: CompressedLinear) -> dict[str, tuple[list[int], str | None]]:
    """Shape of every tensor a module loads, and its dtype where loading must not change it."""
    expected = {
        f"{name}.{key}": (list(parameter.shape), _WHOLE_DTYPES.get(parameter.dtype))
        for key, parameter in module.named_parameters()
    }
    if is_bnb_form(module.storage):
        for child, linear in module.named_children():
            shape = (int(linear.out_features), int(linear.in_features))  # type: ignore[arg-type]
            expected |= bnb_tensors(module.storage, f"{name}.{child}", *shape)
    return expected


def _check_tensor(tensor: str, shape: list[int], dtype: str | None, found: tuple[list[int], str] | None) -> None:
    """It is there, of that shape, and of that dtype if one is given (loading casts floats; integers it must not)."""
    if found is None:
        raise ValueError(f"the checkpoint lacks {tensor}, which config.json promises: it is incomplete, copy it again")
    if found[0] != shape:
        raise ValueError(
            f"{tensor} has shape {found[0]} in the checkpoint and {shape} by config.json: one of the "
            "two belongs to another compression; copy both from the same one"
        )
    if dtype is not None and found[1] != dtype:
        raise ValueError(
            f"{tensor} is stored as {found[1]} and must be {dtype}: another program has rewritten the checkpoint; "
            "copy the original again"
        )


def _check_is_listed(model: Any, tensor: str, expected: Collection[str]) -> None:
    """A tensor that only a compressed linear can have belongs to one."""
    if tensor in expected:
        return
    if tensor.endswith((".first.weight", ".second.weight", ".second.bias", ".whole.weight", ".qweight")):
        owner = tensor.rsplit(".", 2)[0]
        strange = not model_has(model, tensor.rsplit(".", 1)[0])
    elif tensor.endswith((".first", ".second", ".packed", ".rest", ".quantized", ".scale", ".row_scale")):
        owner, _, key = tensor.rpartition(".")
        strange = model_has(model, owner) and not hasattr(model.get_submodule(owner), key)
    else:
        return
    if strange and model_has(model, owner):
        raise ValueError(
            f"the checkpoint holds {tensor}, but config.json does not list {owner} as compressed that way"
        )


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


def _headers_by_model_name(model: Any, files: list[str], scales: Collection[str]) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of all tensors in the files, under the names transformers will load them to.

    Those named in `scales` are read, too. ValueError names one that has a value that is not finite and above zero.
    """
    # Private, all of it, but only transformers knows how this architecture's keys are renamed on load.
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    expected = model.state_dict()
    found = {}
    for file in files:
        # Older releases of transformers call this under torch.device("meta"); scales are read for their values.
        with torch.device("cpu"), safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
                header = handle.get_slice(key)
                found[name] = (header.get_shape(), header.get_dtype())
                if name in scales:
                    scale = handle.get_tensor(key)
                    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
                        raise ValueError(
                            f"{name} in {file} holds a scale that is zero, negative or not finite: the checkpoint is "
                            "damaged; copy it again, or compress again"
                        )
    return found
