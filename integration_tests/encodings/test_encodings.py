"""Encodings by name and by setting: sizes, what they can take, and how values are rounded in them."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BitsAndBytesConfig, GPTQConfig

from optimum_dobisvd import DobiSVDConfig
from optimum_dobisvd.encodings.base import LinearShape
from optimum_dobisvd.encodings.bitsandbytes import CODES, fake_quantize_to_code
from optimum_dobisvd.encodings.gptq import fake_quantize_groups
from optimum_dobisvd.encodings.input_gram import Feedback, InputGram, OutputErrors
from optimum_dobisvd.encodings.int8 import fake_quantize_rows
from optimum_dobisvd.encodings.registry import encoding_named, encoding_of

GPTQ_BITS = (2, 3, 4, 8)
NAMES = (
    *("float", "int8", "remap", "gptq2_g16", "gptq3_g32", "gptq4_g1024", "gptq8_rows"),
    *("nf4", "fp4", "nf4_dq", "fp4_dq", "llm_int8"),
)


@pytest.mark.parametrize("name", NAMES)
def test_an_encoding_is_found_by_its_name(name: str) -> None:
    assert encoding_named(name).name == name
    assert encoding_named(name) is encoding_named(name)


@pytest.mark.parametrize(
    "name",
    [
        "gptq5_g32",
        "gptq4",
        "gptq4_g0",
        "nf5",
        "NF4",
        "",
        "gptq4_g32 ",
        "plain",
        "dense",
        "dense_int8",
        None,
        3,
        ["int8"],
    ],
)
def test_other_names_are_refused_with_those_there_are(name: object) -> None:
    with pytest.raises(ValueError, match=r"unknown encoding .*; known: float, int8, remap, gptq4_g32 .*, llm_int8"):
        encoding_named(name)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        (None, "float"),
        ("float", "float"),
        ("int8", "int8"),
        ("remap", "remap"),
        ("gptq4", "gptq4_g128"),
        ("gptq3_g64", "gptq3_g64"),
        ("gptq8_rows", "gptq8_rows"),
        ("nf4", "nf4"),
        ("fp4_dq", "fp4_dq"),
        ("llm_int8", "llm_int8"),
        (GPTQConfig(bits=4, group_size=32), "gptq4_g32"),
        (GPTQConfig(bits=4, group_size=-1, act_group_aware=False), "gptq4_rows"),
        ({"quant_method": "gptq", "bits": 2, "group_size": 64}, "gptq2_g64"),
        (json.dumps({"quant_method": "gptq", "bits": 2, "group_size": 64}), "gptq2_g64"),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "nf4"),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True), "fp4_dq"),
        (BitsAndBytesConfig(load_in_8bit=True), "llm_int8"),
        ({"load_in_8bit": True}, "llm_int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
    ],
)
def test_a_users_setting_means_an_encoding(setting: object, name: str) -> None:
    encoding = encoding_of(setting)
    assert encoding.name == name
    assert encoding_of(encoding.remembered()).name == name
    assert json.loads(json.dumps(encoding.remembered())) == encoding.remembered()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("int3", "unknown quantization 'int3': int8, remap, gptq2, gptq3, gptq4 or gptq8"),
        ("gptq5", "unknown quantization 'gptq5'"),
        ("{bits: 4}", "quantization is no JSON"),
        ({"bits": 4}, "quantization is 'dict', which factors cannot be stored in: give a name such as 'int8', a GPTQ"),
        ({"quant_method": "awq"}, "quantization is 'awq', which factors cannot be stored in"),
        (7, "quantization is 'int', which factors cannot be stored in"),
        (DobiSVDConfig(), "quantization is a DobiSVDConfig, and low rank is what the outer one does"),
        (
            {"quant_method": "gptq", "bits": 4, "group_sice": 32},
            "has no option 'group_sice'; did you mean 'group_size'",
        ),
        ({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}, "has no option 'bnb_4bit_quant_typ'; did you mean"),
        (BitsAndBytesConfig(), "quantizes nothing: pass load_in_4bit=True or load_in_8bit=True"),
        (GPTQConfig(bits=4, group_size=48), "group_size=48.* is none of gptqmodel's"),
    ],
)
def test_a_setting_that_means_none_names_the_remedy(setting: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoding_of(setting)


def test_the_other_bits_at_the_same_group_size_are_a_mixtures_choice() -> None:
    assert encoding_named("gptq4_g64").alternatives == ("gptq2_g64", "gptq3_g64", "gptq8_g64")
    assert encoding_named("gptq2_rows").alternatives == ("gptq3_rows", "gptq4_rows", "gptq8_rows")
    assert {encoding_named(name).alternatives for name in NAMES if not name.startswith("gptq")} == {()}


@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    bits=st.sampled_from(GPTQ_BITS),
    group_size=st.sampled_from([-1, 16, 32, 64]),
)
def test_gptq_bytes_are_those_of_its_tensors(m: int, n: int, bits: int, group_size: int) -> None:
    m, n = 32 * m, 64 * n
    encoding = encoding_named(f"gptq{bits}_rows" if group_size == -1 else f"gptq{bits}_g{group_size}")
    assert encoding.unsupported_reason(m, n) is None
    place = encoding.empty(torch.nn.Linear(n, m, bias=False, device="meta"), min(m, n))
    found = sum(tensor.numel() * tensor.element_size() for tensor in place.parameters())
    assert encoding.bytes(LinearShape(m, n, min(m, n)), 2) == found


def test_ranks_are_outputs_of_one_linear_and_inputs_of_another() -> None:
    needed = {name: encoding_named(name).required_rank_multiple for name in NAMES}
    assert needed == {
        **dict.fromkeys(("float", "int8", "remap", "llm_int8"), 1),
        **dict.fromkeys(("gptq2_g16", "gptq3_g32", "gptq8_rows"), 32),
        "gptq4_g1024": 1024,
        **dict.fromkeys(("nf4", "fp4", "nf4_dq", "fp4_dq"), 64),
    }
    liked = {name: encoding_named(name).rank_multiple for name in NAMES}
    assert liked == {**needed, "int8": 16, "remap": 16}


def test_what_would_make_linears_fit_is_said() -> None:
    encoding = encoding_named("gptq4_g128")
    remedy = encoding.remedy_for({"a": (576, 576), "b": (1536, 576)})
    assert remedy == "take group_size=64 (on the command line gptq4_g64)"
    assert encoding.remedy_for({"a": (30, 30)}) == "take another group_size"
    assert "take another encoding" in encoding_named("nf4").remedy_for({"a": (30, 30)})


def fake_quantize(weight: Tensor, name: str, felt: Tensor | None = None) -> Tensor:
    """Every value rounded on its own."""
    if name in CODES:
        return fake_quantize_to_code(weight, CODES[name], torch.ones(weight.shape[1]) if felt is None else felt)
    if name == "int8":
        return fake_quantize_rows(weight)
    return fake_quantize_groups(weight, int(name[4]), int(name.removeprefix(name[:7])))


@pytest.mark.parametrize("name", ["gptq2_g32", "gptq3_g32", "gptq4_g32", "gptq8_g32", "nf4", "fp4", "int8"])
def test_rounding_is_idempotent_and_of_few_values(name: str) -> None:
    weight = torch.randn(32, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once = fake_quantize(weight, name)
    bits = {"nf4": 4, "fp4": 4, "int8": 8}.get(name, int(name[4]) if name.startswith("gptq") else 0)
    for row in once.view(-1, 32):
        assert len(row.unique()) <= 2**bits
    if name == "int8":  # GPTQ's grid has no value at plus its largest magnitude, and scales of 4 bits are fitted
        assert torch.allclose(fake_quantize(once, name), once, atol=1e-6)
    error = (once - weight).norm() / weight.norm()
    assert error < {2: 0.6, 3: 0.25, 4: 0.2, 8: 0.02}[bits]


def test_finer_encodings_lose_less() -> None:
    weight = torch.randn(64, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    errors = [float((fake_quantize(weight, f"gptq{bits}_g32") - weight).norm()) for bits in GPTQ_BITS]
    assert errors == sorted(errors, reverse=True)
    nf4, fp4 = (float((fake_quantize(weight, name) - weight).norm()) for name in ("nf4", "fp4"))
    assert nf4 < fp4


@pytest.mark.parametrize(
    ("name", "damping"), [("gptq4_g32", 0.1), ("gptq2_g32", 0.1), ("nf4", 0.01), ("fp4", 0.01), ("int8", None)]
)
def test_the_loss_is_that_of_the_error_that_feedback_leaves(name: str, damping: float | None) -> None:
    """Where inputs are independent, of every error its square times its input's variance and what is felt of it."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(24, 64, dtype=torch.float64, generator=generator)
    variances = torch.rand(64, dtype=torch.float64, generator=generator)
    felt = torch.rand(24, dtype=torch.float64, generator=generator)
    damped = variances + (damping or 0) * variances.mean()
    lost = (felt[:, None] * (fake_quantize(weight, name, damped) - weight).square()).sum(0)
    expected = (lost * (variances + (damping or 0) * variances.mean())).sum()
    gram = InputGram(torch.diag(variances))

    def lost_by(name: str, settings: object = None) -> float:
        return float(felt @ encoding_named(name, settings).rounding_errors(weight, 24, gram).total)

    assert lost_by(name) == pytest.approx(float(expected))
    if name == "gptq4_g32":
        settings = GPTQConfig(bits=4, group_size=32, damp_percent=0.3)
        more = (lost * (variances + 0.3 * variances.mean())).sum()
        assert lost_by(name, settings) == pytest.approx(float(more))
    assert lost_by("float") == 0


