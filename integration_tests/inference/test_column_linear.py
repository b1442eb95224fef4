"""float32 weights on a CPU, stored by columns while a model generates."""

from typing import Any

import pytest
import torch
from torch import nn

from integration_tests.inference.test_optimize import (
    assert_near,
    compressed,
    generated,
    joined,
    logits,
    optimized,
    restored,
)
from optimum_dobisvd import convert
from optimum_dobisvd.encodings.float import Float
from optimum_dobisvd.encodings.int8 import Int8
from optimum_dobisvd.inference import column_linear
from optimum_dobisvd.inference.column_linear import ColumnLinear, faster_by_columns
from optimum_dobisvd.structures.base import compressed_linears


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[Any, ...], float]:
    """What is measured: nothing is yet."""
    monkeypatch.setattr(column_linear, "RATIOS", {})
    return column_linear.RATIOS


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are always faster."""
    monkeypatch.setattr(column_linear, "_ratio", lambda weight, rows: 0.5)


def strides(model: Any) -> set[int]:
    """Of one value to the next of the same row, in all linears of factorized matrices."""
    found = [linear for each in compressed_linears(model).values() for linear in each.children()]
    return {linear.weight.stride(1) for linear in found}


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("structure", ["low_rank", "pivoted"])
def test_a_model_computes_the_same_and_comes_back(structure: str, tmp_path: Any) -> None:
    model = compressed(structure, "float")
    expected, wanted, stored = logits(model), generated(model), strides(model)
    model.save_pretrained(tmp_path / "before")
    optimized(model, dense=[])
    assert joined(model)
    assert 1 not in strides(model)
    assert_near(logits(model), expected, torch.float32)
    assert torch.equal(generated(model), wanted)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_near(logits(compiled), expected, torch.float32)
    torch._dynamo.reset()
    model.save_pretrained(tmp_path / "after")
    assert (tmp_path / "before/model.safetensors").read_bytes() == (tmp_path / "after/model.safetensors").read_bytes()
    restored(model)
    assert strides(model) == stored == {1}
    assert all(weight.is_contiguous() for weight in model.parameters())
    assert torch.equal(logits(model), expected)


@pytest.mark.usefixtures("faster")
def test_it_is_moved_and_converted() -> None:
    model = optimized(compressed("pivoted", "float"), dense=[])
    part = model.model.layers[0].self_attn.q_proj.first
    assert part.weight.untyped_storage().data_ptr() == part.runs.weight.untyped_storage().data_ptr()
    model.to(torch.bfloat16)
    assert_near(logits(model), logits(compressed("pivoted", "float").to(torch.bfloat16)), torch.bfloat16)
    convert(model, "int8")
    assert strides(model) == {1}


def test_they_are_chosen_where_they_are_faster_over_all_rows(ratios: dict[tuple[Any, ...], float]) -> None:
    linear = nn.Linear(24, 40)
    for rows, ratio in ((1, 0.5), (4, 1.4), (512, 1.0), (16, 4.1)):
        ratios[40, 24, rows, torch.get_num_threads()] = ratio
    known = dict(ratios)
    assert isinstance(faster_by_columns(linear, Float(), [1, 4, 512]), ColumnLinear)
    linear = nn.Linear(24, 40)
    assert faster_by_columns(linear, Float(), [1, 16]) is None
    assert faster_by_columns(linear, Float(), [4, 512]) is None  # nothing is known to be gained
    assert faster_by_columns(linear.to(torch.bfloat16), Float(), [1]) is None
    assert faster_by_columns(linear.float(), Int8(), [1]) is None
    assert linear.weight.is_contiguous()
    assert ratios == known


def test_they_are_measured_once(ratios: dict[tuple[Any, ...], float]) -> None:
    faster_by_columns(nn.Linear(32, 16), Float(), [1, 2])
    known = dict(ratios)
    assert len(known) == 2
    faster_by_columns(nn.Linear(32, 16), Float(), [1, 2])
    assert ratios == known
