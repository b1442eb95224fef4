"""The same weights spelled in two ways give the same factors: dimensions in another order, changes in place."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from integration_tests.spellings import PLAIN_SPELLINGS, STREAM_SPELLINGS, Spelled, Streams, spell
from integration_tests.tiny_models import tokens
from optimum_dobisvd import DobiSVDQuantizer
from optimum_dobisvd.structures.base import compressed_linears

PAIRS = [(Spelled, kind) for kind in PLAIN_SPELLINGS] + [(Streams, kind) for kind in STREAM_SPELLINGS]
PADDED = {"padding": True, "whole": False}
METHODS: dict[str, dict[str, Any]] = {
    "svd_llm_v2": {"method": "svd_llm_v2"},
    "global": {"method": "global", "structure": "low_rank"},
    "dobi_ipca": {"method": "dobi_ipca"},
}
QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"method": "svd_llm_v2", "quantization": "nf4", "ratio": 0.25},
    "gptq": {"method": "svd_llm_v2", "quantization": "gptq4_g32", "ratio": 0.25},
}
TRAINING = {"steps": 2, "held_out": 2, "evaluate_every": 1}
LEARNED: dict[str, dict[str, Any]] = {
    "dobi_fixed_basis": {
        "method": "global",
        "structure": "low_rank",
        "allocation": "dobi_fixed_basis",
        "training": TRAINING,
    },
    "dobi_activation": {"method": "dobi_no_remap", "training": TRAINING},
}


def text(padding: bool, windows: int, length: int) -> dict[str, Tensor]:
    """Windows, some of them padded on either side."""
    ids, mask = tokens(windows, length), torch.ones(windows, length, dtype=torch.int64)
    if padding:
        mask[2, 9:], mask[3, :6], mask[5, 2:] = 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def matrices(kind: type[Spelled], padding: bool, dtype: torch.dtype, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The matrices of a compressed model by name, float64; dense ones are themselves."""
    model = spell(kind).to(dtype)
    # Quantization counts the first token of a long window as several; without it, batches are as long as windows.
    windows, length, batch_size = (6, 96, 4) if "quantization" in settings else (16, 16, 16)
    dataset = text(padding, windows, length)
    quantizer = DobiSVDQuantizer(**{"ratio": 0.6, **settings}, dataset=dataset, batch_size=batch_size)
    quantizer.quantize_model(model)
    found = compressed_linears(model)
    if "quantization" in settings:
        assert any(module.encoding in settings["quantization"] for module in found.values())
    return {name: module.dense_matrix().detach().double() for name, module in found.items()}


@functools.cache
def expected(base: type[Spelled], padding: bool, dtype: torch.dtype, method: str) -> dict[str, Tensor]:
    return matrices(base, padding, dtype, {**METHODS, **QUANTIZED, **LEARNED}[method])


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys() != set()
    for name, matrix in wanted.items():
        assert float((found[name] - matrix).norm()) <= tolerance * float(matrix.norm()), name


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("base", "kind"), PAIRS)
def test_both_spellings_give_the_same_factors(
    base: type[Spelled], kind: type[Spelled], method: str, padding: str
) -> None:
    wanted = expected(base, PADDED[padding], torch.float64, method)
    assert_equal(matrices(kind, PADDED[padding], torch.float64, METHODS[method]), wanted)


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("quantization", QUANTIZED)
@pytest.mark.parametrize(("base", "kind"), PAIRS)
def test_both_spellings_are_quantized_to_the_same(
    base: type[Spelled], kind: type[Spelled], quantization: str, padding: str
) -> None:
    pytest.importorskip("gptqmodel" if quantization == "gptq" else "bitsandbytes")
    wanted = expected(base, PADDED[padding], torch.float32, quantization)
    assert_equal(matrices(kind, PADDED[padding], torch.float32, QUANTIZED[quantization]), wanted)


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize(("base", "kind"), PAIRS)
def test_ranks_are_learned_from_the_same_gradients(
    base: type[Spelled], kind: type[Spelled], method: str, padding: str
) -> None:
    wanted = expected(base, PADDED[padding], torch.float64, method)
    assert_equal(matrices(kind, PADDED[padding], torch.float64, LEARNED[method]), wanted)
