"""The whole pipeline in memory: what `DobiSVDQuantizer` makes of a model, and what it refuses without touching it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from integration_tests.statistics.collecting import inputs_by_linear
from integration_tests.tiny_models import MODEL_TYPES, tiny, tokens
from optimum_dobisvd import METHODS, DobiSVDConfig, DobiSVDQuantizer, LowRankLinear, Plan
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.calibration.dataset import tokenizer_identity
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.calibration.runner import BlockRunner
from optimum_dobisvd.nn.compressed_linear import CompressedLinear
from optimum_dobisvd.nn.dense_linear import weight_matrix
from optimum_dobisvd.report.report import CompressionReport

WINDOWS = tokens(8, 48)
Q0 = "model.layers.0.self_attn.q_proj"
DOWN2 = "model.layers.2.mlp.down_proj"


def compress(model: nn.Module, **settings: Any) -> DobiSVDQuantizer:
    defaults: dict[str, Any] = {"ratio": 0.7, "dataset": WINDOWS, "min_coverage": 0.0}
    if METHODS[settings.get("method", "global")].learns:
        defaults["training"] = {"steps": 2, "held_out": 2, "evaluate_every": 1}
    quantizer = DobiSVDQuantizer(**{**defaults, **settings})
    assert quantizer.quantize_model(model) is model
    return quantizer


def done(quantizer: DobiSVDQuantizer) -> tuple[Plan, CompressionReport]:
    assert quantizer.plan is not None
    assert quantizer.report is not None
    return quantizer.plan, quantizer.report


def logits(model: nn.Module, ids: Tensor = WINDOWS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def compressed_linears(model: nn.Module) -> dict[str, CompressedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_as_planned(model: nn.Module, dense: nn.Module, plan: Plan) -> None:
    """Every target is what the plan says, every other tensor is what it was."""
    found = compressed_linears(model)
    assert found.keys() == {name for name, entry in plan.modules.items() if not entry.is_dense}
    for name, module in found.items():
        rank, old = plan.modules[name].rank, dense.get_submodule(name)
        out_features, in_features = weight_matrix(old).shape
        assert module.storage == plan.modules[name].storage
        assert module.weight.dtype == old.weight.dtype
        if isinstance(module, LowRankLinear):
            assert type(module.first) is type(module.second) is nn.Linear
            assert module.first.weight.shape == (rank, in_features)
            assert module.second.weight.shape == (out_features, rank)
            assert module.first.weight.dtype == module.second.weight.dtype == old.weight.dtype
            assert module.first.bias is None
        assert (module.rank, module.out_features, module.in_features) == (rank, out_features, in_features)
        if old.bias is None:
            assert module.bias is None
        else:
            assert torch.equal(module.bias, old.bias)
    state = model.state_dict()
    for name, tensor in dense.state_dict().items():
        if name.rsplit(".", 1)[0] not in found:
            assert torch.equal(state[name], tensor)


def assert_function_of_factors(model: nn.Module, dense: nn.Module) -> None:
    """The model computes what the dense one would with the factors' products for weights, not what it did before."""
    before = logits(dense)
    for name, module in compressed_linears(model).items():
        product = module.dense_matrix().detach()
        old = dense.get_submodule(name)
        old.weight.data = product.T if type(old) is Conv1D else product
    assert relative(logits(model), logits(dense)) < 1e-4
    assert relative(logits(model), before) > 0.01


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
def test_every_method_compresses_as_planned(model_type: str, method: str) -> None:
    model, dense = tiny(model_type), tiny(model_type)
    quantizer = compress(model, method=method)
    plan, report = done(quantizer)
    assert_as_planned(model, dense, plan)
    targets = find_layout(dense).targets
    assert plan.modules.keys() == {target.name for target in targets}
    assert plan.ratio_of(targets) <= 0.7
    # No room for another step: a rank is at most m + n elements of the largest matrix, 16 ranks in 8 bits a quarter.
    step = 128 * (16 / 2 if METHODS[method].storage == "remap" else 4)
    assert plan.ratio_of(targets) > 0.7 - step / sum(target.dense_bytes for target in targets)
    assert report.method == method
    assert_function_of_factors(model, dense)
    errors = [module.error for module in report.modules]
    assert all(error is None for error in errors) or all(error is not None and 0 <= error < 0.9 for error in errors)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_architecture_is_compressed(model_type: str) -> None:
    model, dense = tiny(model_type), tiny(model_type)
    plan, _ = done(compress(model, ratio=0.9, allocation="uniform"))
    assert_as_planned(model, dense, plan)
    assert len(compressed_linears(model)) > 3
    assert_function_of_factors(model, dense)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    assert (embeddings[0].weight is embeddings[1].weight) == tied


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_three_optimal_methods_make_the_same_model(model_type: str) -> None:
    outputs = {}
    for method in ("svd", "asvd", "svd_llm", "svd_llm_v2", "output_pca"):
        model = tiny(model_type)
        compress(model, method=method, allocation="uniform", ratio=0.6)
        outputs[method] = logits(model)
    for method in ("svd_llm", "output_pca"):
        assert relative(outputs[method], outputs["svd_llm_v2"]) < 2e-3
    for method in ("svd", "asvd"):
        assert relative(outputs[method], outputs["svd_llm_v2"]) > 0.05


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "mixtral"])
def test_the_reports_figures_are_what_the_model_shows(model_type: str) -> None:
    model, dense = tiny(model_type), tiny(model_type)
    overrides = {"re:.*0.*(down_proj|fc2|c_proj|o_proj)": {"dense": True}}
    plan, report = done(compress(model, method="svd_llm_v2", overrides=overrides))
    targets = find_layout(dense).linears
    found = compressed_linears(model)

    def nbytes(parameters: Any) -> int:
        return sum(parameter.nbytes for parameter in {id(each): each for each in parameters}.values())

    def macs(of: nn.Module) -> int:
        return sum(module.weight.numel() for module in of.modules() if type(module) in (nn.Linear, Conv1D))

    assert report.dense_model_bytes == nbytes(dense.parameters())
    assert report.compressed_model_bytes == nbytes(model.parameters())
    assert report.dense_target_bytes == sum(module.weight.nbytes for module in targets.values())
    assert report.target_bytes == sum(
        found[name].first.weight.nbytes + found[name].second.weight.nbytes if name in found else module.weight.nbytes
        for name, module in targets.items()
    )
    assert (report.dense_macs, report.compressed_macs) == (macs(dense), macs(model))
    ratios = report.to_dict()["ratios"]
    assert ratios["target_bytes"] == pytest.approx(report.target_bytes / report.dense_target_bytes, abs=1e-6)
    assert ratios["macs_per_token"] == pytest.approx(macs(model) / macs(dense), abs=1e-6)

    inputs = inputs_by_linear(dense, targets, WINDOWS)
    assert [module.name for module in report.modules] == list(targets)
    for module in report.modules:
        assert module.rank == plan.modules[module.name].rank
        weight = weight_matrix(targets[module.name]).double()
        assert (module.out_features, module.in_features) == tuple(weight.shape)
        if module.name not in found:
            assert module.error == 0
            continue
        factors = found[module.name]
        product = factors.second.weight.detach().double() @ factors.first.weight.detach().double()
        x = inputs[module.name]
        assert module.error == pytest.approx(relative(product @ x, weight @ x), rel=1e-3)
        values = torch.linalg.svdvals(weight @ x)
        assert module.error == pytest.approx(float(values[module.rank :].norm() / values.norm()), rel=1e-3)
    assert {module.rank is None for module in report.modules} == {True, False}


