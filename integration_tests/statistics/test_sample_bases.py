"""The second pass of dobi_ipca, sample by sample, on real blocks."""

import pytest
import torch
from torch import Tensor, nn

from integration_tests.statistics.tiny_model_statistics import inputs_by_linear, windows_of
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd.calibration.runner import BlockRunner
from optimum_dobisvd.factorization.dobi_ipca import IncrementalBasis, sample_basis
from optimum_dobisvd.factorization.factors import Factors
from optimum_dobisvd.factorization.sample_bases import SampleBasisVisitor
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.model.linears import weight_matrix

RANK = 6


def second_pass(
    model: nn.Module, ids: Tensor, mask: Tensor | None = None, names: tuple[str, ...] = ()
) -> dict[str, Factors]:
    layout = find_layout(model)
    found: dict[str, Factors] = {}
    ranks = dict.fromkeys(names or layout.linears, RANK)
    visitor = SampleBasisVisitor(layout.linears_of, ranks, lambda _, factors: found.update(factors))
    BlockRunner(model, layout.blocks, windows_of(ids, mask), batch_size=2).run(visitor)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return found


def by_hand(model: nn.Module, name: str, samples: list[Tensor]) -> Tensor:
    """Algorithm 2 over `x W^T` of each sample alone: the bias is no part of it."""
    weight = weight_matrix(model.get_submodule(name)).double()
    running = IncrementalBasis(weight.shape[0], RANK)
    for ids in samples:
        x = inputs_by_linear(model, [name], ids[None])[name]
        running.update(sample_basis(x.T @ weight.T, RANK))
    basis = running.basis()
    return basis @ basis.T @ weight


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "opt", "gpt2", "gpt_neox"])
def test_factors_are_those_of_each_samples_outputs(model_type: str) -> None:
    model = tiny(model_type)
    ids = tokens(5, 24)
    found = second_pass(model, ids)
    layout = find_layout(model)
    assert found.keys() == layout.linears.keys()
    for name in layout.linears_of(list(layout.blocks)[1]):
        expected = by_hand(model, name, list(ids))
        assert found[name].second.shape[1] == RANK
        torch.testing.assert_close(found[name].product(), expected, rtol=0, atol=1e-3 * float(expected.norm()))


def test_padding_is_no_part_of_a_sample() -> None:
    model = tiny("llama")
    ids, mask = tokens(4, 24), torch.ones(4, 24, dtype=torch.bool)
    mask[1, 10:] = mask[2, 3:] = False
    found = second_pass(model, ids, mask)
    name = "model.layers.1.mlp.up_proj"
    expected = by_hand(model, name, [row[keep] for row, keep in zip(ids, mask, strict=True)])
    torch.testing.assert_close(found[name].product(), expected, rtol=0, atol=1e-3 * float(expected.norm()))


def test_only_planned_linears_are_watched() -> None:
    name = "model.layers.2.self_attn.o_proj"
    assert second_pass(tiny("llama"), tokens(2, 16), names=(name,)).keys() == {name}


def test_a_linear_whose_outputs_are_all_zero_gets_the_directions_of_its_weight() -> None:
    model = tiny("llama")
    model.model.layers[1].input_layernorm.weight.data.zero_()
    name = "model.layers.1.self_attn.q_proj"
    found = second_pass(model, tokens(2, 16))[name]
    left, values, right = torch.linalg.svd(model.get_submodule(name).weight.double(), full_matrices=False)
    rank = found.second.shape[1]
    torch.testing.assert_close(found.product(), (left[:, :rank] * values[:rank]) @ right[:rank])


def test_rows_that_are_not_tokens_of_samples_are_refused() -> None:
    class Routed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x[:, :5]).mean(1, keepdim=True).expand(x.shape)

    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.o_proj = Routed(attention.o_proj)
    with pytest.raises(ValueError, match=r"o_proj\.inner: its outputs are not one row per token"):
        second_pass(model, tokens(2, 16))
