"""Tiny compressed checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch

from integration_tests.checkpoint.reloading import compressed
from integration_tests.tiny_models import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that gives the folder of a tiny compressed model, made when first asked for."""
    root = tmp_path_factory.mktemp("compressed")

    def folder(
        name: str,
        quantization: str | None = None,
        dtype: torch.dtype = torch.float32,
        structure: str = "low_rank",
        **overrides: Any,
    ) -> Path:
        path = root / "-".join([name, str(quantization), str(dtype)[6:], structure, *map(str, overrides.values())])
        if not path.exists():
            model = tiny(name, dtype=dtype, **overrides)
            compressed(model, quantization=quantization, structure=structure).save_pretrained(path)
        return path

    return folder
