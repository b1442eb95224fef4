"""Products of GPTQ's linears on CPUs against the matrix that their tensors stand for."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optimum_dobisvd.encodings.gptq_cpu import GPTQOnCPU, can_run_on_cpu

_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Packed(nn.Module):
    """Tensors of a random linear in gptqmodel's layout (zeros as they are), and its matrix."""

    def __init__(
        self, out_features: int, in_features: int, bits: int, group: int, *, ordered: bool, bias: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        per_word, groups = 32 // bits, in_features // group
        codes = torch.randint(0, 2**bits, (in_features, out_features))
        zeros = torch.randint(0, 2**bits, (groups, out_features))
        index = torch.arange(in_features) // group
        self.register_buffer("g_idx", (index if ordered else index[torch.randperm(in_features)]).int())
        self.register_buffer("scales", (torch.rand(groups, out_features) + 0.5).half() / 2**bits)
        words = codes.view(-1, per_word, out_features) << (bits * torch.arange(per_word))[:, None]
        self.register_buffer("qweight", _as_int32(words.sum(1)))
        packed = zeros.view(groups, -1, per_word) << (bits * torch.arange(per_word))
        self.register_buffer("qzeros", _as_int32(packed.sum(2)))
        self.register_buffer("bias", torch.randn(out_features).half() if bias else None)
        where = self.g_idx.long()
        self.matrix = ((codes - zeros[where]).double() * self.scales.double()[where]).T

    def expected(self, x: Tensor) -> Tensor:
        y = x.double() @ self.matrix.T
        return y if self.bias is None else y + self.bias.double()


def _as_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).int()


@given(st.data())
@settings(max_examples=60)
def test_one_or_several_linears(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([2, 4, 8]))
    group = data.draw(st.sampled_from([16, 32, 64, 512]))
    columns = group * data.draw(st.integers(1, 3))
    outputs = data.draw(st.lists(st.integers(1, 9).map(lambda count: 32 * count), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from(list(_TOLERANCES)))
    rows = data.draw(st.integers(0, 9) | st.sampled_from([64, 65]))
    ordered, bias = data.draw(st.booleans()), data.draw(st.booleans())
    with torch.random.fork_rng():
        torch.manual_seed(data.draw(st.integers(0, 99)))
        linears: list[Any] = [Packed(count, columns, bits, group, ordered=ordered, bias=bias) for count in outputs]
        together = [linear for linear in linears if torch.equal(linear.g_idx, linears[0].g_idx)]
        assert can_run_on_cpu(together, bits)
        assert can_run_on_cpu(linears, bits) == (len(together) == len(linears))
        x = torch.randn(2, rows, columns).to(dtype)
        found = GPTQOnCPU(together, bits, dtype)(x)
    expected = torch.cat([linear.expected(x) for linear in together], dim=-1)
    assert found.dtype is dtype
    assert found.shape == expected.shape
    if rows:
        assert float((found.double() - expected).norm() / expected.norm()) < _TOLERANCES[dtype]


@pytest.mark.parametrize("ordered", [True, False])
def test_other_dtypes_than_it_was_made_for(ordered: bool) -> None:
    linear = Packed(64, 128, 4, 32, ordered=ordered, bias=True)
    x = torch.randn(3, 128)
    found = GPTQOnCPU([linear], 4, torch.bfloat16)(x)
    assert found.dtype is torch.float32
    assert float((found - linear.expected(x)).norm() / linear.expected(x).norm()) < _TOLERANCES[torch.bfloat16]


def test_three_bits_are_left_to_gptqmodel() -> None:
    linear = Packed(32, 64, 4, 32, ordered=True, bias=False)
    assert not can_run_on_cpu([linear], 3)
