"""One linear rounded by GPTQ or bitsandbytes: what stands in its place, and how much closer its outputs are."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig

from integration_tests.quantization.quantized_models import SETTINGS, marked, needs_bnb, needs_gptq, planned, wide
from integration_tests.tiny_models import tokens
from optimum_dobisvd import DobiSVDConfig, LowRankLinear
from optimum_dobisvd.encodings.base import matrix_of
from optimum_dobisvd.encodings.error_feedback import ErrorFeedback
from optimum_dobisvd.encodings.gptq import fake_quantize_groups
from optimum_dobisvd.encodings.input_gram import InputGram
from optimum_dobisvd.encodings.registry import encoding_of
from optimum_dobisvd.factorization.kfac import OutputRoot, kfac
from optimum_dobisvd.structures.format import Format
from optimum_dobisvd.structures.registry import STRUCTURES

GPTQS = ("2 asymmetric", "3 asymmetric", "4 asymmetric", "4", "8")


def quantize(linear, settings, gram=None):
    full_rank = min(linear.out_features, linear.in_features)
    return encoding_of(settings).quantize(linear, full_rank, torch.float32, gram)


@needs_bnb
def test_error_feedback_keeps_outputs_closer_than_rounding_each_value():
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 48, bias=False)
    inputs = torch.randn(1000, 128) @ torch.randn(128, 128)
    gram = (inputs.T @ inputs).double()
    for nested in (False, True):
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
        new, matrix = quantize(linear, settings, gram)
        alone, _ = quantize(linear, settings)
        assert torch.allclose(matrix_of(new).double(), matrix, atol=1e-6)
        lost = [float(((matrix_of(each) - linear.weight) @ inputs.T).norm()) for each in (new, alone)]
        assert lost[0] < 0.8 * lost[1]


@pytest.mark.parametrize("key", marked("nf4", "nf4_dq", "fp4", "llm_int8"))
@pytest.mark.parametrize("bias", [True, False])
def test_without_text_the_matrix_that_is_returned_is_the_rounded_one(key, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 48, bias=bias)
    weight = linear.weight.detach().clone()
    new, matrix = quantize(linear, SETTINGS[key]())
    assert float((matrix - weight).norm()) > 1e-3 * float(weight.norm())
    assert torch.allclose(matrix_of(new), matrix.float(), atol=1e-4)


@pytest.mark.parametrize("key", marked("nf4", "nf4_dq", "fp4", "llm_int8", "gptq"))
def test_a_weight_may_be_in_a_wider_dtype_than_the_model(key):
    """A refitted one is in float64."""
    torch.manual_seed(0)
    narrow, wider = torch.nn.Linear(128, 64), torch.nn.Linear(128, 64).double()
    wider.load_state_dict(narrow.state_dict())
    inputs = torch.randn(1000, 128) @ torch.randn(128, 128)
    gram = (inputs.T @ inputs).double()
    expected, found = (quantize(linear, SETTINGS[key](), gram)[0] for linear in (narrow, wider))
    torch.testing.assert_close(matrix_of(found), matrix_of(expected))
    if hasattr(expected.weight, "quant_state"):
        assert found.weight.quant_state.dtype == expected.weight.quant_state.dtype == torch.float32


@needs_gptq
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_rounds_to_what_its_kernel_computes_and_beats_the_nearest_values(bits):
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 64)
    weight = linear.weight.detach()
    inputs = torch.randn(1000, 128) @ torch.randn(128, 128)
    gram = (inputs.T @ inputs).double()
    for options in ({}, {"desc_act": True}, {"sym": False}):
        kernel, matrix = quantize(linear, GPTQConfig(bits=bits, group_size=32, **options), gram)
        assert torch.allclose(matrix_of(kernel), matrix, atol=2e-3)
        assert torch.equal(kernel.bias.float(), linear.bias.half().float())
        errors = [each - weight for each in (matrix, fake_quantize_groups(weight, bits, 32))]
        lost = [float((error @ inputs.T).norm()) for error in errors]
        assert lost[0] < lost[1]


@needs_gptq
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "size", "most"),
    [(2, 32, 0.75), (3, 32, 0.92), (3, 128, 0.85), (4, 64, 0.95), (4, -1, 0.95), (8, 32, 1.01)],
)
def test_gptqs_grids_are_fitted_to_their_groups(bits, size, most, symmetric):
    """Where no input makes up for another, they lose less than grids over all values of a group."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(512, 64, bias=False)
    linear.weight.data = torch.randn(64, 512, generator=generator)
    weight = linear.weight.detach()
    settings = GPTQConfig(bits=bits, group_size=size, sym=symmetric, desc_act=True, act_group_aware=False)
    _, matrix = quantize(linear, settings, torch.eye(512).double())
    whole = fake_quantize_groups(weight, bits, size, symmetric=symmetric)
    assert (matrix - weight).square().sum() < most * (whole - weight).square().sum()


