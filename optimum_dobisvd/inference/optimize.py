"""Make a loaded compressed model faster to generate with, in place, and back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..encodings.base import Encoding
from ..encodings.registry import encoding_named
from ..model.linears import is_dense_linear
from ..model.patterns import select
from ..model.substitutions import (
    Substitutions,
    begin_substitutions,
    end_substitutions,
    has_substitutions,
)
from ..structures.base import CompressedLinear, compressed_linears, to_dense
from ..structures.format import AS_IS
from ..structures.pivoted import PivotedLinear
from .by_rows import ByRows
from .groups import shared_inputs
from .measured import faster_linear, fastest_structures, keep_measurements
from .shared_input import SharedInput, SharedInputPart
from .unfolded import UnfoldedLinear

logger = logging.getLogger(__name__)

MEASURED = "measured"
"""Run those matrices dense that are slower than dense ones where it is measured."""


@torch.no_grad()
def optimize_for_inference(
    model: Any,
    *,
    rows: int | Sequence[int] = 1,
    dense: str | Iterable[str] = MEASURED,
    compiled: bool = False,
    inputs: Mapping[str, Any] | None = None,
) -> Any:
    """Make a compressed model faster to generate with, in place. What it computes stays the same but for rounding.

    * Linears that read the same input (`q`, `k` and `v`; `gate` and `up`) are one product, of the first linears where
      they are factorized. Their weights become views of one tensor; nothing is held twice.
    * Matrices of the model's bits run in the form that is measured to be fastest: dense (held beside the stored one),
      pivoted ones on CPUs as two factors (`k^2` numbers more). With several `rows`, a matrix may be dense for some of
      them and factors for others.
    * Linears go through the kernel that is fastest on this machine where their encoding knows several; on a CPU, 4-bit
      GPTQ linears are packed once more for it, and float32 weights may be stored by columns. Where `pivoted` rows go
      is looked up once.

    `model.save_pretrained` writes what it would have written before; `convert`, `dequantize` and
    `restore_after_inference` bring the model back. `torch.compile` takes it as one graph, so that
    `generate(cache_implementation="static")` can be compiled. Until then it cannot be trained and takes no adapters.

    Args:
        model: compressed, in evaluation mode, where it is to run and in the dtype it is to run in.
        rows: of one product: the batch size in decoding, batch x tokens of a prompt in prefill. With several, what is
            fastest for each; other numbers of rows are computed as the nearest of them.
        dense: `measured`, or names or patterns (as in `overrides`) of the matrices to run dense, the others as they
            are stored, without a measurement; an empty list is none.
        compiled: whether it is to run compiled: by `torch.compile`, or in `generate` with a static cache.
        inputs: what to call the model with once, to see which linears read the same input; None is a few tokens.

    Returns:
        The model.

    Raises:
        ValueError: the model is not compressed, is in training mode, has been optimized before, has layers of PEFT or
            is offloaded, or cannot be called with a few tokens; a name matches nothing. Then nothing was changed.
    """
    compressed = compressed_linears(model)
    _refuse(model, compressed)
    counts = [rows] if isinstance(rows, int) else list(rows)
    if not counts or not all(isinstance(count, int) and count > 0 for count in counts):
        raise ValueError(f"rows={rows!r}: give a number above 0 (the batch size in decoding), or several")
    linears = compressed | {name: each for name, each in model.named_modules() if is_dense_linear(each)}
    inner = {f"{name}.{child}" for name, module in compressed.items() for child, _ in module.named_children()}
    outer = {name: module for name, module in linears.items() if name not in inner}
    groups = shared_inputs(model, outer, inputs)
    structures = _fastest(compressed, groups, counts, dense, compiled)
    record = begin_substitutions(model)
    for name, of_rows in structures.items():
        record.put(model, name, _in_structures(compressed[name], of_rows))
    running = compressed_linears(model)
    for module in running.values():
        module.set_inference(True)
    for paths, rows_of_these in _linears_by_input(model, running, groups, counts):
        _put_faster(model, record, paths, rows_of_these, compiled)
    keep_measurements()
    _tell_kernels(model, running)
    return model


def restore_after_inference(model: Any) -> Any:
    """Undo `optimize_for_inference`, in place: the model can be trained again. Returns the model."""
    shared = [module for module in model.modules() if isinstance(module, SharedInput)]
    end_substitutions(model)
    for each in shared:
        each.release()
    for module in compressed_linears(model).values():
        module.set_inference(False)
    return model


def _refuse(model: Any, compressed: Mapping[str, CompressedLinear]) -> None:
    """ValueError for a model that cannot be optimized, with what to do."""
    what = type(model).__name__
    if has_substitutions(model):
        raise ValueError(
            f"{what} has been optimized for inference: to do it otherwise, call restore_after_inference(model) first"
        )
    if not compressed:
        raise ValueError(
            f"{what} is not compressed: pass what from_pretrained loads of a compressed checkpoint, or what "
            "quantize_model of a DobiSVDQuantizer returns"
        )
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f"{what} is" if not training else f"{training} of {what} is"
        raise ValueError(
            f"{where} in training mode, and an optimized model cannot be trained: call model.eval() first"
        )
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") or hasattr(module, "original_module"):
            raise ValueError(
                f"{name} is a layer of PEFT, whose adapter would have to be joined, too: optimize what "
                "merge_and_unload() or unload() of the PeftModel returns"
            )
    for name, module in compressed.items():
        if any(tensor.device.type == "meta" for tensor in module.parameters()):
            raise ValueError(
                f"{name} is offloaded, and weights that are fetched for every product cannot be joined: load the "
                "model without cpu or disk offload, or leave it as it is"
            )


def _fastest(
    matrices: Mapping[str, CompressedLinear],
    groups: Sequence[Sequence[str]],
    rows: Sequence[int],
    dense: str | Iterable[str],
    compiled: bool,
) -> dict[str, dict[int, str]]:
    """Structures by the number of rows, of the matrices that are to run in another than their own, by name."""
    if dense != MEASURED:
        if isinstance(dense, str):
            raise ValueError(f"dense={dense!r}: give {MEASURED!r}, or a list of names, [{dense!r}]")
        wanted = select(dense, matrices)
        return {name: dict.fromkeys(rows, "dense") for name in matrices if name in wanted}
    free = {
        name: module
        for name, module in matrices.items()
        if encoding_named(module.encoding).trainable and not _has_hooks(module)
    }
    grouped = {name: group[0] for group in groups for name in group}
    together: dict[str, list[str]] = {}
    for name in free:
        together.setdefault(grouped.get(name, name), []).append(name)
    found: dict[str, dict[int, str]] = {}
    for names in together.values():
        structures = fastest_structures([free[name] for name in names], rows, compiled)
        for index, name in enumerate(names):
            of_rows = {count: each[index] for count, each in structures.items()}
            if {*of_rows.values()} != {free[name].structure}:
                found[name] = of_rows
    alike: dict[str, list[str]] = {}
    for name, of_rows in found.items():
        alike.setdefault(_in_words(of_rows), []).append(name)
    for what, some in alike.items():
        logger.info("%d of %d matrices run %s, which is faster: %s", len(some), len(matrices), what, some)
    return found


def _in_words(structures: Mapping[int, str]) -> str:
    """In which structures a matrix runs: `dense for 1, 4 rows, low_rank for 512 rows`."""
    if len({*structures.values()}) == 1:
        return next(iter(structures.values()))
    return ", ".join(
        f"{structure} for {', '.join(str(count) for count, each in structures.items() if each == structure)} rows"
        for structure in sorted({*structures.values()})
    )


def _has_hooks(module: nn.Module) -> bool:
    """Whether it has hooks of a user or of Accelerate, which are not called if another module stands in for it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def _in_structures(module: CompressedLinear, structures: Mapping[int, str]) -> nn.Module:
    """Return what stands in for a matrix that runs in these structures."""
    # In the order of their names: an unfolded matrix takes the values that a dense one is made of.
    made = {structure: _in_structure(module, structure) for structure in sorted({*structures.values()})}
    if len(made) == 1:
        return next(iter(made.values()))
    dense = made.pop("dense")
    runs_dense = {count: structure == "dense" for count, structure in structures.items()}
    return ByRows(next(iter(made.values())), dense, runs_dense).eval()


