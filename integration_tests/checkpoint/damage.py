"""Edits of a saved checkpoint, to damage it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Write its tensors anew, after `edit` has changed them in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Write its config.json anew, after `edit` has changed the `quantization_config` in place."""
    values = json.loads((folder / "config.json").read_text())
    edit(values["quantization_config"])
    (folder / "config.json").write_text(json.dumps(values))
