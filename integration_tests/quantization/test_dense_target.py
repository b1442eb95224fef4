"""Error feedback towards the outputs of the dense model, on the inputs that the compressed prefix gives."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTQConfig

from integration_tests.checkpoint.reloading import logits
from integration_tests.quantization.quantized_models import SETTINGS, needs_bnb, needs_gptq, planned, wide
from integration_tests.statistics.tiny_model_statistics import inputs_by_linear, windows_of
from integration_tests.tiny_architectures import tiny_architecture
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, convert
from optimum_dobisvd.calibration.paired import PairedRunner
from optimum_dobisvd.encodings.bitsandbytes import FourBit
from optimum_dobisvd.factorization.factors import Factors
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.model.offloaded import dense_weight
from optimum_dobisvd.pipeline import quantize as quantizing
from optimum_dobisvd.pipeline.dense_beside import unrounded
from optimum_dobisvd.structures.base import compressed_linears
from optimum_dobisvd.structures.format import format_named
from optimum_dobisvd.structures.placement import replace_linear

TOWARDS_DENSE = {"rounding": "feedback", "rounding_settings": {"target": "dense"}}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("structure", ["dense", "low_rank", "pivoted"])
def test_each_linear_is_fitted_to_what_it_gives_in_the_dense_model(structure: str) -> None:
    """On inputs that differ from those there; with nothing rounded it is the least squares that its rank allows."""
    torch.manual_seed(0)
    m, n, k = 20, 24, 12
    there = normal(n, 400)
    here = there + 0.5 * (normal(n, n) / n**0.5) @ there + 0.1 * normal(n, 400)
    factors = Factors(normal(m, k), normal(k, n))
    source = factors if structure != "dense" else factors.product()
    format = format_named(structure, "float")
    weights = format.structure.written(source, format.encoding.gauge, torch.float64)
    gram, crossed = here @ here.T, there @ here.T
    _, fitted = format.quantize(weights, None, torch.float64, min(m, n), gram, crossed)
    target = factors.product() @ there

    def lost(matrix: Tensor) -> float:
        return float((target - matrix.double() @ here).square().sum())

    best = lost(torch.linalg.lstsq(here.T, target.T).solution.T)
    found = lost(format.structure.product({name: each.double() for name, each in fitted.items()}))
    assert found < 1.05 * best < 0.3 * lost(factors.product())


@pytest.mark.parametrize("structure", ["low_rank", "pivoted"])
def test_what_the_first_linear_lost_is_made_up_for_in_the_second(structure: str) -> None:
    torch.manual_seed(0)
    m, n, k = 20, 24, 12
    x = normal(n, n) @ normal(n, 400)
    factors = Factors(normal(m, k), normal(k, n))
    kind = format_named(structure, "float").structure
    weights = kind.written(factors, format_named(structure, "float").encoding.gauge, torch.float64)
    rounded = weights["first"] + 0.1 * normal(k, n)
    inputs = (x @ x.T, x @ x.T)
    second = kind.aimed("second", weights, {**weights, "first": rounded}, inputs)
    target = weights["second"] @ weights["first"] @ x
    best = torch.linalg.lstsq((rounded @ x).T, target.T).solution.T

    def lost(matrix: Tensor) -> float:
        return float((target - matrix @ rounded @ x).square().sum())

    assert lost(best) <= lost(second) < 1.05 * lost(best) < 0.95 * lost(weights["second"])


class Keeper(FourBit):
    """Rounds nothing and doubles every weight, so that the blocks after it read other inputs than in the dense one."""

    def __init__(self) -> None:
        super().__init__("nf4", nested=False)

    def quantize(
        self, linear: nn.Linear, full_rank: int, dtype: torch.dtype, gram: Tensor | None = None
    ) -> tuple[nn.Module, Tensor]:
        linear.weight = nn.Parameter((2 * linear.weight.detach()).to(dtype))
        return linear, linear.weight.detach()


@pytest.mark.parametrize("in_turn", [False, True])
def test_products_are_of_the_same_tokens_in_both_models(in_turn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With padding, and the first token of every window counted as a 32nd of it."""
    model = tiny("llama")
    dense, names = copy.deepcopy(model), list(find_layout(model).linears)
    for name in names:
        replace_linear(model, name, format_named("dense", "nf4"), None, dense_weight(model.get_submodule(name)))
    found: dict[str, Tensor] = {}
    rounds = quantizing._quantize_one

    def observed(name: str, module: Any, encoding: Any, gram: Tensor, crossed: Tensor) -> None:
        found[name] = crossed
        rounds(name, module, encoding, gram, None)  # or it would make up for the doubling

    monkeypatch.setattr(quantizing, "_quantize_one", observed)
    ids, mask = tokens(3, 96), torch.ones(3, 96, dtype=torch.bool)
    mask[1, 40:] = False
    runner = PairedRunner(model, find_layout(model).blocks, windows_of(ids, mask), batch_size=2)
    waiting = compressed_linears(model)
    quantizing.quantize_sequentially(
        waiting, {"nf4": Keeper()}, runner, one_input_at_a_time=in_turn, dense=unrounded(waiting)
    )
    assert found.keys() == set(names)
    changed = copy.deepcopy(dense)
    for name in names:
        changed.get_submodule(name).weight.data *= 2
    last = "model.layers.2.self_attn.q_proj"
    for name in (names[0], last):
        expected = torch.zeros(())
        for row, length in enumerate((96, 40, 96)):
            window = ids[row : row + 1, :length]
            there, here = (inputs_by_linear(each, [name], window)[name] for each in (dense, changed))
            weights = torch.ones(length, dtype=torch.float64)
            weights[0] = max(1, length / 32)
            expected = expected + (there * weights) @ here.T
        assert float((found[name] - expected).norm()) < 1e-4 * float(expected.norm())
    assert not torch.allclose(found[last], found[last].T), "the inputs are not the same"