def _in_structure(module: CompressedLinear, structure: str) -> nn.Module:
    if structure == module.structure:
        return module
    if structure == "low_rank":
        assert isinstance(module, PivotedLinear)
        return UnfoldedLinear(module)
    return to_dense(module).eval()


def _linears_by_input(
    model: Any, compressed: Mapping[str, CompressedLinear], groups: Sequence[Sequence[str]], rows: Sequence[int]
) -> list[tuple[dict[str, Encoding], Sequence[int]]]:
    """Linears that read the same input, each by itself where no other does, with their encodings; and their rows."""
    encodings: dict[str, Encoding] = {}
    for name, module in compressed.items():
        encoding = encoding_named(module.encoding)
        encodings |= {f"{name}.{child}": encoding for child, _ in module.named_children()}
    found = []
    for group in groups:
        together: dict[str, dict[str, Encoding]] = {form: {} for form in ("", "factors", "dense")}
        for name in group:
            by_rows = isinstance(model.get_submodule(name), ByRows)
            for form in ("factors", "dense") if by_rows else ("",):
                path = _path_of_input(model, f"{name}.{form}" if form else name)
                together[form][path] = encodings.pop(path, AS_IS.encoding)
        found += [paths for paths in together.values() if paths]
    found += [{path: encoding} for path, encoding in encodings.items()]
    return [(paths, _rows_of(model, next(iter(paths)), rows)) for paths in found]


