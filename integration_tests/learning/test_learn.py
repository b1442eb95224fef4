"""Learned ranks from config to checkpoint, on real architectures."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDQuantizer
from optimum_dobisvd.learning import fixed_basis
from optimum_dobisvd.learning.curve import TrainingCurve
from optimum_dobisvd.learning.training import RankLearner
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.structures.base import is_compressed

WINDOWS = tokens(14, 32)
TRAINING = {"steps": 4, "evaluate_every": 2, "held_out": 2}
BY_STRUCTURE_AND_OPTIMIZER = [
    {"structure": structure, "training": {**TRAINING, "optimizer": optimizer}}
    for structure in ("auto", "pivoted")
    for optimizer in ("importance", "adam")
]


def learned(model: nn.Module, **settings: Any) -> DobiSVDQuantizer:
    defaults = {"method": "global", "allocation": "dobi_fixed_basis", "ratio": 0.5, "dataset": WINDOWS}
    quantizer = DobiSVDQuantizer(**{**defaults, "nsamples": 12, "training": TRAINING, **settings})
    quantizer.quantize_model(model)
    return quantizer


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "opt", "gpt2", "gemma2", "phi"])
@pytest.mark.parametrize("settings", [*BY_STRUCTURE_AND_OPTIMIZER, {"method": "dobi", "allocation": None}])
def test_every_architecture_learns_ranks_within_the_budget(model_type: str, settings: dict[str, Any]) -> None:
    model, dense = tiny(model_type), tiny(model_type)
    quantizer = learned(model, **settings)
    plan, curve = quantizer.plan, quantizer.training_curve
    assert plan is not None
    assert curve is not None
    targets = find_layout(dense).targets
    assert 0.5 - 4 * 128 / sum(each.dense_bytes for each in targets) < plan.ratio_of(targets) <= 0.5
    assert len(curve.steps) == 4
    assert [found.step for found in curve.evaluations] == [0, 2, 4]
    assert min(found.loss for found in curve.evaluations) == next(
        found.loss for found in curve.evaluations if found.step == curve.best
    )
    assert is_compressed(model)
    if settings.get("structure") == "pivoted":
        assert {module.structure for module in plan.modules.values() if module.rank is not None} == {"pivoted"}
    with torch.no_grad():
        assert bool(torch.isfinite(model(WINDOWS[:1]).logits).all())


def test_the_held_out_windows_are_used_for_nothing_else() -> None:
    """Neither in the statistics nor in a step: other held-out windows change which ranks are kept, not the ranks."""
    other = WINDOWS.clone()
    other[12:] = tokens(2, 32, seed=9)
    curves = [learned(tiny("llama"), dataset=windows).training_curve for windows in (WINDOWS, other)]
    assert curves[0] is not None
    assert curves[1] is not None
    assert [step.ranks for step in curves[0].steps] == [step.ranks for step in curves[1].steps]
    assert [step.loss for step in curves[0].steps] == [step.loss for step in curves[1].steps]
    assert [found.loss for found in curves[0].evaluations] != [found.loss for found in curves[1].evaluations]


def test_the_loss_of_the_kept_ranks_is_that_of_the_compressed_model() -> None:
    model = tiny("llama")
    quantizer = learned(model)
    curve = quantizer.training_curve
    assert curve is not None
    with torch.no_grad():
        found = float(model(WINDOWS[12:], labels=WINDOWS[12:]).loss)
    assert found == pytest.approx(min(each.loss for each in curve.evaluations), rel=1e-4)


@pytest.mark.parametrize("settings", BY_STRUCTURE_AND_OPTIMIZER)
def test_a_stopped_training_resumes_from_the_statistics_folder(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    uninterrupted, expected = learned(model, **settings), model.state_dict()
    step = RankLearner._step

    def stops(self: RankLearner, number: int, batch: Any) -> None:
        if number == 3:
            raise KeyboardInterrupt
        step(self, number, batch)

    monkeypatch.setattr(RankLearner, "_step", stops)
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        learned(model, statistics=str(tmp_path / "s"), **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(list((tmp_path / "s").glob("training-*.safetensors"))) == 1
    taken: list[int] = []

    def counts(self: RankLearner, number: int, batch: Any) -> None:
        taken.append(number)
        step(self, number, batch)

    monkeypatch.setattr(RankLearner, "_step", counts)
    resumed = learned(model, statistics=str(tmp_path / "s"), **settings)
    assert taken == [3]
    assert resumed.plan == uninterrupted.plan
    assert resumed.training_curve == uninterrupted.training_curve
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_another_ratio_does_not_take_the_journal_of_the_first(tmp_path: Path) -> None:
    for ratio in (0.5, 0.6):
        learned(tiny("llama"), ratio=ratio, statistics=str(tmp_path / "s"))
    assert len(list((tmp_path / "s").glob("training-*.safetensors"))) == 2


def test_curve_and_pictures_lie_beside_the_checkpoint(tmp_path: Path) -> None:
    model = tiny("llama")
    quantizer = learned(model, method="dobi", allocation=None)
    quantizer.save(model, tmp_path / "out")
    assert TrainingCurve.load(tmp_path / "out") == quantizer.training_curve
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"dobisvd_training.png", "dobisvd_ranks_learned.png"} <= names
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["training"]["steps"] == 4


def test_a_picture_of_the_directions_lies_beside_a_checkpoint_that_chose_some(tmp_path: Path) -> None:
    model = tiny("llama")
    learned(model, structure="low_rank").save(model, tmp_path / "out")
    assert (tmp_path / "out" / "dobisvd_directions.png").exists()


def test_ranks_that_a_plan_gives_are_not_learned() -> None:
    plan = learned(tiny("llama")).plan
    again = learned(tiny("llama"), plan=plan)
    assert again.training_curve is None
    assert again.plan == plan


def test_a_plan_of_learned_directions_gives_the_same_model_again(tmp_path: Path) -> None:
    model, again = tiny("llama"), tiny("llama")
    quantizer = learned(model, structure="low_rank", statistics=str(tmp_path / "s"))
    assert quantizer.plan is not None
    assert any(module.directions is not None for module in quantizer.plan.modules.values())
    quantizer.plan.save(tmp_path / "plan.json")
    other = DobiSVDQuantizer(
        plan=str(tmp_path / "plan.json"), dataset=WINDOWS[:12], nsamples=12, statistics=str(tmp_path / "s")
    )
    other.quantize_model(again)
    assert other.plan == quantizer.plan
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_directions_of_other_statistics_are_refused_before_any_work(tmp_path: Path) -> None:
    """The training calibrates on 12 of the 14 windows; a replay without held-out ones would calibrate on all."""
    plan = learned(tiny("llama"), structure="low_rank").plan
    assert plan is not None
    assert plan.names_directions_of is not None
    model = tiny("llama")
    for changed in ({}, {"dataset": tokens(12, 32, seed=3)}, {"dataset": WINDOWS[:12], "gradient_nsamples": 3}):
        quantizer = DobiSVDQuantizer(**{"plan": plan, "dataset": WINDOWS, "statistics": str(tmp_path), **changed})
        with pytest.raises(ValueError, match=r"names directions .* found on other weights, calibration text or grad"):
            quantizer.quantize_model(model)
    assert not is_compressed(model)
    assert list(tmp_path.iterdir()) == []


def test_directions_of_kfac_are_not_taken_for_those_of_another_factorizer() -> None:
    plan = learned(tiny("llama"), structure="low_rank").plan
    with pytest.raises(ValueError, match=r"names directions of kfac for .*, and the factors are made by 'svd_llm'"):
        learned(tiny("llama"), method="svd_llm", allocation=None, training={}, plan=plan)


def test_factors_that_are_not_kfacs_are_learned_with_adam(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plan = learned(tiny("llama"), method="svd_llm").plan
    assert "compares importance scores of the metric 'svd_llm' across matrices" in caplog.text
    assert plan is not None
    assert all(module.directions is None for module in plan.modules.values())


def test_overrides_hold() -> None:
    overrides = {"model.layers.0.mlp.up_proj": {"rank": 3}, "model.layers.1.mlp.up_proj": {"dense": True}}
    for settings in ({}, {"method": "dobi", "allocation": None}):
        plan = learned(tiny("llama"), overrides=overrides, **settings).plan
        assert plan is not None
        assert plan.modules["model.layers.0.mlp.up_proj"].rank == 3
        assert plan.modules["model.layers.1.mlp.up_proj"].rank is None


def test_too_few_windows_say_so_before_any_work() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"there are 2 windows of calibration text, and 2 of them are held out"):
        learned(model, dataset=WINDOWS[:2])
    assert not is_compressed(model)


def test_too_little_text_says_what_is_held_out(tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"nsamples=12 were asked for and 2 more to evaluate learned ranks on: use"):
        DobiSVDQuantizer(
            allocation="dobi_fixed_basis",
            dataset=["word " * 90],
            nsamples=12,
            seqlen=32,
            training=TRAINING,
            tokenizer=tiny_tokenizer,
        ).quantize_model(tiny("llama"))


def test_offloaded_weights_are_refused() -> None:
    model = tiny("llama")
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"q_proj is offloaded, and learning ranks .*allocation='global'"):
        learned(model)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="gives no next-token logits"):
        learned(tiny("llama").model)
    with pytest.raises(ValueError, match="gives no next-token logits"):
        learned(tiny("llama").model, method="dobi", allocation=None)


def test_a_loss_that_turns_nan_keeps_the_last_good_ranks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backward_loss = fixed_basis.backward_loss
    calls: list[int] = []

    def breaks(model: Any, ids: Any, mask: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            with torch.no_grad():
                model.lm_head.weight.fill_(float("nan"))
        return backward_loss(model, ids, mask)

    monkeypatch.setattr(fixed_basis, "backward_loss", breaks)
    model = tiny("llama")
    with caplog.at_level(logging.WARNING):
        quantizer = learned(model)
    curve = quantizer.training_curve
    assert curve is not None
    assert curve.stopped is not None
    assert curve.stopped.startswith("step 3: the loss is nan after 0 tokens of text")
    assert "rank training ended after 2 steps: step 3: the loss is nan" in caplog.text
    assert len(curve.evaluations) == 2
