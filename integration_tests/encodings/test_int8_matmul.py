"""The kernels that compute from 8-bit matrices: the same function, at every rank and batch, without a crash."""

import importlib.util
import logging
import platform
import threading

import pytest
import torch

from integration_tests.fresh_processes import run_python
from optimum_dobisvd.encodings import int8_matmul as kernels
from optimum_dobisvd.encodings.int8_matmul import KERNEL_CALLS, int8_matmul, using_kernel

ON_X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the CPU kernel is for x86")

# In a process of its own: the kernel's failures are segmentation faults.
EVERY_RANK_AND_BATCH = """
import torch
from torch import nn
from optimum_dobisvd.encodings.int8_matmul import KERNEL_CALLS, using_kernel
from optimum_dobisvd.structures.format import format_named
torch.manual_seed(0)
torch.set_num_threads(1)
worst, products = 0.0, 0
noise = torch.randint(-127, 128, (64 + 612 * 612,), dtype=torch.int8)

def made(encoding, outputs, inputs, rank):
    dense = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=torch.bfloat16)
    module = format_named("low_rank", encoding).empty(dense, rank)
    return module.to_empty(device="cpu")

def check(module, batches):
    global worst, products
    for tensor in module.parameters():
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape).add(0.1).to(tensor)
        else:  # a file's tensors may lie at any address
            begin = module.rank % 64
            tensor.data = noise[begin : begin + tensor.numel()].view(tensor.shape)
    xs = torch.randn(64, module.in_features).bfloat16()
    exact = xs.double()
    for matrix in module.matrices().values():
        exact = exact @ matrix.double().T
    for batch in batches:
        with using_kernel("cpu_int8"), torch.no_grad():
            found = module(xs[:batch]).double()
        products += 2
        worst = max(worst, float((found - exact[:batch]).norm() / exact[:batch].norm()))
        assert worst < 1e-2, (module, batch, worst)

for rank in range(1, 601):
    check(made("int8", 40, 52, rank), range(1, 65))
    short = max(rank, 36)
    check(made("remap", short + 8, short, rank), (2, 5, 64))
    if rank > 16:  # where two rounded parts are added, a single value may lose more by canceling
        check(made("remap", short, short + 12, rank), (1, 4, 40))
assert KERNEL_CALLS == {"cpu_int8": products}, KERNEL_CALLS
print(worst)
"""


