"""Linears for few rows on a CPU: weights stored by columns, or loops of a compiler over them."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from integration_tests.inference.compressed_models import IDS, assert_near, compressed, generated, joined, logits
from integration_tests.quantization.quantized_models import wide
from optimum_dobisvd import convert
from optimum_dobisvd import optimize_for_inference as optimized
from optimum_dobisvd import restore_after_inference as restored
from optimum_dobisvd.encodings.float import Float
from optimum_dobisvd.encodings.int8 import Int8
from optimum_dobisvd.inference import cpu_linear, measured
from optimum_dobisvd.inference.cpu_linear import CPULinear, faster_on_cpu
from optimum_dobisvd.inference.measurements import Ratios
from optimum_dobisvd.structures.base import compressed_linears


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[Any, ...], float]:
    """What is measured: nothing is yet."""
    monkeypatch.setattr(cpu_linear, "BY_COLUMNS", Ratios("columns"))
    return cpu_linear.BY_COLUMNS


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are always faster."""
    monkeypatch.setattr(cpu_linear, "_ratio", lambda weight, rows: 0.5)


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


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 3), (torch.bfloat16, 1)])
def test_a_compiled_step_computes_the_same(dtype: torch.dtype, rows: int, tmp_path: Any) -> None:
    """By Inductor, of an architecture with biases in q, k and v."""
    model = compressed("pivoted", "float", dtype, model=wide("qwen2", dtype), o_proj="low_rank")
    expected = logits(model, IDS[:1, :rows])
    model.save_pretrained(tmp_path / "before")
    optimized(model, dense=[], compiled=True)
    assert strides(model) == {1}
    assert_near(logits(torch.compile(model, fullgraph=True), IDS[:1, :rows]), expected, dtype)
    torch._dynamo.reset()
    model.save_pretrained(tmp_path / "after")
    assert (tmp_path / "before/model.safetensors").read_bytes() == (tmp_path / "after/model.safetensors").read_bytes()


def test_what_gives_the_input_of_a_loop_is_computed_once() -> None:
    """And not for every output, which an exponential in it would make slower than any product."""
    linear = faster_on_cpu(nn.Linear(24, 40), Float(), [1], compiled=True)

    def gated(x: torch.Tensor) -> torch.Tensor:
        return linear(nn.functional.silu(x) * x)

    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(gated, fullgraph=True), torch.randn(1, 24))
    loops = [part for part in code.split("extern") if "exp" in part]
    assert loops
    assert not any("40L" in part.split("{", 1)[0] for part in loops)
    assert "addmm" not in code
    torch._dynamo.reset()


def test_columns_are_chosen_where_they_are_faster_over_all_rows(ratios: dict[tuple[Any, ...], float]) -> None:
    linear = nn.Linear(24, 40)
    for rows, ratio in ((1, 0.5), (4, 1.4), (512, 1.0), (16, 4.1)):
        ratios[40, 24, rows, torch.get_num_threads()] = ratio
    known = dict(ratios)
    found = faster_on_cpu(linear, Float(), [1, 4, 512], compiled=False)
    assert isinstance(found, CPULinear)
    assert found.by_columns
    linear = nn.Linear(24, 40)
    assert faster_on_cpu(linear, Float(), [1, 16], compiled=False) is None
    assert faster_on_cpu(linear, Float(), [4, 512], compiled=False) is None  # nothing is known to be gained
    assert faster_on_cpu(linear, Float(), [8, 512], compiled=True) is None
    assert faster_on_cpu(linear.to(torch.bfloat16), Float(), [1], compiled=False) is None
    assert faster_on_cpu(linear.float(), Int8(), [1], compiled=False) is None
    assert linear.weight.is_contiguous()
    assert ratios == known


def test_columns_are_measured_once(ratios: dict[tuple[Any, ...], float]) -> None:
    faster_on_cpu(nn.Linear(32, 16), Float(), [1, 2], compiled=False)
    known = dict(ratios)
    assert len(known) == 2
    faster_on_cpu(nn.Linear(32, 16), Float(), [1, 2], compiled=False)
    assert ratios == known


def test_compiled_steps_do_not_run_dense_what_is_slower_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_measured", lambda kind, module, rows: 1.3)
    monkeypatch.setattr(measured, "SPEEDS", Ratios("structure"))
    model = optimized(compressed("low_rank", "float"), rows=1)
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    model = optimized(compressed("low_rank", "float"), rows=1, compiled=True)
    assert not isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    model = optimized(compressed("low_rank", "float"), rows=(8, 512), compiled=True)
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
