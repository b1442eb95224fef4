"""Which modules of a compressed model PEFT can put adapters on."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..encodings.registry import encoding_named
from ..model.linears import is_dense_linear
from ..structures.base import CompressedLinear, compressed_linears

logger = logging.getLogger(__name__)


def adapter_targets(model: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """Return full names for `target_modules` of a `LoraConfig`: what compressed linears are made of, and dense ones.

    `target_modules=["q_proj"]` would fail at the first `q_proj` that is low-rank, and `["first", "second"]` leave out
    those that compression kept dense; `"all-linear"` does not find those that GPTQ quantized. Linears in our own
    8 bits take no adapter; they are left out with a warning. PEFT merges no adapter into GPTQ's linears, of which a
    warning tells, too: before the training, and not after it.

    Args:
        model: a compressed model, no adapters in it yet.
        names: linears by their names in the dense model, whole or the end of it (`"q_proj"`, `"mlp.up_proj"`); None
            takes all but the output embedding, as PEFT's `"all-linear"` does.

    Raises:
        ValueError: a name matches no linear, or only ones in 8 bits; there is nothing to put an adapter on.
    """
    if isinstance(names, str):
        raise TypeError(f"names is a list of names, got the string {names!r}: pass [{names!r}]")
    linears = _linears(model)
    encodings = [encoding_named(each.encoding) for each in linears.values() if isinstance(each, CompressedLinear)]
    unmerged = {encoding.name for encoding in encodings if not encoding.merges_adapters}
    if unmerged:
        logger.warning(
            "adapters beside linears in %s stay there, merge_and_unload is refused: to have one checkpoint, train "
            "and merge before quantizing",
            ", ".join(sorted(unmerged)),
        )
    if names is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return _targets({name: module for name, module in linears.items() if module is not head}, "the model")
    found: dict[str, None] = {}
    for wanted in names:
        matching = {name: module for name, module in linears.items() if name == wanted or name.endswith(f".{wanted}")}
        if not matching:
            near = difflib.get_close_matches(wanted, {name.rpartition(".")[2] for name in linears}, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            raise ValueError(f"{type(model).__name__} has no linear called {wanted}{hint}")
        found.update(dict.fromkeys(_targets(matching, wanted)))
    return list(found)


def _linears(model: nn.Module) -> dict[str, Any]:
    """Compressed and dense linears by name; what compressed ones are made of is not among them."""
    parts = {id(child) for module in compressed_linears(model).values() for child in module.children()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear) or (is_dense_linear(module) and id(module) not in parts)
    }


def _targets(linears: dict[str, Any], what: str) -> list[str]:
    """Names of the modules of these linears that take an adapter; ValueError if there are none, in `what`."""
    found, refusals = [], []
    for name, module in linears.items():
        if not isinstance(module, CompressedLinear):
            found.append(name)
            continue
        refusal = encoding_named(module.encoding).adapter_refusal
        if refusal is None:
            found += [f"{name}.{child}" for child, _ in module.named_children()]
        else:
            refusals.append(refusal)
    if not found:
        raise ValueError(
            f"{what}: all {len(refusals)} linears are stored in 8 bits, which take no adapter: call "
            "optimum_dobisvd.convert(model) first, and convert(model, 'int8') on the merged model"
        )
    if refusals:
        logger.warning("%s: %d of %d linears are in 8 bits and get no adapter", what, len(refusals), len(linears))
    return found