def _rows_of(model: Any, path: str, rows: Sequence[int]) -> Sequence[int]:
    """Those numbers of rows of which a linear computes products: all, but in a matrix that has two forms."""
    parts = path.split(".")
    for index, form in enumerate(parts):
        module = model.get_submodule(".".join(parts[:index]))
        if isinstance(module, ByRows):
            return [count for count in rows if module.form(count) == form]
    return rows


def _path_of_input(model: Any, name: str) -> str:
    """The name of the linear of a matrix that reads its input: itself, where it is one."""
    module = model.get_submodule(name)
    return f"{name}.{module.input_linear}" if isinstance(module, CompressedLinear) else name


def _put_faster(
    model: Any, record: Substitutions, paths: Mapping[str, Encoding], rows: Sequence[int], compiled: bool
) -> None:
    """Put what is faster in the place of linears with the same input: of those alike together, or of each alone."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for path, encoding in paths.items():
        linear = model.get_submodule(path)
        tensor = next(iter((*linear.parameters(), *linear.buffers())), None)
        if tensor is None or _has_hooks(linear):
            continue
        alike.setdefault((encoding.name, linear.in_features, tensor.device, tensor.dtype), []).append(path)
    for together in alike.values():
        encoding = paths[together[0]]
        if not _put_one(model, record, together, encoding, rows, compiled) and len(together) > 1:
            for path in together:
                _put_one(model, record, [path], encoding, rows, compiled)


def _put_one(
    model: Any, record: Substitutions, paths: Sequence[str], encoding: Encoding, rows: Sequence[int], compiled: bool
) -> bool:
    """Put one module in the places of all these linears, if there is a faster one; return whether there is."""
    linears = [model.get_submodule(path) for path in paths]
    faster = encoding.for_inference(linears, model.dtype)
    if faster is not None or len(linears) == 1:
        alone = linears[0] if faster is None else faster
        faster = faster_linear(alone, encoding, rows, _places(model, paths), compiled) or faster
    if faster is None:
        return False
    faster.eval()
    if len(linears) == 1:
        record.put(model, paths[0], faster)
        return True
    shared = SharedInput(faster, linears).eval()
    for index, (path, linear) in enumerate(zip(paths, linears, strict=True)):
        record.put(model, path, SharedInputPart(linear, shared, index))
    return True


def _places(model: Any, paths: Sequence[str]) -> torch.Tensor | None:
    """Where inputs and outputs of a single linear go together (see `CompressedLinear.output_places`)."""
    parent, _, child = paths[0].rpartition(".")
    module = model.get_submodule(parent)
    return module.output_places(child) if len(paths) == 1 and isinstance(module, CompressedLinear) else None


def _tell_kernels(model: Any, compressed: Mapping[str, CompressedLinear]) -> None:
    """Say how many linears of each encoding run in what."""
    found: Counter[str] = Counter()
    for module in compressed.values():
        for child, _ in module.named_children():
            running = module.get_submodule(child)
            running = running.runs if isinstance(running, SharedInputPart) else running
            found[f"{module.encoding} in {getattr(running, 'runs_in', type(running).__name__)}"] += 1
    logger.info("linears: %s", ", ".join(f"{count} {what}" for what, count in found.items()) or "all dense")
