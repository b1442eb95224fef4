"""Products of few rows: the kernels in Triton's interpreter, compiled for Hopper, and in models that use them.

Each in a process of its own: whether Triton interprets is decided when it is imported.
"""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from integration_tests.fresh_processes import run_python
from optimum_dobisvd.encodings.float import Float
from optimum_dobisvd.inference import thin_linear
from optimum_dobisvd.inference.thin_linear import RATIOS, faster_by_kernel, ratio_key

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
AGAINST_FLOAT64 = """
import sys
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimum_dobisvd.inference.thin_product import TILES, choices, thin_product, tile_key

device = sys.argv[1]
LIMITS = {torch.bfloat16: 5e-3, torch.float16: 1e-3}

@given(st.data())
@settings(max_examples=int(sys.argv[2]), deadline=None, database=None, derandomize=True)
def check(data):
    draw = data.draw
    dtype, rows = draw(st.sampled_from(list(LIMITS))), draw(st.just(1) | st.integers(1, 16))
    outer, inner = draw(st.integers(0, 150)), draw(st.integers(1, 700) | st.sampled_from([1024, 2500]))
    eight, placed, biased, apart = (draw(st.booleans()) for _ in range(4))
    torch.manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(rows, inner + 8 * apart, device=device).to(dtype)[:, :inner]
    if eight:
        weight = torch.randint(-127, 128, (outer, inner), dtype=torch.int8, device=device)
    else:
        weight = (torch.randn(outer, inner, device=device) / inner**0.5).to(dtype)
    scale = (torch.rand(outer, device=device) + 0.1).to(dtype) if eight and draw(st.booleans()) else None
    outputs = outer + inner if placed else outer
    bias = torch.randn(outputs, device=device).to(dtype) if biased else None
    kind = torch.uint8 if outputs <= 256 else torch.int32
    places = torch.randperm(outputs, device=device).to(kind) if placed else None
    TILES[tile_key(rows, weight)] = draw(st.sampled_from(choices(rows)))
    found = thin_product(x, weight, scale, bias, places)
    again = thin_product(x, weight, scale, bias, places)
    exact = x.double() @ (weight.double() / (128 if eight else 1)).T
    if scale is not None:
        exact = exact * scale.double()
    if placed:
        stacked, exact = torch.cat([x.double(), exact], dim=1), x.new_empty(rows, outputs, dtype=torch.float64)
        exact[:, places.long()] = stacked
    size = exact.norm()
    if biased:
        exact, size = exact + bias.double(), size + bias.double().norm()
    assert found.dtype is dtype and found.shape == (rows, outputs)
    assert torch.equal(found, again)  # sums are always in the same order
    assert float((found.double() - exact).norm()) <= LIMITS[dtype] * float(size)

check()
torch.library.opcheck(
    thin_product,
    (torch.randn(2, 40, device=device).half(), torch.randn(24, 40, device=device).half(), None, None,
     torch.randperm(64, device=device).int()),
    test_utils=("test_schema", "test_faketensor"),
)
"""


@needs_triton
def test_any_shape_dtype_bias_and_permutation_in_the_interpreter() -> None:
    done = run_python(AGAINST_FLOAT64, "cpu", "80", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_any_shape_dtype_bias_and_permutation_on_a_gpu() -> None:
    done = run_python(AGAINST_FLOAT64, "cuda", "300")
    assert done.returncode == 0, done.stderr[-3000:]


FOR_HOPPER = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optimum_dobisvd.inference.thin_kernels import product_kernel, sum_kernel
from optimum_dobisvd.inference.thin_product import ONE_ROW, SEVERAL_ROWS

POINTERS = {"x": "*bf16", "scale": "*bf16", "bias": "*bf16", "places": "*i32", "y": "*bf16", "sums": "*fp32"}
ALIGNED = {*POINTERS, "weight", "inner", "x_stride", "y_stride"}

def compiled(kernel, weight, tile, constants):
    pointers = {**POINTERS, "weight": weight, "unit": "fp32"}
    names = kernel.arg_names
    kinds = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    places = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in ALIGNED}
    source = ASTSource(kernel, kinds, {(names.index(name),): value for name, value in constants.items()}, places)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "launch_pdl": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

