"""From a ratio, overrides or a given plan to what every matrix becomes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoRoundConfig, GPTQConfig

from integration_tests.pipeline.tiny_model_compression import (
    DOWN2,
    Q0,
    assert_as_planned,
    compress,
    done,
    logits,
)
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, Plan
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.encodings.registry import encoding_named
from optimum_dobisvd.factorization.decompositions import PreparedInputs
from optimum_dobisvd.factorization.registry import FACTORIZATIONS
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.pipeline.allocate import measure_losses
from optimum_dobisvd.pipeline.collect import collect
from optimum_dobisvd.pipeline.validate import prepare
from optimum_dobisvd.statistics.fingerprint import fingerprint
from optimum_dobisvd.structures.base import compressed_linears

BLOCK0 = "model.layers.0"


def test_a_smaller_ratio_costs_more_error() -> None:
    totals = []
    for ratio in (0.9, 0.6, 0.3):
        _, report = done(compress(tiny("llama"), ratio=ratio))
        totals.append(sum(module.error or 0 for module in report.modules))
    assert totals[0] < totals[1] < totals[2]


def test_rounding_is_priced_by_the_trace_of_the_fisher_information(tmp_path: Path) -> None:
    """Small errors that know nothing of inputs and gradients cost `1/2 s^2 sum ||x||^2 ||g||^2`, K-FAC or not."""
    model = tiny("llama")
    config = DobiSVDConfig(ratio=0.5, dataset=tokens(8, 16), quantization="int8", statistics=tmp_path)
    job = prepare(model, config)
    assert job.windows is not None
    store = collect(model, job, job.windows, fingerprint(model, job.windows))
    found, inputs = measure_losses(job, store), PreparedInputs(FACTORIZATIONS.get("kfac"), store, BLOCK0, None)
    assert found is not None
    for name in job.layout.linears_of(BLOCK0):
        gram, (_, output) = inputs.gram(name), inputs.of(name)
        assert gram is not None
        by_kfac = float(gram.trace() * output.root.square().sum())
        true = store.gradients(BLOCK0)[name].joint_energy / (2 * store.gradient_tokens)
        for (structure, encoding), losses in found[name].items():
            measured = store.losses(f"{structure}-{encoding}")
            assert measured is not None
            expected = measured[name] * (true / by_kfac)
            torch.testing.assert_close(losses, expected, rtol=0.02, atol=0)  # the root is damped by 1 %


def test_a_mixture_is_planned_with_the_losses_of_its_rounding(tmp_path: Path) -> None:
    model, found = tiny("llama", hidden_size=64, intermediate_size=96), []
    common: dict[str, Any] = {"bits": 4, "group_size": 32, "sym": False}
    gptq = GPTQConfig(**common, desc_act=True, act_group_aware=False, damp_percent=0.01)
    for quantization in (gptq, AutoRoundConfig(**common)):
        config = DobiSVDConfig(
            ratio=0.25, dataset=tokens(8, 16), quantization=quantization, mixed=True, statistics=tmp_path
        )
        job = prepare(model, config)
        assert job.windows is not None
        found.append(measure_losses(job, collect(model, job, job.windows, fingerprint(model, job.windows))))
    feedback, learned = found
    assert feedback is not None
    assert learned is not None
    for name, losses in feedback.items():
        for key, loss in losses.items():
            share = encoding_named(key[1]).learned_loss_share
            assert share < 1 or key[1] in ("int8", "gptq8_g32")
            torch.testing.assert_close(learned[name][key], share * loss)


def test_keeping_everything_leaves_the_model_dense() -> None:
    model, dense = tiny("llama"), tiny("llama")
    plan, report = done(compress(model, ratio=1.0))
    assert {entry.leaves_as_is for entry in plan.modules.values()} == {True}
    assert report.target_bytes == report.dense_target_bytes
    assert torch.equal(logits(model), logits(dense))


def test_overrides_and_exclusions_are_honored() -> None:
    model, dense = tiny("llama"), tiny("llama")
    quantizer = compress(
        model,
        ratio=0.6,
        structure="low_rank",
        overrides={"re:.*down_proj": {"ratio": 0.9}, "layers.1.mlp.gate_proj": {"dense": True}, Q0: {"rank": 3}},
        modules_to_not_convert=["v_proj", "model.layers.2.self_attn"],
    )
    plan, report = done(quantizer)
    assert_as_planned(model, dense, plan)
    assert type(model.get_submodule("model.layers.1.mlp.gate_proj")) is nn.Linear
    assert plan.modules[Q0].rank == 3
    assert {plan.modules[f"model.layers.{i}.mlp.down_proj"].rank for i in range(3)} == {int(0.9 * 48 * 32 / 80)}
    excluded = {name for name in plan.modules if "v_proj" in name or "layers.2.self_attn" in name}
    assert excluded == set()
    for name in ("model.layers.1.self_attn.v_proj", "model.layers.2.self_attn.q_proj"):
        assert type(model.get_submodule(name)) is nn.Linear
    assert (
        report.left_dense == f"{3 * 16 * 32 + 2 * 32 * 32 + 16 * 32:,} parameters excluded by modules_to_not_convert"
    )
    assert report.target_bytes <= 0.6 * report.dense_target_bytes


@pytest.mark.parametrize("as_file", [False, True])
def test_a_given_plan_is_used_exactly(tmp_path: Path, as_file: bool) -> None:
    model, dense = tiny("llama"), tiny("llama")
    modules = dict.fromkeys(find_layout(dense).linears, PlannedModule("low_rank", "float", 5))
    modules |= {Q0: PlannedModule("low_rank", "float", 2), DOWN2: PlannedModule("dense", "float")}
    plan = Plan(modules, method="svd_llm_v2", ratio=None, allocation="by hand")
    if as_file:
        plan.save(tmp_path / "plan.json")
    quantizer = compress(model, plan=tmp_path / "plan.json" if as_file else plan, ratio=0.01)
    assert quantizer.plan == plan
    assert_as_planned(model, dense, plan)
    assert compressed_linears(model)[Q0].rank == 2
    assert type(model.get_submodule(DOWN2)) is nn.Linear


def test_a_plan_made_here_can_be_given_again(tmp_path: Path) -> None:
    one, other = tiny("llama"), tiny("llama")
    plan, _ = done(compress(one, ratio=0.5))
    plan.save(tmp_path / "plan.json")
    compress(other, plan=tmp_path / "plan.json", ratio=0.9)
    assert torch.equal(logits(one), logits(other))
