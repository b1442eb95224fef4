"""Checks of a compressed checkpoint's files against the modules they are for, from the headers alone."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..encodings.base import Encoding
from ..model.experts import linearized_experts
from ..model.linears import is_dense_linear
from ..structures.base import CompressedLinear, compressed_linears, matrix_shape
from ..structures.format import Format


def module_names_in(model: Any, names: list[str]) -> dict[str, str]:
    """Map module names of config.json to names in this model.

    They are the same, unless a headless model (`AutoModel`) reads a checkpoint of one with a head, or the reverse;
    then the base model's prefix comes off or on. ValueError names a module that is nowhere.
    """
    present = dict(model.named_modules())
    mapped = {}
    for name, found in _present_names(model, names, present).items():
        if found is None:
            near = difflib.get_close_matches(name, present, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            raise ValueError(
                f"config.json lists a compressed module {name}, which {type(model).__name__} does not have{hint}: the "
                "checkpoint belongs to another architecture, or its config.json was edited"
            )
        mapped[name] = found
    return mapped


def lacks_modules(model: Any, names: list[str]) -> bool:
    """Whether one of these names of config.json is nowhere in the model."""
    return None in _present_names(model, names, dict(model.named_modules())).values()


def _present_names(model: Any, names: list[str], present: Mapping[str, Any]) -> dict[str, str | None]:
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    candidates = {name: (name, name.removeprefix(prefix), prefix + name) for name in names}
    return {name: next((each for each in tried if each in present), None) for name, tried in candidates.items()}


def check_tensors(model: Any, files: list[str], encodings: Mapping[str, Encoding]) -> None:
    """Check that every tensor of every compressed linear is in the files, and none is there without a module.

    Shapes and dtypes are read from the headers. Scales of integers are read, and must be above
    zero and finite; indices are read, too.

    Raises:
        ValueError: names the tensor, what is wrong with it, and the remedy. No weight has been allocated by then.
    """
    if any(not str(file).endswith(".safetensors") for file in files):
        raise ValueError(f"a dobi_svd checkpoint is stored in safetensors, found {files[0]}")
    compressed = compressed_linears(model)
    expected: dict[str, tuple[list[int], str | None]] = {}
    read: dict[str, Callable[[Tensor], str | None]] = {}
    for name, module in compressed.items():
        format = Format(type(module), encodings[module.encoding])
        tensors = format.tensors(*matrix_shape(module), module.rank, bias=module.bias is not None)
        expected |= {f"{name}.{key}": header for key, header in tensors.items()}
        read |= {
            f"{name}.{key}": _problem_with_scale for key in tensors if key.rpartition(".")[2] in format.encoding.scales
        }
        own = module.own_tensors(*matrix_shape(module), module.rank)
        read |= {f"{name}.{key}": functools.partial(module.problem_with, key) for key in own}
    found = _headers_by_model_name(model, files, expected, read)
    for tensor, (shape, dtype) in expected.items():
        _check_tensor(tensor, shape, dtype, found.get(tensor))
    for tensor, (shape, _) in found.items():
        owner, _, key = tensor.rpartition(".")
        if owner in compressed and key == "weight" and 0 not in shape:
            raise ValueError(
                f"the checkpoint holds a dense {tensor} beside its factors: files of two models were mixed"
            )
        _check_is_listed(model, tensor, expected, encodings)
    _check_nothing_else_is_missing(model, {tensor: shape for tensor, (shape, _) in found.items()})


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


def _check_is_listed(model: Any, tensor: str, expected: Collection[str], encodings: Mapping[str, Encoding]) -> None:
    """Refuse a tensor inside a linear that is not compressed, or not so."""
    if tensor in expected:
        return
    parts = tensor.split(".")
    module = model
    for end in range(1, len(parts)):  # a wrapper before the linears in it: it is what config.json lists
        owner, inside = ".".join(parts[:end]), parts[end:]
        module = getattr(module, parts[end - 1], None)
        if not isinstance(module, torch.nn.Module):
            return
        if isinstance(module, CompressedLinear):
            more = encodings[module.encoding].has_more_tensors and inside[0] in dict(module.named_children())
            strange = inside != ["weight"] and not more
        else:
            strange = is_dense_linear(module) and inside not in (["weight"], ["bias"])
        if strange:
            raise ValueError(
                f"the checkpoint holds {tensor}, but config.json does not list {owner} as compressed that way"
            )


def _check_nothing_else_is_missing(model: Any, shapes: dict[str, list[int]]) -> None:
    """Other weights must be there, too. Only a head may be untrained, where another class was saved than is loaded."""
    other_class = type(model).__name__ not in (model.config.architectures or ())
    head = [] if getattr(model, model.base_model_prefix, model) is model else [model.base_model_prefix + "."]
    optional = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    for name in model.state_dict():
        may_be_new = other_class and head and not name.startswith(head[0])
        known = name in shapes or name in model.all_tied_weights_keys or may_be_new
        if not known and not any(re.search(pattern, name) for pattern in optional):
            raise ValueError(f"the checkpoint lacks {name}: it is incomplete, copy it again")


def _problem_with_scale(scale: Tensor) -> str | None:
    if bool((torch.isfinite(scale) & (scale > 0)).all()):
        return None
    return "holds a scale that is zero, negative or not finite"


def applicable(conversions: list, model: Any) -> list:
    """Return transformers' weight conversions but those that would stack the weights of linearized experts on load."""
    # Private, as are the patterns of conversions: there is no other way to have the experts of one model as linears.
    stacked = [
        f"{name}.{parameter}" for name, each in linearized_experts(model).items() for parameter in each.stacked_names
    ]
    targets = [
        (entry, "|".join(entry.target_patterns).replace(r"\1", ".*"))
        for entry in conversions
        if isinstance(entry, WeightConverter)
    ]
    unwanted = {id(entry) for entry, target in targets if any(re.search(target, name) for name in stacked)}
    return [entry for entry in conversions if id(entry) not in unwanted]