for block_rows, tiles in ((1, ONE_ROW), (16, SEVERAL_ROWS)):
    for tile in tiles:
        for weight in ("*bf16", "*i8"):
            flags = {"HAS_SCALE": weight == "*i8", "HAS_BIAS": True, "HAS_PLACES": True, "DEPENDENT": True}
            blocks = {"BLOCK_ROWS": block_rows, "BLOCK_OUTER": tile.outer, "BLOCK_INNER": tile.inner}
            ptx = compiled(product_kernel, weight, tile, {**flags, **blocks, "SPLIT": tile.fills, "WIDENED": False})
            # Weights are read 16 bytes at a time, and nothing is kept in memory for want of registers.
            assert re.search(r"ld\\.global\\S*evict_first\\S*v4\\.b32|cp\\.async\\.cg", ptx), (tile, weight)
            assert ".local" not in ptx
            assert ("mma.sync" in ptx) == (block_rows > 1)
            assert "griddepcontrol.wait" in ptx
            summing = {**flags, "BLOCK_ROWS": block_rows, "BLOCK_OUTER": 128}
            compiled(sum_kernel, weight, tile, summing)
"""


@needs_triton
def test_the_kernels_compile_for_hopper() -> None:
    done = run_python(FOR_HOPPER)
    assert done.returncode == 0, done.stderr[-3000:]


IN_A_MODEL = """
import sys
import torch
from integration_tests.inference.compressed_models import compressed, logits
from integration_tests.quantization.quantized_models import wide
from optimum_dobisvd import optimize_for_inference, restore_after_inference
from optimum_dobisvd.inference import thin_linear
from optimum_dobisvd.inference.thin_linear import ThinLinear

thin_linear._measured = lambda *_: 0.5
ids = torch.arange(2, 4).view(1, 2)
for structure, encoding in (("low_rank", "float"), ("pivoted", "int8"), ("dense", "int8")):
    model = compressed(structure, encoding, torch.bfloat16, wide("qwen2", torch.bfloat16))
    expected, wanted = logits(model), logits(model, ids)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimize_for_inference(model, dense=[], rows=(1, 4, 512))
    thin = [module for module in model.modules() if isinstance(module, ThinLinear)]
    assert thin, (structure, encoding)
    calls = []
    original = thin_linear.thin_product
    thin_linear.thin_product = lambda *args: calls.append(args) or original(*args)
    for given, right in ((None, expected), (ids, wanted)):
        found = logits(model) if given is None else logits(model, given)
        assert float((found - right).norm() / right.norm()) < 2e-2, (structure, encoding)
    thin_linear.thin_product = original
    # All 24 rows of the first input are more than the kernel takes.
    assert all(len(x) <= 16 for x, *_ in calls) and calls
    assert any(places is not None for *_, places in calls) == (structure == "pivoted")
    found = model.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(input_ids=ids, use_cache=False).logits.float()
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2, (structure, encoding)
    torch._dynamo.reset()
    restore_after_inference(model)
    assert torch.equal(logits(model), expected)
    assert not any(isinstance(module, ThinLinear) for module in model.modules())
"""


@needs_triton
def test_a_model_computes_the_same_in_one_graph_and_comes_back() -> None:
    """Of an architecture with biases in q, k and v."""
    done = run_python(f"import sys; sys.path.insert(0, {str(ROOT)!r}){IN_A_MODEL}", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Linear:
    """One that would be on a GPU."""
    monkeypatch.setattr(thin_linear, "unsupported_reason", lambda device, dtype: None)
    monkeypatch.setattr(thin_linear, "RATIOS", {})
    return torch.nn.Linear(24, 40, dtype=torch.bfloat16)


def test_it_is_chosen_where_it_is_faster_over_the_rows_that_it_takes(linear: torch.nn.Linear) -> None:
    for rows, ratio in ((1, 0.5), (4, 1.4), (8, 3.0)):
        thin_linear.RATIOS[ratio_key(linear, rows, False)] = ratio
    assert faster_by_kernel(linear, Float(), [1]) is not None
    assert faster_by_kernel(linear, Float(), [1, 512]) is not None
    assert faster_by_kernel(linear, Float(), [1, 4]) is not None  # their geometric mean is below 1
    assert faster_by_kernel(linear, Float(), [1, 8]) is None
    assert faster_by_kernel(linear, Float(), [17, 512]) is None


def test_a_kernel_that_fails_is_told_and_done_without(
    linear: torch.nn.Linear, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> float:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(thin_linear, "_measured", fails)
    with caplog.at_level(logging.WARNING, logger="optimum_dobisvd"):
        assert faster_by_kernel(linear, Float(), [1]) is None
        assert faster_by_kernel(linear, Float(), [1]) is None
    assert [record.message.count("Failed to find C compiler") for record in caplog.records] == [1]


def test_on_a_cpu_nothing_is_measured() -> None:
    before = dict(RATIOS)
    assert faster_by_kernel(torch.nn.Linear(24, 40, dtype=torch.bfloat16), Float(), [1]) is None
    assert before == RATIOS
