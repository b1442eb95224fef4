"""A report from the files of a checkpoint alone: config.json, and the headers of its safetensors files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..allocation.plan import PlannedModule
from ..checkpoint.verify import renamed_for
from ..config import DobiSVDConfig
from ..encodings.base import QUANT_METHOD
from ..model.experts import linearize
from ..model.layout import find_layout
from ..model.linears import weight_matrix
from ..model.target import Target
from ..report.report import CompressionReport, ModuleReport, module_report
from ..structures.format import AS_IS
from .dry_run_report import dry_run_report
from .load_dense import load_meta_model
from .sources import ModelSource

_ELEMENT_SIZES = {"F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1}


def report_from_files(folder: Path, *, trust_remote_code: bool = False) -> CompressionReport:
    """Ranks and bytes of a checkpoint without a report; errors and times are unknown.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is not a compressed one of ours, or lacks a factor.
    """
    config = read_config(folder)
    modules = config.modules or {}
    meta_model = load_meta_model(ModelSource(folder.name, str(folder), None), trust_remote_code=trust_remote_code)
    linearize(meta_model)
    shapes, stored_bytes = _headers(folder, renamed_for(meta_model))
    layout = find_layout(meta_model, config.modules_to_not_convert, nontext=config.nontext_modules)
    left = {target.name: module_report(target, PlannedModule(*AS_IS.key), None) for target in layout.targets}
    compressed = {}
    for name, entry in modules.items():
        if name not in layout.linears:
            raise ValueError(
                f"config.json lists {name}, which {type(meta_model).__name__} does not have; copy it again"
            )
        compressed[name] = _compressed(name, entry, layout.linears[name], shapes)
    rows = list({**left, **compressed}.values())
    dense_bytes = stored_bytes + sum(row.dense_bytes - row.bytes for row in rows)
    return dry_run_report(folder.resolve().name, config, meta_model, layout, rows, dense_bytes)


def read_config(folder: Path) -> DobiSVDConfig:
    """The compression's configuration in config.json. FileNotFoundError or ValueError say what is wrong."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: it is not the folder of a saved model")
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("quantization_config") or {}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if found.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{path}: this model was not compressed by optimum-dobisvd")
    config = DobiSVDConfig.from_dict(found)
    if not config.is_compressed:
        raise ValueError(f"{path} lists no compressed modules: the checkpoint is damaged")
    return config


def _headers(folder: Path, renamed: Callable[[str], str]) -> tuple[dict[str, tuple[list[int], int]], int]:
    """`{tensor: (shape, bytes of an element)}` by its name in the model, and the bytes of all tensors together."""
    shapes: dict[str, tuple[list[int], int]] = {}
    total = 0
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors files: the checkpoint is incomplete")
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    tensor = file.get_slice(key)
                    shape, size = tensor.get_shape(), _ELEMENT_SIZES.get(tensor.get_dtype(), 1)
                    shapes[renamed(key)] = (shape, size)
                    total += math.prod(shape) * size
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); copy it again") from error
    return shapes, total


def _compressed(
    name: str, entry: dict[str, Any], dense: Any, shapes: dict[str, tuple[list[int], int]]
) -> ModuleReport:
    """The row of one compressed matrix, its tensors checked against what config.json says of it."""
    planned = PlannedModule(entry["structure"], entry["encoding"], entry.get("rank"))
    out_features, in_features = weight_matrix(dense).shape
    # The size of an element of the dense weight: that of a tensor in the model's own dtype.
    size = shapes[f"{name}.weight"][1] if f"{name}.weight" in shapes else dense.weight.element_size()
    row = module_report(Target(name, out_features, in_features, size), planned, None)
    expected = planned.format.tensors(out_features, in_features, planned.rank, dense.bias is not None)
    for key, (shape, _) in expected.items():
        header = shapes.get(f"{name}.{key}")
        if header is None:
            raise ValueError(f"the checkpoint lacks {name}.{key}, which config.json promises; copy it again")
        if header[0] != shape:
            raise ValueError(
                f"{name}.{key} has shape {header[0]} and by config.json {shape}; files of two compressions were mixed"
            )
    found = sum(
        math.prod(shape) * element
        for key, (shape, element) in shapes.items()
        if key.startswith(f"{name}.") and not key.endswith(".bias")
    )
    if not 0.9 * row.bytes <= found <= row.bytes:  # bitsandbytes writes down what it can be read with, in words
        raise ValueError(
            f"{name} takes {found} bytes in the checkpoint and {row.bytes} as {entry['encoding']} by config.json; "
            "files of two compressions were mixed"
        )
    return row
