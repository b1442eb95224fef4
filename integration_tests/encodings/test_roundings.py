"""How codes are chosen is asked for apart from what they are stored in, and refused in words where it cannot be."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoRoundConfig, GPTQConfig

from integration_tests.quantization.quantized_models import SETTINGS, needs_bnb, needs_gptq
from optimum_dobisvd import DobiSVDConfig
from optimum_dobisvd.encodings.base import Encoding
from optimum_dobisvd.encodings.input_gram import InputGram
from optimum_dobisvd.encodings.int8 import quantize_rows
from optimum_dobisvd.encodings.learned_rounding import LearnableLinear, LearnedRoundingSettings, SignedDescent
from optimum_dobisvd.encodings.registry import beside, encoding_of, rounded

LEARNABLE = (
    *(pytest.param(name, marks=needs_bnb) for name in ("nf4", "fp4", "nf4_dq")),
    *(pytest.param(name, marks=needs_gptq) for name in ("gptq2_g32", "gptq3_rows", "autoround4_g64")),
    "int8",
)


def learned(name: str, linear: nn.Linear, dtype: torch.dtype = torch.float32) -> tuple[Encoding, LearnableLinear]:
    encoding = rounded(encoding_of(name), "learned", {})
    return encoding, encoding.learnable(linear, dtype)


def matrix(encoding: Encoding, module: Any) -> torch.Tensor:
    """What one of its linears stands for, from its tensors."""
    if encoding.quant_method == "bitsandbytes":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    if encoding.quant_method == "gptq":
        return module.dequantize_weight().T.float()
    return module.dense_matrix()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEARNABLE)
def test_learning_begins_with_the_nearest_codes(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 64).to(dtype)
    encoding, start = learned(name, linear, dtype)
    module, _ = rounded(encoding, "nearest", {}).quantize(linear, 64, dtype)
    lost, least = ((each - linear.weight).norm() for each in (start.weight, matrix(encoding, module)))
    assert float(lost) == pytest.approx(float(least), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEARNABLE)
def test_what_is_stored_is_what_was_learned_with(name: str, dtype: torch.dtype) -> None:
    """Scales that were moved, too, and they are such as checkpoints may have."""
    torch.manual_seed(1)
    linear = nn.Linear(128, 64).to(dtype)
    encoding, learnable = learned(name, linear, dtype)
    with torch.no_grad():
        for parameter in learnable.learned()[1:]:
            parameter.uniform_(0.6, 1)
        learnable.offsets.uniform_(-0.5, 0.5)
        learnable.highest[0] = 0  # a grid without extent
        expected = learnable.weight
    module = encoding.from_learned(learnable)
    found = matrix(encoding, module)
    # gptqmodel multiplies codes by scales in float16, bitsandbytes gives the model's dtype.
    assert torch.allclose(found, expected, rtol=1e-3 if dtype is torch.float32 else 1e-2, atol=0)
    assert bool(torch.isfinite(found).all())
    if name == "int8":
        assert torch.equal(found, expected)
        assert bool((module.scale > 0).all())
        assert module.scale.dtype == dtype


def test_learned_scales_of_int8_begin_as_those_it_has() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(40, 12)
    _, start = learned("int8", linear)
    integers, scale = quantize_rows(linear.weight.detach(), torch.float32)
    assert torch.equal(start.rounded()[0], integers)
    assert torch.equal(start.rounded()[1], scale)


@pytest.mark.parametrize("name", LEARNABLE)
def test_descent_loses_less_than_the_nearest_codes(name: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 64)
    inputs = torch.randn(256, 8) @ torch.randn(8, 128) + 0.1 * torch.randn(256, 128)
    target = linear(inputs).detach()
    encoding, learnable = learned(name, linear)
    nearest = float(nn.functional.mse_loss(learnable(inputs), target).detach())
    descent = SignedDescent([learnable], LearnedRoundingSettings(steps=60))
    for _ in range(60):
        descent.step(nn.functional.mse_loss(learnable(inputs), target))
    descent.take_best()
    stored = nn.functional.linear(inputs, matrix(encoding, encoding.from_learned(learnable)), linear.bias)
    assert float(nn.functional.mse_loss(stored, target).detach()) < 0.7 * nearest


def test_what_is_trained_along_moves_by_adam_and_goes_back_with_the_best_rounding() -> None:
    _, learnable = learned("int8", nn.Linear(32, 8))
    norm = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    settings = LearnedRoundingSettings(steps=4, rest_learning_rate=0.1)
    descent, seen = SignedDescent([learnable], settings, [norm]), []
    for extra in (0.0, -5.0, 0.0, 0.0):
        seen.append(norm.detach().clone())
        descent.step((learnable(torch.ones(1, 32)).sum() * 0 + norm.sum()) + extra)
    steps = [float((before - after).float().mean()) for before, after in pairwise(seen)]
    assert steps == pytest.approx([0.1, 0.075, 0.05], abs=0.01), "a fixed length that falls to zero"
    descent.take_best()
    assert torch.equal(norm.detach(), seen[1])
    fine = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    descent = SignedDescent([], LearnedRoundingSettings(steps=100, rest_learning_rate=1e-3), [fine])
    for _ in range(100):
        descent.step(fine.float().sum())
    assert float(fine.detach().float().mean()) < 0.97, "steps that bfloat16 alone would lose"


DEFAULTS = [
    ("int8", "nearest", False),
    ("remap", "nearest", False),
    ("llm_int8", "nearest", False),
    ("nf4", "feedback", False),
    ("gptq4_g32", "feedback", True),
    ("autoround3_g32", "learned", True),
]


@pytest.mark.parametrize(("name", "algorithm", "needs_text"), DEFAULTS)
def test_without_a_word_it_is_what_the_quantization_means(name: str, algorithm: str, needs_text: bool) -> None:
    encoding = DobiSVDConfig(ratio=0.5, quantization=name).encoding
    assert encoding.rounding.algorithm == algorithm
    assert encoding.needs_text == needs_text


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("gptq4_g32", ("nearest", "feedback", "learned")),
        ("autoround3_g32", ("nearest", "feedback", "learned")),
        ("nf4", ("nearest", "feedback", "learned")),
        ("int8", ("nearest", "learned")),
        ("remap", ("nearest",)),
        ("llm_int8", ("nearest",)),
        ("float", ()),
    ],
)
def test_any_that_the_encoding_takes_can_be_asked_for_and_others_are_refused(name: str, known: tuple) -> None:
    for algorithm in ("nearest", "feedback", "learned"):
        if algorithm in known:
            encoding = DobiSVDConfig(ratio=0.5, quantization=name, rounding=algorithm).encoding
            assert encoding.rounding.algorithm == algorithm
            assert encoding.needs_text == (algorithm != "nearest")
            assert (encoding.learned is not None) == (algorithm == "learned")
        else:
            words = f"rounding='{algorithm}' does not go with {name}, which takes"
            with pytest.raises(ValueError, match=words):
                DobiSVDConfig(ratio=0.5, quantization=name, rounding=algorithm)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounding": "learnt"}, "rounding is one of 'nearest', 'feedback', 'learned', got 'learnt'"),
        (
            {"rounding": "learned", "rounding_settings": {"step": 9}},
            "'step', which .* has not; did you mean 'steps'",
        ),
        ({"rounding": "learned", "rounding_settings": {"zzz": 9}}, "'zzz', which .*; there are: steps, nsamples"),
        ({"rounding": "learned", "rounding_settings": {"steps": 0}}, "steps of learned rounding must be a whole"),
        ({"rounding": "learned", "rounding_settings": {"steps": 2.5}}, "steps of learned rounding must be a whole"),
        ({"rounding": "learned", "rounding_settings": {"batch_size": None}}, "batch_size of learned"),
        ({"rounding": "learned", "rounding_settings": {"rest_learning_rate": -1}}, "rest_learning_rate .* above 0"),
        (
            {"rounding": "feedback", "rounding_settings": {"steps": 5}},
            "'steps', which rounding 'feedback' has not; there are: target",
        ),
        ({"rounding": "nearest", "rounding_settings": {"target": "dense"}}, "there are: none"),
        ({"rounding_settings": {"target": "dens"}}, "target is one of 'compressed', 'dense', got 'dens'"),
        ({"rounding_settings": {"steps": 5}}, "'steps', which rounding 'feedback' has not; there are: target"),
    ],
)
def test_settings_that_there_are_not_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DobiSVDConfig(ratio=0.3, quantization="nf4", **options)


def test_nothing_is_rounded_where_nothing_is_quantized() -> None:
    with pytest.raises(ValueError, match="does not go with float.*give a quantization"):
        DobiSVDConfig(ratio=0.5, rounding="learned")


def test_settings_go_before_those_of_an_autoround_config() -> None:
    config = DobiSVDConfig(
        ratio=0.3, quantization=AutoRoundConfig(bits=3, iters=50, nsamples=9), rounding_settings={"steps": 7}
    )
    assert config.encoding.learned == LearnedRoundingSettings(steps=7, nsamples=9)
    config = DobiSVDConfig(ratio=0.3, quantization=AutoRoundConfig(bits=3, iters=50), rounding="feedback")
    assert config.encoding.learned is None


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": AutoRoundConfig(bits=3, group_size=32, sym=False, iters=50)},
        {"quantization": GPTQConfig(bits=3, group_size=32), "rounding": "learned", "rounding_settings": {"steps": 50}},
        {"quantization": "int8", "rounding": "learned", "rounding_settings": {"steps": 50}},
        {"quantization": SETTINGS["nf4"](), "rounding": "nearest"},
    ],
)
def test_a_request_keeps_its_rounding_as_json(options: dict[str, Any]) -> None:
    config = DobiSVDConfig(ratio=0.3, **options)
    again = DobiSVDConfig.from_dict(config.to_dict())
    assert again.encoding.rounding == config.encoding.rounding
    assert again.encoding.name == config.encoding.name


def test_in_a_mixture_8_bits_are_learned_along_and_stay_nearest_beside_feedback() -> None:
    assert beside(encoding_of("autoround3_g32"), "int8").learned == LearnedRoundingSettings()
    assert beside(encoding_of("autoround3_g32"), "gptq8_g32").learned == LearnedRoundingSettings()
    assert beside(encoding_of("gptq3_g32"), "int8").rounding.algorithm == "nearest"
    assert beside(encoding_of("autoround3_g32"), "float").rounding.algorithm == "nearest"


@pytest.mark.parametrize("name", ["gptq3_g32", pytest.param("nf4", marks=needs_bnb)])
def test_nearest_codes_are_told_to_lose_what_they_lose(name: str) -> None:
    """Without error feedback nothing makes up for an error."""
    torch.manual_seed(0)
    weight = torch.randn(48, 128)
    inputs = torch.randn(500, 16) @ torch.randn(16, 128) + 0.2 * torch.randn(500, 128)
    gram = InputGram(inputs.T @ inputs)
    nearest = rounded(encoding_of(name), "nearest", {})
    linear = nn.Linear(128, 48, bias=False)
    linear.weight.data = weight
    told = float(nearest.rounding_errors(weight, 48, gram).total.sum())
    error = learned(name, linear)[1].weight.detach() - weight
    assert told == pytest.approx(float((inputs @ error.T).square().sum()), rel=0.25)
    assert nearest.loss_name != encoding_of(name).loss_name
