"""Which of gptqmodel's kernels GPTQ linears run in on a GPU, and that tensors come back: with stand-ins for them."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from integration_tests.encodings.test_gptq_cpu import Packed
from integration_tests.inference.compressed_models import assert_near, compressed, logits
from integration_tests.quantization.quantized_models import needs_gptq
from optimum_dobisvd import optimize_for_inference, restore_after_inference
from optimum_dobisvd.encodings import gptq, gptq_cuda
from optimum_dobisvd.encodings.gptq_cuda import GPTQ_KERNELS, GPTQContract, contract_of, fast_gptq, gptq_candidates
from optimum_dobisvd.inference.shared_input import SharedInput


class Repacking(nn.Module):
    """As gptqmodel's fast kernels are: tensors come in checkpoints' layout, and `post_init` replaces them."""

    limit = 96
    """Outputs that it takes at most: as little as a kernel of fixed tiles does it take all."""

    def __init__(self, bits: int, group_size: int, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__()
        self.bits, self.in_features, self.out_features = bits, in_features, out_features
        self.made_for = group_size, options["desc_act"], options["sym"], options["dtype"]
        self.qweight = nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)
        self.register_buffer("bias", torch.zeros(out_features) if options["bias"] else None)

    @classmethod
    def validate(cls, **asked: Any) -> tuple[bool, Exception | None]:
        fits = asked["out_features"] <= cls.limit and asked["bits"] in (4, 8)
        return fits, None if fits else NotImplementedError(f"takes no {asked['out_features']} outputs")

    def qzero_format(self, format: int) -> None:
        assert format == 2

    def post_init(self) -> None:
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        codes = (self.qweight[:, None] >> shifts[:, None] & 2**self.bits - 1).flatten(0, 1)
        zeros = (self.qzeros[:, :, None] >> shifts & 2**self.bits - 1).flatten(1)
        where = self.g_idx.long()
        self.matrix = ((codes - zeros[where]) * self.scales[where]).float()
        for name in ("qweight", "qzeros", "g_idx", "scales"):  # gone, as repacked ones are
            setattr(self, name, None)

    def forward(self, x: Tensor) -> Tensor:
        y = (x.float() @ self.matrix).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Failing(Repacking):
    """One that cannot be compiled on this machine."""

    def post_init(self) -> None:
        raise RuntimeError("no CUDA compiler")


class Computing(Packed):
    """The plain kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return self.expected(x).to(x.dtype)


def packed(outputs: int, *, bias: bool = False, ordered: bool = True, bits: int = 4) -> Computing:
    return Computing(outputs, 128, bits, 32, ordered=ordered, bias=bias)


def runs_in(linears: list[Any], contract: GPTQContract, *kinds: Any) -> str:
    found = fast_gptq(linears, contract, lambda *_: kinds)
    assert found is not None
    return found.runs_in


def tensors_of(linear: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in linear.named_buffers()}