def test_llm_int8_and_double_quantization_lose_what_their_single_ones_do() -> None:
    weight = torch.randn(24, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def lost_by(name: str, weight: Tensor, full_rank: int) -> float:
        gram = InputGram(torch.eye(weight.shape[1], dtype=torch.float64))
        return float(encoding_named(name).rounding_errors(weight, full_rank, gram).total.sum())

    losses = {name: lost_by(name, weight, 64) for name in NAMES}
    assert losses["llm_int8"] == losses["int8"] == losses["remap"]
    assert losses["nf4_dq"] == losses["nf4"]
    assert losses["fp4_dq"] == losses["fp4"]
    # Of the remapped encoding only the part in 8 bits.
    assert lost_by("remap", weight, 24) == pytest.approx(lost_by("int8", weight[:, :24], 24))


@pytest.mark.parametrize("damping", [None, 1e-9])
def test_of_an_error_that_given_rows_can_express_all_is_within_and_of_one_they_cannot_nothing(
    damping: float | None,
) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(60, 12, dtype=torch.float64, generator=generator)
    rows = torch.randn(4, 12, dtype=torch.float64, generator=generator)
    gram = InputGram(torch.diag(x.square().sum(0)))  # of independent inputs feedback undoes nothing

    def errors(error: Tensor) -> OutputErrors:
        return (
            gram.errors(error, rows) if damping is None else gram.errors_with_feedback(error, Feedback(damping), rows)
        )

    whole = errors(torch.eye(12, dtype=torch.float64))
    assert bool((whole.within <= whole.total * (1 + 1e-6)).all())
    scale = gram.matrix.diagonal()
    assert float((whole.within / scale).sum()) == pytest.approx(4), "as many directions as rows"
    if damping is None:
        combined = torch.randn(3, 4, dtype=torch.float64, generator=generator) @ rows
        torch.testing.assert_close(errors(combined).within, errors(combined).total, rtol=1e-5, atol=0)
        outside = torch.linalg.svd(rows @ gram.matrix)[2][4:]  # H-orthogonal to the rows
        torch.testing.assert_close(errors(outside).within, torch.zeros(8, dtype=torch.float64), atol=1e-6, rtol=0)


@given(seed=st.integers(0, 99), size=st.integers(1, 12))
def test_conditional_variances_are_what_the_inputs_after_one_do_not_tell_of_it(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * size, size, dtype=torch.float64, generator=generator)
    gram = inputs.T @ inputs
    damped = gram + 0.1 * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    found = InputGram(gram).conditional_variances(Feedback(0.1, largest_first=False))
    for i in range(size):
        later = damped[i + 1 :, i + 1 :]
        told = damped[i, i + 1 :] @ torch.linalg.solve(later, damped[i + 1 :, i]) if len(later) else 0.0
        assert float(found[i]) == pytest.approx(float(damped[i, i] - told), rel=1e-8)


def test_inputs_with_the_largest_second_moment_are_rounded_first() -> None:
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(30, 8, dtype=torch.float64, generator=generator) * torch.arange(1, 9)
    gram = inputs.T @ inputs
    order = gram.diagonal().argsort(descending=True)
    as_they_come = InputGram(gram[order][:, order]).conditional_variances(Feedback(0.01, largest_first=False))
    torch.testing.assert_close(InputGram(gram).conditional_variances(Feedback(0.01))[order], as_they_come)


def test_gptqs_two_grids_and_two_orders_are_told_apart() -> None:
    def loss_name(**options: Any) -> str:
        return encoding_of(GPTQConfig(bits=4, group_size=32, **options)).loss_name

    assert loss_name(sym=False, desc_act=True, act_group_aware=False, damp_percent=0.05) == (
        "gptq4_g32-asymmetric-damping0.05-ordered"
    )
    names = {loss_name(), loss_name(sym=False), loss_name(act_group_aware=False)}
    assert len(names) == 3
    weight = torch.rand(8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) + 1
    errors = [(fake_quantize_groups(weight, 3, 32, symmetric=each) - weight).norm() for each in (True, False)]
    assert errors[1] < errors[0]


def test_inputs_that_are_always_zero_make_no_error() -> None:
    found = InputGram(torch.zeros(5, 5)).conditional_variances(Feedback(0.01))
    assert bool(torch.isfinite(found).all())
