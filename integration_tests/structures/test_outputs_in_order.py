"""Structures whose last linear's rows are the outputs: some of the rows alone give these outputs."""

import pytest
import torch
from torch import nn

from optimum_dobisvd.structures.registry import STRUCTURES


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_rows_of_the_last_linear_are_outputs_where_it_is_said(name):
    structure = STRUCTURES.get(name)
    torch.manual_seed(0)
    module = structure(12, 10, 4 if structure.has_rank else None, bias=False)
    for key, tensor in module.own().items():
        tensor.copy_(torch.randperm(len(tensor)))
        assert structure.problem_with(key, tensor) is None
    x = torch.randn(3, 12)
    whole = module(x)
    last = list(module.children())[-1]
    with torch.no_grad():
        last.weight[:2] = 0
    changed = (module(x) != whole).any(0).nonzero().flatten().tolist()
    assert (changed == [0, 1]) == structure.outputs_in_order
    assert isinstance(last, nn.Linear)
