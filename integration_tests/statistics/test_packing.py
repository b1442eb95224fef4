"""Packed triangles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dobisvd.statistics.packing import pack, packed_diagonal, packed_length, unpack


@given(size=st.integers(1, 40), seed=st.integers(0, 2**20), exponent=st.integers(-12, 12))
@settings(max_examples=60, deadline=None)
def test_unpacking_gives_the_matrix_back_rounded_to_single(size: int, seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, size + 3, generator=generator, dtype=torch.float64) * 10.0**exponent
    gram = x @ x.T
    packed = pack(gram)
    assert packed.dtype == torch.float32
    assert packed.shape == (packed_length(size),) == (size * (size + 1) // 2,)
    found = unpack(packed, size)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    assert torch.equal(found.triu(), gram.float().double().triu())
    assert torch.equal(packed_diagonal(packed, size).double(), found.diagonal())


def test_the_order_is_row_after_row_of_the_upper_triangle() -> None:
    """The files are a format: what was written once must be read the same way ever after."""
    matrix = torch.tensor([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]])
    assert pack(matrix).tolist() == [1, 2, 3, 4, 5, 6]
    assert unpack(torch.tensor([1.0, 2, 3, 4, 5, 6]), 3).tolist() == matrix.tolist()


@pytest.mark.parametrize("shape", [(5,), (7,), (0,), (2, 3), ()])
def test_a_wrong_length_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"3 x 3 Gram has 6 values"):
        unpack(torch.zeros(shape), 3)
