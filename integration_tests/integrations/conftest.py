"""Tiny compressed checkpoints."""

from pathlib import Path

import pytest
import torch

from integration_tests.checkpoint.reloading import compressed
from integration_tests.tiny_models import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that gives the folder of a tiny compressed model, made when first asked for."""
    root = tmp_path_factory.mktemp("compressed")

    def folder(name: str, quantization: str | None = None, dtype: torch.dtype = torch.float32) -> Path:
        path = root / f"{name}-{quantization}-{str(dtype)[6:]}"
        if not path.exists():
            compressed(tiny(name, dtype=dtype), quantization=quantization).save_pretrained(path)
        return path

    return folder
