"""Codes learned by signed descent: they begin as the nearest ones, stay on the grid, and lose less in the end."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoRoundConfig

from integration_tests.inference.compressed_models import compressed
from optimum_dobisvd.encodings.gptq import fake_quantize_groups
from optimum_dobisvd.encodings.gptq_rounding import LearnableGroups
from optimum_dobisvd.encodings.learned_rounding import LearnedRoundingSettings, SignedDescent
from optimum_dobisvd.encodings.registry import encoding_of
from optimum_dobisvd.pipeline.learn_rounding import make_learnable


def linear(m: int, n: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(n, m, bias=bias)


@given(
    m=st.integers(1, 9),
    groups=st.integers(1, 5),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rounding_begins_as_the_nearest_on_gptqs_grid(m, groups, bits, symmetric, seed) -> None:
    plain = linear(m, 16 * groups, seed)
    learned = LearnableGroups(plain, bits, 16, symmetric)
    found = learned.weight.detach().unflatten(1, (-1, 16))
    step, zero = (each.detach() for each in learned.grid())
    values = plain.weight.detach().unflatten(1, (-1, 16))
    levels = (torch.arange(2**bits) - zero) * step
    least = (values[..., None] - levels[:, :, None]).abs().amin(-1)
    assert bool(((values - found).abs() <= least + 1e-4 * step).all())
    # The same grid as GPTQ's, but that its steps are rounded to float16, which may take a value to the next code.
    expected = fake_quantize_groups(plain.weight.detach(), bits, 16, symmetric=symmetric).unflatten(1, (-1, 16))
    assert float(((found - expected).abs() / step).max()) < 1.1


@pytest.mark.parametrize("symmetric", [False, True])
def test_descent_loses_less_than_the_nearest_codes_and_keeps_to_the_grid(symmetric: bool) -> None:
    plain = linear(24, 64)
    inputs = torch.randn(256, 8) @ torch.randn(8, 64) + 0.1 * torch.randn(256, 64)
    target = plain(inputs).detach()
    learned = LearnableGroups(plain, 3, 32, symmetric)

    def loss() -> torch.Tensor:
        return nn.functional.mse_loss(learned(inputs), target)

    nearest = float(loss().detach())
    descent = SignedDescent([learned], LearnedRoundingSettings(steps=60))
    for _ in range(60):
        descent.step(loss())
    descent.take_best()
    assert float(loss().detach()) < 0.5 * nearest
    step, zero = learned.grid()
    codes = learned.codes(step, zero)
    assert torch.equal(codes, codes.round())
    assert 0 <= float(codes.detach().min()) <= float(codes.detach().max()) <= 7
    assert torch.equal(step, step.half().float())
    assert float(learned.offsets.abs().max()) <= 0.5


@given(bits=st.sampled_from([2, 3, 4]), symmetric=st.booleans(), seed=st.integers(0, 99))
def test_fitted_ranges_lose_no_more_than_the_whole_ones_in_any_group(bits: int, symmetric: bool, seed: int) -> None:
    learned = LearnableGroups(linear(8, 48, seed), bits, 16, symmetric)
    moments = torch.rand(48, generator=torch.Generator().manual_seed(seed)) ** 4
    moments[:3] = 0  # an input that is always zero counts nothing

    def lost() -> torch.Tensor:
        missed = (learned.weight.detach() - learned._groups.flatten(1)).square() * moments
        return missed.unflatten(1, (-1, 16)).sum(-1)

    whole = lost()
    learned.fit_ranges(moments)
    fitted = lost()
    assert bool((fitted <= whole * (1 + 1e-6)).all())
    assert float(fitted.sum()) < float(whole.sum())
    assert 0 < float(learned.highest.min()) <= float(learned.highest.max()) <= 1


def test_the_second_linear_begins_as_what_makes_the_best_of_the_first() -> None:
    model = compressed("pivoted", "float", rank=32)
    module = model.model.layers[0].mlp.up_proj
    wanted, encoding = copy.deepcopy(module), encoding_of("autoround3_g32")
    torch.manual_seed(0)
    inputs = torch.randn(512, module.in_features) * torch.rand(module.in_features) ** 2
    moments = {"up.first": inputs.square().mean(0), "up.second": wanted.first(inputs).square().mean(0).detach()}

    def missed(gram: torch.Tensor | None) -> float:
        learned = copy.deepcopy(module)
        make_learnable("up", learned, encoding, torch.float32, moments, gram)
        return float((learned(inputs) - wanted(inputs)).square().mean().detach())

    assert missed(inputs.T @ inputs) < 0.8 * missed(None)


def test_the_best_rounding_is_kept_where_the_last_one_is_worse() -> None:
    learned = LearnableGroups(linear(4, 32), 4, 32, False)
    descent = SignedDescent([learned], LearnedRoundingSettings(steps=2, learning_rate=0.4))
    before = learned.weight.detach().clone()
    for loss in (1.0, 2.0):
        descent.step(learned.weight.sum() * 0 + learned.offsets.sum() + loss - learned.offsets.sum().detach())
    assert not torch.equal(learned.weight, before)
    descent.take_best()
    assert torch.equal(learned.weight, before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, "2, 3, 4 or 8 bits"),
        ({"group_size": 31}, "none of gptqmodel's"),
        ({"iters": 0}, "whole number"),
        ({"lr": "fast"}, "number above 0"),
        ({"act_bits": 8}, "leave it out"),
        ({"sym": "no"}, "must be True or False"),
        ({"backend": "marlin"}, "leave it out"),
        ({"packing_format": "auto_round:auto_awq"}, "leave it out"),
        ({"super_bits": 6}, "leave it out"),
        ({"layer_config": {"q_proj": {"bits": 8}}}, "modules_to_not_convert"),
    ],
)
def test_options_that_gptqs_tensors_cannot_hold_are_refused(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        encoding_of(AutoRoundConfig(**options))


def test_a_checkpoint_remembers_gptq() -> None:
    encoding = encoding_of("autoround3_g32")
    assert encoding.name == "gptq3_g32"
    assert encoding.learned == LearnedRoundingSettings()
    remembered = encoding.remembered()
    assert encoding_of(remembered).name == "gptq3_g32"
    assert encoding_of(remembered).learned is None
    assert remembered["sym"] is False