def test_a_smaller_ratio_costs_more_error() -> None:
    totals = []
    for ratio in (0.9, 0.6, 0.3):
        _, report = done(compress(tiny("llama"), ratio=ratio))
        totals.append(sum(module.error or 0 for module in report.modules))
    assert totals[0] < totals[1] < totals[2]


def test_overrides_and_exclusions_are_honored() -> None:
    model, dense = tiny("llama"), tiny("llama")
    quantizer = compress(
        model,
        ratio=0.6,
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


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if name != "svd_llm" and not row.learns])
def test_fewer_tokens_than_features_are_enough(method: str) -> None:
    model, dense = tiny("llama"), tiny("llama")
    few = tokens(1, 9)
    _, report = done(compress(model, method=method, dataset=few, ratio=0.7))
    assert torch.isfinite(logits(model)).all()
    if method in ("svd_llm_v2", "output_pca"):
        # Nine tokens span nine directions, and no matrix here gets a smaller rank: nothing of them is lost.
        assert min(module.rank or 9 for module in report.modules) >= 7
        assert relative(logits(model, few), logits(dense, few)) < 0.3
        assert all(module.error < 0.05 for module in report.modules if (module.rank or 0) >= 9)


def test_dead_channels_and_silent_linears_are_no_trouble() -> None:
    model = tiny("opt")
    layer = model.model.decoder.layers[1]
    layer.final_layer_norm.weight.data[:5] = 0
    layer.final_layer_norm.bias.data[:5] = 0
    layer.self_attn.v_proj.weight.data.zero_()
    for method in ("asvd", "svd_llm_v2", "output_pca"):
        copy = tiny("opt")
        copy.load_state_dict(model.state_dict())
        compress(copy, method=method, allocation="uniform")
        assert torch.isfinite(logits(copy)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_keeps_it(dtype: torch.dtype) -> None:
    model, dense = tiny("llama", dtype=dtype), tiny("llama", dtype=dtype)
    plan, report = done(compress(model, ratio=0.9))
    assert_as_planned(model, dense, plan)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert report.dense_target_bytes == sum(2 * m.weight.numel() for m in find_layout(dense).linears.values())


def test_compression_is_deterministic() -> None:
    one, other = tiny("llama"), tiny("llama")
    compress(one)
    compress(other)
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


@pytest.mark.parametrize("method", ["svd_llm_v2", "dobi_ipca"])
def test_an_offloaded_model_is_compressed_where_it_lies(method: str) -> None:
    here, away = tiny("qwen2"), tiny("qwen2")
    cpu_offload(away, execution_device=torch.device("cpu"))
    compress(here, method=method)
    plan, _ = done(compress(away, method=method))
    assert {parameter.device.type for parameter in away.parameters()} == {"meta"}
    assert compressed_linears(away).keys() == {name for name, entry in plan.modules.items() if entry.rank is not None}
    assert relative(logits(away), logits(here)) < 1e-5


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@NEEDS_CUDA
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("home", "device"), [("cuda", None), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_gpu_makes_the_same_model(home: str, device: str | None, method: str) -> None:
    expected, model = tiny("llama"), tiny("llama").to(home)
    compress(expected, method=method)
    compress(model, method=method, device=device)
    assert {parameter.device.type for parameter in model.parameters()} == {home}
    # Learned ranks may tip: on a CPU, weights that differ by 1e-7 of themselves move the logits by 0.06, too.
    assert relative(logits(model.cpu()), logits(expected)) < (0.15 if METHODS[method].learns else 1e-2)


@pytest.mark.parametrize("home", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_tied_embeddings_stay_tied(home: str, tmp_path: Path) -> None:
    model = tiny("llama_tied").to(home)
    before = dict(model.named_parameters(remove_duplicate=False))
    compress(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after["lm_head.weight"] is after["model.embed_tokens.weight"]
    assert all(after[name] is parameter for name, parameter in before.items() if "_proj" not in name)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_the_quantizer_goes_through_its_own_dictionary() -> None:
    quantizer = DobiSVDQuantizer(method="output_pca", ratio=0.5, seed=3, overrides={"q_proj": {"rank": 4}})
    again = DobiSVDQuantizer.from_dict(json.loads(json.dumps(quantizer.to_dict())))
    assert again.to_dict() == quantizer.to_dict()


def test_either_a_config_or_its_fields() -> None:
    config = DobiSVDConfig(ratio=0.5)
    assert DobiSVDQuantizer(config).config is config
    with pytest.raises(TypeError, match="not both"):
        DobiSVDQuantizer(config, ratio=0.5)
    with pytest.raises(ValueError, match="unknown key 'ration'.*'ratio'"):
        DobiSVDQuantizer(ration=0.5)


# --- the plan -----------------------------------------------------------------------------------------------------


def plan_for(model: nn.Module, changes: dict[str, PlannedModule | None] | None = None, rank: int = 5) -> Plan:
    modules = {name: PlannedModule(rank, "plain") for name in find_layout(model).linears}
    for name, entry in (changes or {}).items():
        if entry is None:
            del modules[name]
        else:
            modules[name] = entry
    return Plan(modules, method="svd_llm_v2", ratio=None, allocation="by hand")


@pytest.mark.parametrize("as_file", [False, True])
def test_a_given_plan_is_used_exactly(tmp_path: Path, as_file: bool) -> None:
    model, dense = tiny("llama"), tiny("llama")
    plan = plan_for(dense, {Q0: PlannedModule(2, "plain"), DOWN2: PlannedModule(None, "dense")})
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


# --- the statistics store -----------------------------------------------------------------------------------------


def test_a_store_serves_other_ratios_and_methods_without_another_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "statistics"
    compress(tiny("llama"), ratio=0.9, statistics=folder)
    expected = {}
    for method in ("output_pca", "asvd", "svd_llm_v2"):
        model = tiny("llama")
        compress(model, method=method, ratio=0.5)
        expected[method] = logits(model)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the text went through the model again")

    monkeypatch.setattr(BlockRunner, "run", never)
    for method, outputs in expected.items():
        model = tiny("llama")
        compress(model, method=method, ratio=0.5, statistics=folder)
        assert torch.equal(logits(model), outputs)


# --- refusals -----------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "tensors": {name: (id(tensor), tensor.detach().clone()) for name, tensor in model.named_parameters()},
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks), m.training) for m in model.modules()],
        "config": model.config.to_dict(),
        "extras": sorted(vars(model)),
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert {key: after[key] for key in after if key != "tensors"} == {
        key: before[key] for key in before if key != "tensors"
    }
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (identity, tensor) in before["tensors"].items():
        assert after["tensors"][name][0] == identity
        assert torch.equal(after["tensors"][name][1].nan_to_num(), tensor.nan_to_num())


def refused(model: nn.Module, match: str, error: type[Exception] = ValueError, **settings: Any) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=match):
        compress(model, **settings)
    assert_untouched(model, before)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "svd"])