@pytest.mark.parametrize("key", marked("nf4", "llm_int8"))
def test_ranks_are_alike_before_they_are_rounded(key, tmp_path):
    """Without the rotation everything else works as well, and perplexity is far worse."""
    dense = wide("llama")
    for name, parameter in dense.named_parameters():
        if "_proj" in name:
            left, values, right = torch.linalg.svd(parameter.data, full_matrices=False)
            parameter.data = left * torch.logspace(0, -3, len(values)) @ right
    dense.save_pretrained(tmp_path / "dense")

    def spreads(model):
        sizes = [matrix_of(m.first).norm(dim=1) for m in model.modules() if isinstance(m, LowRankLinear)]
        assert sizes
        return [float(each.max() / each.min()) for each in sizes]

    def compressed(encoding, rank, settings):
        plan = planned(dense, [(encoding, rank)])
        config = DobiSVDConfig(method="output_pca", dataset=tokens(6, 24), plan=plan, quantization=settings)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)

    unquantized = compressed("float", 40, None)
    assert max(spreads(unquantized)) > 6
    assert max(spreads(compressed(key, 64, SETTINGS[key]()))) < 3
    unquantized.save_pretrained(tmp_path / "unquantized")
    again = AutoConfig.from_pretrained(tmp_path / "unquantized")
    again.quantization_config["quantization"] = SETTINGS[key]().to_dict()
    assert max(spreads(AutoModelForCausalLM.from_pretrained(tmp_path / "unquantized", config=again))) < 3


@pytest.mark.parametrize("key", marked("nf4", "nf4_dq", "fp4"))
def test_scales_that_bitsandbytes_is_given_are_the_fitted_ones(key):
    """They lose clearly less than its own, and its tensors stand for the matrix that was returned."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(128, 96, bias=False)
    linear.weight.data = torch.randn(96, 128, generator=generator)
    inputs = (
        torch.randn(500, 128, generator=generator)
        * torch.logspace(-1.5, 0.5, 128)[torch.randperm(128, generator=generator)]
    )
    gram = (inputs.T @ inputs).double()
    new, matrix = quantize(linear, SETTINGS[key](), gram)
    state = quantize(linear, SETTINGS["nf4" if key == "nf4_dq" else key]())[0].weight.quant_state
    own = ErrorFeedback(gram).round(linear.weight.data, state.code.double().sort()[0], state.absmax.view(96, -1))[1]

    def lost(stands_for):
        error = stands_for.double() - linear.weight.data.double()
        return float(((error @ gram) * error).sum())

    assert lost(matrix) < 0.95 * lost(own)
    with torch.no_grad():
        assert torch.allclose(new(torch.eye(128)).T.double(), matrix, atol=1e-5)


def settings_of(key):
    if key.startswith("gptq"):
        options = {"sym": False, "desc_act": True, "act_group_aware": False} if key.endswith("asymmetric") else {}
        return GPTQConfig(bits=int(key[4]), group_size=32, damp_percent=0.01, **options)
    return SETTINGS[key]()


@pytest.mark.parametrize(
    "key", [*marked("nf4", "llm_int8"), *(pytest.param(f"gptq{name}", marks=needs_gptq) for name in GPTQS)]
)
@pytest.mark.parametrize("structure", ["dense", "low_rank", "pivoted"])
def test_what_rounding_costs_is_near_what_was_predicted_without_rounding(structure, key):
    """Of weights, inputs and gradients that are correlated; what truncation costs is not counted."""
    m, n, rank = 192, 256, 64
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def gram_of(size):
        samples = normal(4 * size, size) @ (normal(size, size) / size**0.5 + torch.eye(size))
        return samples.T @ samples / len(samples)

    gram, root, weight = (
        gram_of(n),
        torch.linalg.cholesky(gram_of(m)),
        normal(m, n) + 2 * normal(m, 20) @ normal(20, n),
    )
    encoding = encoding_of(settings_of(key))
    format = Format(STRUCTURES.get(structure), encoding)
    source = kfac(weight, (gram, OutputRoot(root))).truncate(rank) if format.structure.has_rank else weight
    predicted = format.quantization_loss(source, InputGram(gram), root)
    weights = format.structure.written(source, encoding.gauge, torch.float32)
    _, matrices = format.quantize(weights, None, torch.float32, min(m, n), gram)

    def lost(matrix):
        error = root.T @ (matrix.double() - weight)
        return float(((error @ gram) * error).sum())

    exact = source.product() if format.structure.has_rank else source
    measured = lost(format.structure.product(matrices)) - lost(exact)
    assert 0.7 * measured < predicted < 1.3 * measured
