"""Encodings of which a process can hold a part: rows and columns of their tensors are those of the linear."""

import pytest
import torch
from torch import nn

from optimum_dobisvd.encodings.base import LinearShape, matrix_of
from optimum_dobisvd.encodings.registry import encoding_named

NAMES = ["float", "int8", "remap", "gptq4_g32", "nf4", "llm_int8"]
SLICEABLE = [name for name in NAMES if encoding_named(name).sliceable]


def test_which_they_are():
    """An encoding that packs values, or treats parts of a matrix differently, is none."""
    assert SLICEABLE == ["float", "int8"]


@pytest.mark.parametrize("name", SLICEABLE)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_part_of_the_tensors_is_that_part_of_the_matrix(name, axis):
    encoding = encoding_named(name)
    torch.manual_seed(0)
    linear, matrix = encoding.quantize(nn.Linear(24, 20, bias=False), 20, torch.float32)
    kept = torch.tensor([1, 2, 5, 11])
    shape = (4, 24) if axis == 0 else (20, 4)
    part = encoding.empty(nn.Linear(shape[1], shape[0], bias=False, device="meta"), 20)
    expected = encoding.tensors(LinearShape(*shape, full_rank=20))
    for key, tensor in linear.named_parameters():
        cut = tensor if tensor.shape == torch.Size(expected[key][0]) else tensor.index_select(axis, kept)
        assert list(cut.shape) == expected[key][0]
        setattr(part, key, nn.Parameter(cut, requires_grad=False))
    assert torch.equal(matrix_of(part), matrix.float().index_select(axis, kept))