def test_no_dataset_is_refused(method: str) -> None:
    refused(tiny("llama"), f"method '{method}' needs calibration text", method=method, dataset=None)


def test_svd_needs_no_dataset_and_measures_nothing_then() -> None:
    model = tiny("llama")
    _, report = done(compress(model, method="svd", dataset=None))
    assert {module.error for module in report.modules} == {None}
    assert report.dataset is None
    assert compressed_linears(model)


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        ([], "empty list"),
        (["too short"], r"tokens, which is 0 windows"),
        (torch.zeros(0, 4), "empty"),
        ([""], "no text|empty"),
    ],
)
def test_a_dataset_too_short_is_refused(tiny_tokenizer: Any, dataset: Any, match: str) -> None:
    refused(tiny("llama"), match, dataset=dataset, tokenizer=tiny_tokenizer, nsamples=4, seqlen=32)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"model.layers.9.self_attn.q_proj": PlannedModule(3, "plain")},
            r"model\.layers\.9\.self_attn\.q_proj.*not one",
        ),
        ({"lm_head": PlannedModule(3, "plain")}, "'lm_head', which is not one of the 21"),
        ({Q0: None}, "says nothing about 'model.layers.0.self_attn.q_proj'"),
        ({Q0: PlannedModule(33, "plain")}, "rank 33 is above 32"),
        ({Q0: PlannedModule(16, "plain")}, "not smaller than the dense matrix; use at most 15"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(changes: dict[str, PlannedModule | None], match: str) -> None:
    model = tiny("llama")
    refused(model, match, plan=plan_for(model, changes))


def test_a_plan_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(tiny("llama"), "no plan at", FileNotFoundError, plan=tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{")
    refused(tiny("llama"), r"plan\.json, line 1", plan=tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"modules_to_not_convert": ["q_porj"]}, "'q_porj' matches no module; near names: 'q_proj'"),
        ({"overrides": {"re:.*dwn_proj": {"rank": 3}}}, "matches no module"),
        ({"overrides": {"q_proj": {"rnak": 3}}}, "unknown key 'rnak'"),
        ({"overrides": {"q_proj": {"rank": 99}}}, "rank 99 is above"),
        ({"ratio": 0.3, "min_rank": 12}, "the smallest reachable"),
        ({"ratio": 0.5, "overrides": {"mlp": {"dense": True}}}, "the smallest reachable"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings: dict[str, Any], match: str) -> None:
    refused(tiny("llama"), match, **settings)


def test_a_mixture_of_experts_is_refused_by_default() -> None:
    refused(tiny("mixtral"), r"only 14\.2% of the weights .* parameters in MixtralExperts", min_coverage=0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = tiny("llama")
    model.get_submodule(DOWN2).weight.data[3, 4] = value
    refused(model, rf"{DOWN2.replace('.', '[.]')}\.weight has NaN")


@pytest.mark.parametrize("method", ["svd_llm_v2", "dobi_ipca"])
def test_activations_that_are_not_finite_are_named(method: str) -> None:
    model = tiny("llama")
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    refused(model, r"model\.layers\.1: its output has NaN", method=method)


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    refused(tiny("llama"), "is not a statistics store", statistics=tmp_path)


def test_the_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    compress(tiny("llama"), statistics=tmp_path / "s")
    refused(tiny("llama", seed=1), "do not belong to this run.*weights", statistics=tmp_path / "s")
    refused(tiny("llama"), "do not belong to this run.*tokens", dataset=tokens(3, 9), statistics=tmp_path / "s")


def test_a_compressed_model_is_refused() -> None:
    model = tiny("llama")
    first = compress(model)
    refused(model, "compressed already; load the dense model")
    with pytest.raises(ValueError, match="describes a compressed model"):
        DobiSVDQuantizer(model.config.quantization_config)
    assert first.plan is not None


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.Sequential(nn.Embedding(4, 4))])
def test_a_model_without_blocks_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="no repeated blocks"):
        compress(make())