@pytest.mark.parametrize("bits", [4, 8])
def test_the_contract_is_read_off_the_tensors(bits: int) -> None:
    linear = packed(64, bits=bits)
    assert contract_of([linear], bits, 32, torch.bfloat16) == GPTQContract(bits, 32, False, False, torch.bfloat16)
    word = sum(1 << (bits * place + bits - 1) for place in range(32 // bits)) - (1 << 32)
    linear.qzeros.fill_(word)
    assert contract_of([linear], bits, 32, torch.float16).sym
    linear.g_idx.copy_(linear.g_idx.flip(0))
    assert contract_of([linear], bits, 32, torch.float16).desc_act


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_tensors_come_back_as_they_were(bias: bool, ordered: bool) -> None:
    linear: Any = packed(64, bias=bias, ordered=ordered)
    before, x = tensors_of(linear), torch.randn(3, 128).bfloat16()
    contract = contract_of([linear], 4, 32, torch.bfloat16)
    found = fast_gptq([linear], contract, lambda *_: [Repacking])
    assert found is not None
    assert found.runs_in == "Repacking"
    assert found._kernel[0].made_for == (32, not ordered, False, torch.bfloat16)
    assert_near(found(x).double(), linear.expected(x), torch.bfloat16)
    assert_near(copy.deepcopy(found)(x).double(), linear.expected(x), torch.bfloat16)
    found.release()
    after = tensors_of(linear)
    assert after.keys() == before.keys() == tensors_of(found).keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_linears_with_the_same_input_are_one_product() -> None:
    linears: list[Any] = [packed(32, bias=True), packed(64, bias=True)]
    x = torch.randn(2, 3, 128).half()
    found = fast_gptq(linears, contract_of(linears, 4, 32, torch.float16), lambda *_: [Repacking])
    assert found is not None
    assert_near(found(x).double(), torch.cat([each.expected(x) for each in linears], -1), torch.bfloat16)
    contract = contract_of(linears, 4, 32, torch.float16)
    for other in (packed(32, bias=True, ordered=False), packed(32)):  # other groups, and no bias
        assert fast_gptq([linears[0], other], contract, lambda *_: [Repacking]) is None


def test_what_falls_back_is_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    gptq_cuda._left_alone.clear()
    GPTQ_KERNELS.clear()
    contract = contract_of([packed(64)], 4, 32, torch.float16)
    with caplog.at_level(logging.WARNING, logger="optimum_dobisvd"):
        for _ in range(2):
            assert runs_in([packed(128)], contract, Failing, Repacking) == "Computing"
        assert runs_in([packed(64)], contract, Failing, Repacking) == "Repacking"
        assert runs_in([packed(64)], contract, Failing, Computing, Repacking) == "Computing"
    assert GPTQ_KERNELS == {"Computing": 3, "Repacking": 1}
    told = [record.message for record in caplog.records]
    assert len(told) == 2
    assert "Failing: takes no 128 outputs; Repacking: takes no 128 outputs" in told[0]
    assert "Failing: no CUDA compiler" in told[1]


def test_float32_stays_in_the_plain_kernel_where_its_tensors_are() -> None:
    linear: Any = packed(64)
    x, before = torch.randn(2, 128), linear.qweight
    found = fast_gptq([linear], contract_of([linear], 4, 32, torch.float32), lambda *_: [Repacking])
    assert found is not None
    assert found.runs_in == "Computing"
    assert torch.equal(found(x), linear(x))
    assert found.qweight is linear.qweight is before


@needs_gptq
def test_gptqmodels_own_list_is_read_and_its_limits_are_asked() -> None:
    """Where there is no GPU gptqmodel has no kernel for one, and says so rather than raises."""
    contract = GPTQContract(4, 32, False, True, torch.bfloat16)
    found = gptq_candidates(contract, torch.device("cpu"))
    assert "TorchLinear" in [kind.__name__ for kind in found]
    linear: Any = packed(64)
    assert fast_gptq([linear], contract, lambda *_: [kind for kind in found if kind.__name__ == "TorchLinear"])
    marlin = __import__("gptqmodel.nn_modules.qlinear.marlin", fromlist=["MarlinLinear"]).MarlinLinear
    shape = {"in_features": 128, "out_features": 64, "pack_dtype": torch.int32}
    for refused in ({"group_size": 16}, {"sym": False}, {"bits": 2}):
        options = {**vars(contract), **refused}
        assert not marlin._validate(**options, **shape)[0], refused
    assert marlin._validate(**vars(contract), **shape)[0]


@needs_gptq
def test_a_model_is_saved_as_it_was_and_comes_back(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed("pivoted", "gptq4_g32", torch.bfloat16)
    expected = logits(model)
    model.save_pretrained(tmp_path / "before")

    def on_gpu(self: Any, linears: Any, dtype: torch.dtype) -> Any:
        return fast_gptq(linears, contract_of(linears, self.bits, self.group_size, dtype), lambda *_: [Repacking])

    monkeypatch.setattr(gptq.GPTQ, "for_inference", on_gpu)
    optimize_for_inference(model, dense=[])
    assert any(isinstance(module, SharedInput) for module in model.modules())
    assert_near(logits(model), expected, torch.bfloat16, "gptq")
    model.save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    ids = torch.arange(2, 8).view(1, 6)
    wanted = logits(model, ids)
    whole = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_near(whole(input_ids=ids, use_cache=False).logits.float(), wanted, torch.bfloat16)
    torch._dynamo.reset()
    assert torch.equal(logits(restore_after_inference(model)), expected)
