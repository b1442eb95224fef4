"""Tiny compressed checkpoints."""

from pathlib import Path

import pytest
import torch

from integration_tests.integrations.test_round_trip import compressed
from integration_tests.tiny_models import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that gives the folder of a tiny compressed model, made when first asked for."""
    root = tmp_path_factory.mktemp("compressed")

    def folder(name: str, storage: str = "plain", dtype: torch.dtype = torch.float32) -> Path:
        path = root / f"{name}-{storage}-{str(dtype)[6:]}"
        if not path.exists():
            compressed(tiny(name, dtype=dtype), storage=storage).save_pretrained(path)
        return path

    return folder