def test_an_error_half_way_leaves_the_model_dense() -> None:
    """A model with some factors and no mark of them would be saved as one that cannot be loaded."""
    model = tiny("llama")
    model.model.layers[2].input_layernorm.weight.data.zero_()
    for method in ("svd_llm_v2", "dobi_ipca"):
        refused(model, r"model\.layers\.2\.self_attn\.q_proj: .*zero", method=method, allocation="uniform")


def test_statistics_that_lack_a_linear_are_refused_before_anything_changes(tmp_path: Path) -> None:
    compress(tiny("llama"), statistics=tmp_path / "s", modules_to_not_convert=["down_proj"])
    refused(tiny("llama"), r"down_proj.*excluded when", statistics=tmp_path / "s", allocation="uniform")


def test_keeping_everything_leaves_the_model_dense() -> None:
    model, dense = tiny("llama"), tiny("llama")
    plan, report = done(compress(model, ratio=1.0))
    assert {entry.rank for entry in plan.modules.values()} == {None}
    assert report.target_bytes == report.dense_target_bytes
    assert torch.equal(logits(model), logits(dense))


def test_a_quantizer_can_be_used_again_with_another_tokenizer(tiny_tokenizer: Any) -> None:
    other = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<eos>")
    other.add_tokens(["republic"])
    quantizer = DobiSVDQuantizer(dataset=["The republic stood on a hill. " * 40], nsamples=2, seqlen=32)
    for tokenizer in (tiny_tokenizer, other):
        quantizer.quantize_model(tiny("llama", vocab_size=400), tokenizer)
        _, report = done(quantizer)
        assert report.dataset is not None
        assert report.dataset["tokenizer"] == tokenizer_identity(tokenizer)


def test_saving_before_compressing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="call quantize_model first"):
        DobiSVDQuantizer(ratio=0.5).save(tiny("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
