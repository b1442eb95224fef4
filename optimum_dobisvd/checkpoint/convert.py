"""Another encoding or structure for the matrices of a compressed model: 16 bits to train in, 8 or 4 to ship."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..allocation.plan import PlannedModule
from ..calibration.dataset import CalibrationWindows
from ..calibration.paired import PairedRunner
from ..config import DobiSVDConfig
from ..encodings.base import QUANT_METHOD, Encoding
from ..encodings.registry import encoding_named, encoding_of, rounded
from ..factorization.factors import Factors
from ..inference.optimize import restore_after_inference
from ..model.layout import find_blocks, find_layout
from ..model.offloaded import dense_weight
from ..model.patterns import matching_names, resolve_overrides
from ..pipeline.learn_rounding import check_runnable
from ..pipeline.quantize import quantize
from ..pipeline.validate import check_coverage, refuse_offloaded
from ..structures.base import CompressedLinear, compressed_linears, matrix_shape, to_dense
from ..structures.format import AS_IS, Format
from ..structures.placement import replace_linear
from ..structures.registry import STRUCTURES
from .hf_quantizer import attach, forget_compression


def convert(
    model: Any,
    quantization: Any = None,
    *,
    structure: str | None = None,
    windows: CalibrationWindows | None = None,
    rounding: str | None = None,
    rounding_settings: Mapping[str, Any] | None = None,
) -> Any:
    """Store the matrices of a loaded model in another encoding or structure, in place; its config says so afterwards.

    Ranks stay, but for those that the encoding cannot take: they are filled up with zeros, which changes nothing the
    model computes. What would then be as large as the matrix is taken whole. Matrices that are not
    factorized go with the factors where the encoding is for them (`int8`, GPTQ, bitsandbytes), and are dense
    otherwise. What cannot have the encoding at all is warned of and left as it is.

    Args:
        model: compressed, in memory.
        quantization: as in `DobiSVDConfig`; None is the model's own dtype, to train in.
        structure: of all factorized matrices (`low_rank`, `pivoted`, or `dense`, which keeps no factors); None leaves
            each its own.
        windows: calibration windows for encodings that round on text; GPTQ needs some.
        rounding, rounding_settings: as in `DobiSVDConfig`. Codes are learned towards the model as it is.

    Raises:
        ImportError: a library is missing; names the extra.
        ValueError: an unknown structure or rounding, or one that the encoding does not go with; the model is not
            compressed, has nothing to store so, matrices that another library quantized or that are offloaded, or too
            few that the encoding fits; or there is no text for one that needs some. Then nothing was changed.
    """
    encoding = rounded(encoding_of(quantization), rounding, rounding_settings or {})
    config = getattr(model.config, "quantization_config", None)
    wanted = None if structure is None else STRUCTURES.get(structure)
    if not isinstance(config, DobiSVDConfig):
        raise ValueError(
            "the model is not compressed: pass what from_pretrained loads of a compressed checkpoint, or what "
            "quantize_model of a DobiSVDQuantizer returns"
        )
    encoding.require()
    restore_after_inference(model)
    if encoding.needs_text and windows is None:
        raise ValueError(f"{encoding.text_is_missing}: pass windows, or take rounding='nearest', which reads none")
    with torch.inference_mode(False), torch.no_grad():
        formats = _new_formats(model, encoding, wanted, config)
        runner = None if windows is None else _runner(model, encoding, windows, config)
        for name, format in formats.items():
            _write_one(model, name, format)
        quantize(model, encoding, runner)
    modules = {
        name: PlannedModule(each.structure, each.encoding, each.rank).to_dict()
        for name, each in compressed_linears(model).items()
    }
    applied = {"quantization": encoding.as_applied(), "rounding": None, "rounding_settings": {}}
    described = replace(config, modules=modules, mixed=False, **applied)
    attach(model, described if structure is None else replace(described, structure=structure))
    forget_compression(model)
    return model


def _runner(model: Any, encoding: Encoding, windows: CalibrationWindows, config: DobiSVDConfig) -> PairedRunner:
    """Return what takes the windows through the model. ValueError if codes are to be learned, and cannot be in it."""
    learned = encoding.learned
    size = config.batch_size if learned is None else learned.batch_size
    runner = PairedRunner(model, find_blocks(model, nontext=config.nontext_modules), windows, batch_size=size)
    check_runnable(runner, encoding)
    return runner


def _new_formats(
    model: Any, encoding: Encoding, structure: type[CompressedLinear] | None, config: DobiSVDConfig
) -> dict[str, Format]:
    """Return what is to be written anew, and how. ValueError as `convert`."""
    compressed = compressed_linears(model)
    dense = untouched_linears(model, config) if encoding.name in encoding.dense_encodings else {}
    formats = {name: Format(_structure_of(module, structure), encoding) for name, module in compressed.items()}
    for name, module in compressed.items():
        if encoding_named(module.encoding).quant_method != QUANT_METHOD:
            raise ValueError(
                f"{name} is stored as {module.encoding}, which another library reads: start from the checkpoint "
                "before it was quantized"
            )
        if formats[name].conflict is not None:
            raise ValueError(f"{name}: {formats[name].conflict}; pass structure='low_rank', too")
    if not compressed and not dense:
        raise ValueError(f"the model has no matrix to store as {encoding.name}: compress it first")
    linears = {**compressed, **dense}
    refuse_offloaded(linears)
    shapes = {name: matrix_shape(module) for name, module in linears.items()}
    reasons = {name: _reason_against(compressed.get(name), encoding, shape) for name, shape in shapes.items()}
    check_coverage(encoding, shapes, reasons, config.min_coverage)
    meant = {
        name: formats.get(name, Format(AS_IS.structure, encoding))
        for name, reason in reasons.items()
        if reason is None
    }
    now = {name: (module.structure, module.encoding) for name, module in compressed.items()}
    return {name: format for name, format in meant.items() if now.get(name) != format.key}


def _structure_of(module: CompressedLinear, wanted: type[CompressedLinear] | None) -> type[CompressedLinear]:
    """What a matrix becomes: one without a rank has no factors to write anew."""
    return type(module) if wanted is None or module.rank is None else wanted


def _write_one(model: Any, name: str, format: Format) -> None:
    """Write one matrix anew, whole where that format would be no smaller."""
    module, encoding = model.get_submodule(name), format.encoding
    dense = Format(AS_IS.structure, encoding)
    if format.structure.has_rank:
        multiple = encoding.required_rank_multiple
        rank, shape, size = -(-module.rank // multiple) * multiple, matrix_shape(module), module.weight.element_size()
        fits = rank <= min(shape) and format.unsupported_reason(*shape, rank) is None
        stays = rank == module.rank and format.structure is type(module)
        if fits and (stays or format.bytes(*shape, rank, size) < dense.bytes(*shape, None, size)):
            second, first = module.factors()
            missing = rank - len(first)
            padded = Factors(nn.functional.pad(second, (0, missing)), nn.functional.pad(first, (0, 0, 0, missing)))
            replace_linear(model, name, format, rank, padded)
            return
    if encoding.name in encoding.dense_encodings:
        matrix = module.dense_matrix() if isinstance(module, CompressedLinear) else dense_weight(module)
        replace_linear(model, name, dense, None, matrix)
    else:
        model.set_submodule(name, to_dense(module))


def _reason_against(module: CompressedLinear | None, encoding: Encoding, shape: tuple[int, int]) -> str | None:
    """Why a matrix is not written anew, None if it is."""
    chooses = encoding.quant_method != QUANT_METHOD or encoding.uses_text
    if module is not None and not encoding_named(module.encoding).trainable and chooses:
        return f"it is stored as {module.encoding}"
    return encoding.unsupported_reason(*shape)


def untouched_linears(model: Any, config: DobiSVDConfig) -> Mapping[str, nn.Module]:
    """Return the linears of the blocks that a compression left as they were, but for those that were to stay so."""
    if not find_blocks(model, nontext=config.nontext_modules):
        return {}  # nothing but linears in 8 bits
    wrappers = tuple(f"{name}." for name in compressed_linears(model))
    # A model may have been loaded without its head, and its linears then lack the first part of their names.
    prefix = getattr(model, "base_model_prefix", "")
    return {
        name: module
        for name, module in find_layout(model, nontext=config.nontext_modules).linears.items()
        if not name.startswith(wrappers)
        and not any(_was_to_stay(known, config) for known in (name, f"{prefix}.{name}"))
    }


def _was_to_stay(name: str, config: DobiSVDConfig) -> bool:
    """Whether the user wanted this linear dense. Patterns may be for what is compressed, so they need not match."""
    if any(matching_names(pattern, [name]) for pattern in config.modules_to_not_convert):
        return True
    fitting = {pattern: entry for pattern, entry in config.overrides.items() if matching_names(pattern, [name])}
    override = resolve_overrides(fitting, [name]).get(name)
    return override is not None and override.dense is True