def with_all_conversions(model: Any) -> None:
    """Have a model with stacked experts again be saved as the dense one, conversions that were left out included."""
    used = getattr(model, "_weight_conversions", None)
    if used is not None:  # else transformers takes them all
        known = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [*used, *(each for each in known if isinstance(each, WeightConverter))]


def renamed_for(model: Any) -> Callable[[str], str]:
    """Return what tells the name in the model of a tensor by its name in the files."""
    # Private, all of it, but only transformers knows how this architecture's keys are renamed on load.
    conversions = applicable(get_model_conversion_mapping(model), model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    present = model.state_dict()
    return lambda key: rename_source_key(key, renamings, converters, model.base_model_prefix, present)[0]


def _headers_by_model_name(
    model: Any,
    files: list[str],
    expected: Mapping[str, tuple[list[int], str | None]],
    read: Mapping[str, Callable[[Tensor], str | None]],
) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of all tensors in the files, under the names transformers will load them to.

    Those in `read` are read, too: their function says what is wrong with the values. ValueError if anything is, or one
    of them is not as `expected`.
    """
    model_name = renamed_for(model)
    found: dict[str, tuple[list[int], str]] = {}
    for file in files:
        # Older releases of transformers call this under torch.device("meta"); these are read for their values.
        with torch.device("cpu"), safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                name = model_name(key)
                header = handle.get_slice(key)
                found[name] = (header.get_shape(), header.get_dtype())
                if name not in read:
                    continue
                # First: what is wrong with the values of a tensor of another size says nothing of the size.
                _check_tensor(name, *expected[name], found[name])
                problem = read[name](handle.get_tensor(key))
                if problem is not None:
                    raise ValueError(
                        f"{name} in {file} {problem}: the checkpoint is damaged; copy it again, or compress again"
                    )
    return found