@pytest.mark.parametrize(
    ("setting", "encodings"),
    [
        pytest.param(
            lambda: GPTQConfig(bits=2, group_size=32, sym=False),
            [("gptq2_g32", None), ("gptq2_g32", 64), ("int8", None)],
            marks=needs_gptq,
        ),
        pytest.param(SETTINGS["fp4"], [("fp4", 64), ("fp4", None)], marks=needs_bnb),
    ],
)
@pytest.mark.parametrize("undo_on_error", [False, True])
def test_the_model_is_nearer_to_the_dense_one(setting: Any, encodings: Any, undo_on_error: bool) -> None:
    ids, dense, lost = tokens(24, 48), wide("llama"), {}
    for target in ("compressed", "dense"):
        config = DobiSVDConfig(
            method="output_pca",
            dataset=ids,
            plan=planned(dense, encodings),
            quantization=setting(),
            rounding="feedback",
            rounding_settings={"target": target},
        )
        model = DobiSVDQuantizer(config).quantize_model(wide("llama"), undo_on_error=undo_on_error)
        lost[target] = float((logits(model, ids) - logits(dense, ids)).square().mean())
    assert lost["dense"] < lost["compressed"]


@needs_bnb
def test_a_saved_model_is_rounded_towards_itself() -> None:
    ids, lost = tokens(24, 48), {}
    for target in ("compressed", "dense"):
        model = DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.6)).quantize_model(wide("llama"))
        expected = logits(model, ids)
        settings = {"target": target}
        convert(model, SETTINGS["fp4"](), windows=windows_of(ids), rounding="feedback", rounding_settings=settings)
        assert "fp4" in {module.encoding for module in compressed_linears(model).values()}
        lost[target] = float((logits(model, ids) - expected).square().mean())
    assert lost["dense"] < lost["compressed"]


@pytest.mark.parametrize(
    "setting", [pytest.param("nf4", marks=needs_bnb), pytest.param("gptq4_g32", marks=needs_gptq)]
)
def test_experts_are_told_of(setting: str, caplog: pytest.LogCaptureFixture) -> None:
    """A router sends them other tokens than in the dense model, with GPTQ in stages of their own."""
    model = tiny("mixtral", hidden_size=64, intermediate_size=64)
    ids, mask = tokens(24, 48), torch.ones(24, 48, dtype=torch.bool)
    mask[3, 40:] = False
    config = DobiSVDConfig(method="output_pca", ratio=0.17, quantization=setting, **TOWARDS_DENSE)
    DobiSVDQuantizer(config).quantize_model(model, windows=windows_of(ids, mask))
    experts = [name for name, each in compressed_linears(model).items() if "expert" in name]
    waited = [name for name in experts if model.get_submodule(name).encoding == setting]
    assert waited
    assert f"{len(waited)} linears (" in caplog.text
    assert "are not given every token, as experts are not" in caplog.text


@needs_bnb
def test_blocks_that_pass_state_are_refused() -> None:
    config = DobiSVDConfig(
        method="svd",
        ratio=0.6,
        dataset=tokens(6, 24),
        quantization=SETTINGS["nf4"](),
        min_coverage=0.1,
        **TOWARDS_DENSE,
    )
    with pytest.raises(ValueError, match="passes state between its blocks, and rounding towards the dense model"):
        DobiSVDQuantizer(config).quantize_model(tiny_architecture("t5", d_model=64, d_ff=64))