@ON_X86
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_every_rank_and_batch_through_the_cpu_kernel(capability: str) -> None:
    settings = {"ATEN_CPU_CAPABILITY": capability} if capability != "default" else {}
    done = run_python(EVERY_RANK_AND_BATCH, **settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < float(done.stdout) < 1e-2


TRITON = """
import sys, torch
from optimum_dobisvd.encodings.int8_matmul import KERNEL_CALLS, int8_matmul, using_kernel
torch.manual_seed(0)
count = 0
for dtype, limit in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)):
    for rows, outer, inner in ((1, 1, 1), (1, 40, 300), (3, 33, 129), (17, 70, 16), (40, 130, 600), (128, 32, 128)):
        for scaled in (True, False):
            x = torch.randn(rows, inner, device=sys.argv[1]).to(dtype)
            weight = torch.randint(-127, 128, (outer, inner), dtype=torch.int8, device=sys.argv[1])
            scale = (torch.rand(outer, device=sys.argv[1]) + 0.1).to(dtype) if scaled else None
            with using_kernel("triton"):
                found = int8_matmul(x, weight, scale)
            exact = x.double() @ (weight.double() / 128).T
            if scaled:
                exact = exact * scale.double()
            assert found.dtype is dtype and found.shape == (rows, outer)
            error = float((found.double() - exact).norm() / exact.norm())
            assert error < limit, (dtype, rows, outer, inner, error)
            count += 1
assert KERNEL_CALLS == {"triton": count}
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernel_in_its_interpreter() -> None:
    done = run_python(TRITON, "cpu", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_triton_kernel_on_a_gpu() -> None:
    done = run_python(TRITON, "cuda")
    assert done.returncode == 0, done.stderr[-2000:]


def operands(rows: int = 5, inner: int = 48, outer: int = 24, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inner, generator=generator).to(dtype)
    weight = torch.randint(-127, 128, (outer, inner), generator=generator, dtype=torch.int8)
    return x, weight, torch.rand(outer, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48,), (7, 48), (2, 3, 48), (0, 48)])
def test_any_leading_shape_and_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    _, weight, scale = operands(dtype=dtype)
    x = torch.randn(shape).to(dtype)
    exact = (x.double() @ (weight.double() / 128).T) * scale.double()
    found = int8_matmul(x, weight, scale)
    assert found.dtype is dtype
    assert found.shape == exact.shape
    assert float((found.double() - exact).norm()) <= 1e-2 * float(exact.norm())


def test_large_activations_do_not_overflow_float16() -> None:
    x, weight, _ = operands(dtype=torch.float16)
    found = int8_matmul(60 * x, weight, torch.full((24,), 1e-3, dtype=torch.float16))
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("scaled", [True, False])
def test_gradients_by_the_activations_are_those_of_the_unpacked_matrix(scaled: bool) -> None:
    x, weight, scale = operands()
    x.requires_grad_(True)
    out = int8_matmul(x, weight, scale if scaled else None)
    seed = torch.randn_like(out)
    out.backward(seed)
    dense = weight.float() / 128 * (scale[:, None] if scaled else 1)
    assert torch.allclose(x.grad, seed @ dense, rtol=1e-5, atol=1e-5)


def test_what_computes_is_counted_and_the_slow_way_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    kernels._told.clear()
    before = KERNEL_CALLS["dequantize"]
    x, weight, scale = operands()
    with caplog.at_level(logging.WARNING, logger="optimum_dobisvd"):
        int8_matmul(x, weight, scale)
        int8_matmul(x, weight, scale)
    assert KERNEL_CALLS["dequantize"] == before + 2
    (record,) = caplog.records
    assert "unpacked for every product" in record.message
    if platform.machine() == "x86_64":
        assert "load with dtype=torch.bfloat16" in record.message


@ON_X86
def test_few_rows_go_through_the_kernel_by_themselves() -> None:
    before = KERNEL_CALLS["cpu_int8"]
    int8_matmul(*operands(rows=1, dtype=torch.bfloat16))
    assert KERNEL_CALLS["cpu_int8"] == before + 1


def test_a_kernel_that_cannot_take_the_operands_says_why() -> None:
    with (
        pytest.raises(ValueError, match="unknown kernel 'cuda'; known: triton, cpu_int8, dequantize"),
        using_kernel("cuda"),
    ):
        pass
    with pytest.raises(ValueError, match="the kernel 'cpu_int8' was asked for, and"), using_kernel("cpu_int8"):
        int8_matmul(*operands())
    with pytest.raises(ValueError, match="'triton' was asked for, and it is for cuda, these are on cpu"):  # noqa: SIM117
        with using_kernel("triton"):
            int8_matmul(*operands())
    with using_kernel("dequantize"):
        assert int8_matmul(*operands(dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_a_kernel_is_forced_in_its_own_context_only() -> None:
    """Two overlapping uses, in two threads, leave nothing behind and do not see each other."""
    order = [threading.Event() for _ in range(3)]
    seen = []

    def other() -> None:
        order[0].wait(10)
        with using_kernel("dequantize"):
            order[1].set()
            order[2].wait(10)
            seen.append(kernels._forced.get())

    thread = threading.Thread(target=other)
    thread.start()
    with using_kernel("cpu_int8"):
        order[0].set()
        order[1].wait(10)
        assert kernels._forced.get() == "cpu_int8"
    order[2].set()
    thread.join()
    assert seen == ["dequantize"]
    assert kernels._forced.get() is None


def test_a_triton_that_fails_is_told_once_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler")

    broken = kernels.Kernel("triton", "cpu", lambda x, weight: None, lambda x, weight: False, fails)
    monkeypatch.setattr(kernels, "KERNELS", (broken, kernels.KERNELS[-1]))
    monkeypatch.setattr(kernels, "_broken", {})
    x, weight, scale = operands()
    with caplog.at_level(logging.WARNING, logger="optimum_dobisvd"):
        for _ in range(2):
            assert torch.allclose(int8_matmul(x, weight, scale), (x @ (weight / 128).T) * scale, atol=1e-5)
    assert [record.message.count("Failed to find C compiler") for record in caplog.records] == [1]
    with pytest.raises(RuntimeError, match="C compiler"), using_kernel("triton"):
        int8_matmul(x, weight, scale)


def test_on_a_gpu_without_triton_the_extra_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    assert kernels.KERNELS[0].refuses(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int8)) == (
        "Triton is not installed (pip install triton)"
    )


@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_graph_of_float32_products_is_the_same_function(rows: int, scaled: bool) -> None:
    weight = torch.randint(-127, 128, (12, 40), dtype=torch.int8)
    scale = torch.rand(12) if scaled else None
    x = torch.randn(2, rows, 40)[:1]
    exact = x.double() @ weight.double().T / 128 * (1 if scale is None else scale.double())
    torch._dynamo.reset()
    found = torch.compile(int8_matmul, backend="eager", fullgraph=True)(x, weight, scale)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
