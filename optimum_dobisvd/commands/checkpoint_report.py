"""A report from the files of a checkpoint alone: config.json, and the headers of its safetensors files."""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..allocation.target import Target
from ..calibration.layout import find_layout
from ..config import QUANT_METHOD, DobiSVDConfig
from ..report.report import CompressionReport, ModuleReport, module_report
from .load_dense import load_skeleton
from .outline_report import outline_report
from .sources import ModelSource

_ELEMENT_SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}


def report_from_files(folder: Path, *, trust_remote_code: bool = False) -> CompressionReport:
    """Ranks and bytes of a checkpoint without a report; errors and times are unknown.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is not a compressed one of ours, or lacks a factor.
    """
    config = read_config(folder)
    modules = config.modules or {}
    shapes, stored_bytes = _headers(folder)
    skeleton = load_skeleton(ModelSource(folder.name, str(folder), None), trust_remote_code=trust_remote_code)
    layout = find_layout(skeleton, config.modules_to_not_convert, min_coverage=0.0)
    compressed = {name: _factored(name, entry["storage"], shapes) for name, entry in modules.items()}
    left = {target.name: module_report(target, None, "dense", None) for target in layout.targets}
    rows = list({**left, **compressed}.values())
    dense_bytes = stored_bytes + sum(row.dense_bytes - row.bytes for row in rows)
    return outline_report(folder.resolve().name, config, skeleton, layout, rows, dense_bytes)


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


def _headers(folder: Path) -> tuple[dict[str, tuple[list[int], int]], int]:
    """`{tensor: (shape, bytes of an element)}` over all files, and the bytes of all tensors together."""
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
                    shapes[key] = (shape, size)
                    total += math.prod(shape) * size
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); copy it again") from error
    return shapes, total


def _factored(name: str, storage: str, shapes: dict[str, tuple[list[int], int]]) -> ModuleReport:
    try:
        (rank, in_features), size = shapes[f"{name}.first.weight"]
        (out_features, inner), _ = shapes[f"{name}.second.weight"]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"the checkpoint lacks the factors of {name}, listed in config.json; copy it again"
        ) from error
    if inner != rank:
        raise ValueError(f"{name}: first has rank {rank} and second {inner}; files of two compressions were mixed")
    return module_report(Target(name, out_features, in_features, size), rank, storage, None)
