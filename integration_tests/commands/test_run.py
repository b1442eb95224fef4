"""`run`: recipes do what the commands do, and what a recipe cannot mean is refused before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from integration_tests.commands.cli_in_process import contents, dobisvd, names_in
from integration_tests.commands.conftest import COMPRESS
from optimum_dobisvd.report.report import CompressionReport

STEP = {"model": "dense", "dataset": "text.txt", "nsamples": 6, "seqlen": 32, "out": "out"}


def recipe(work: Path, *steps: Any) -> str:
    (work / "recipe.yaml").write_text(yaml.safe_dump({"steps": list(steps)}))
    return "recipe.yaml"


def test_a_step_is_the_command(work: Path) -> None:
    override = {"re:.*o_proj": {"dense": True}}
    assert dobisvd(*COMPRESS, "by-command", "--overrides", json.dumps(override), "--batch-size", "2") == 0
    options = {**STEP, "out": "by-recipe", "overrides": override, "batch-size": 2}
    assert dobisvd("run", recipe(work, {"compress": options})) == 0
    one, other = contents(work / "by-command"), contents(work / "by-recipe")
    assert {name for name in one if one[name] != other[name]} <= {"dobisvd_recipe.yaml", "dobisvd_report.json"}


def test_steps_run_in_order_and_json_has_them_all(work: Path, capfd: Any) -> None:
    steps = [
        {"plan": {"model": "dense", "ratio": 0.7, "method": "svd", "save_plan": "ranks.json"}},
        {"compress": {**STEP, "plan": "ranks.json"}},
        {"eval": {"out": "out", "dataset": "held-out.txt", "seqlen": 32, "windows": 2, "json": "eval.json"}},
        {"inspect": {"out": "out", "pictures": "drawn"}},
    ]
    assert dobisvd("run", recipe(work, *steps), "--json", "-") == 0
    result = json.loads(capfd.readouterr().out)
    assert [next(iter(step)) for step in result["steps"]] == ["plan", "compress", "eval", "inspect"]
    assert result["steps"][1]["compress"]["ratios"] == result["steps"][0]["plan"]["ratios"]
    assert json.loads((work / "eval.json").read_text()) == result["steps"][2]["eval"]
    assert names_in(work / "drawn") == ["dobisvd_errors.png", "dobisvd_formats.png", "dobisvd_ranks.png"]


def test_generate_speaks_from_a_new_process(work: Path, capfd: Any) -> None:
    step = {"generate": {"out": "small", "prompt": "the cat", "max_new_tokens": 5}}
    assert dobisvd("run", recipe(work, step), "--json", "-") == 0
    (result,) = json.loads(capfd.readouterr().out)["steps"]
    assert result["generate"]["compressed"]
    assert result["generate"]["dense"]
    (work / "small" / "model.safetensors").unlink()
    assert dobisvd("run", "recipe.yaml") == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "new process" in error


def test_set_changes_options(work: Path) -> None:
    path = recipe(work, {"compress": STEP}, {"inspect": {"out": "out", "json": "inspected.json"}})
    changes = ["out=elsewhere", "compress.ratio=0.6", "compress.modules_to_not_convert=[k_proj, v_proj]"]
    assert dobisvd("run", path, "--set", *changes, "--set", "compress.rank-multiple=2") == 0
    report = CompressionReport.load(work / "elsewhere")
    assert report.ratio == 0.6
    assert {module.kind for module in report.modules}.isdisjoint({"k_proj", "v_proj"})
    assert all(module.rank is None or module.rank % 2 == 0 for module in report.modules)
    assert json.loads((work / "inspected.json").read_text()) == report.to_dict()
    assert "out" not in names_in(work)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"compres": STEP}], "unknown command 'compres'; did you mean 'compress'?"),
        ([{"compress": {**STEP, "nsample": 3}}], "unknown option 'nsample'; did you mean 'nsamples'?"),
        ([{"compress": {**STEP, "inner": "gptq4"}}], "no option 'inner' any more; write 'quantization'"),
        ([{"plan": {"model": "x", "storage": "int8"}}], "'storage' any more; write 'quantization' or 'mixed'"),
        ([{"compress": {**STEP, "dense-storage": "dense_int8"}}], "'dense_storage' any more; write 'quantization'"),
        ([{"quantize": {"model": "out", "inner": "nf4"}}], "no option 'inner' any more; write 'quantization'"),
        ([{"eval": {"out": "out", "inner": "nf4"}}], "eval: unknown option 'inner'; "),
        ([{"compress": {**STEP, "ratio": "0,8"}}], "ratio must be a number, got '0,8'"),
        ([{"compress": {**STEP, "nsamples": 6.5}}], "nsamples must be a whole number"),
        ([{"compress": {**STEP, "nsamples": True}}], "nsamples must be a whole number"),
        ([{"compress": {**STEP, "overwrite": "yes please"}}], "overwrite must be true or false"),
        ([{"compress": {**STEP, "dtype": "int8"}}], "dtype must be one of auto, float32"),
        ([{"compress": {**STEP, "overrides": ["q_proj"]}}], "overrides must be a mapping"),
        ([{"compress": {**STEP, "eval_dataset": [3]}}], "eval_dataset must be text"),
        ([{"compress": {"out": "out"}}], "the option 'model' is missing"),
        ([{"compress": STEP, "eval": {}}], "step 1 must be one command"),
        ([{"compress": [STEP]}], "must be a mapping"),
        # The second step is wrong: the first must not have run.
        ([{"compress": STEP}, {"eval": {"dataset": "text.txt"}}], "the option 'out' is missing"),
        ([{"compress": STEP}, {"eval": {"out": "out"}}], "eval: nothing to evaluate on: give --dataset TEXT"),
        ([{"compress": STEP}, {"eval": {"out": "out", "tasks": "piqa", "limit": 0}}], "--limit must be at least 1"),
        ([], "must be a list of steps"),
    ],
)
def test_what_a_recipe_cannot_mean_is_refused_at_once(work: Path, capsys: Any, steps: list[Any], message: str) -> None:
    before = names_in(work)
    assert dobisvd("run", recipe(work, *steps)) == 2
    assert message in capsys.readouterr().err
    assert names_in(work) == sorted([*before, "recipe.yaml"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("compress.ratoi=0.5", "unknown option 'ratoi'; did you mean 'ratio'?"),
        ("storage=int8", "there is no option 'storage' any more; write 'quantization' or 'mixed'"),
        ("compress.inner=nf4", "there is no option 'inner' any more; write 'quantization'"),
        ("ratoi=0.5", "unknown option 'ratoi'; did you mean 'ratio'?"),
        ("compres.ratio=0.5", "no step 'compres'; did you mean 'compress'?"),
        ("ratio", "--set takes KEY=VALUE"),
        ("ratio=[", "the value is not YAML"),
    ],
)
def test_a_wrong_set_is_refused(work: Path, capsys: Any, change: str, message: str) -> None:
    assert dobisvd("run", recipe(work, {"compress": STEP}), "--set", change) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("steps: [", 2, "is not YAML"),
        ("- compress", 2, "expected a mapping"),
        ("step: []", 2, "unknown key 'step'; did you mean 'steps'?"),
        (None, 1, "there is no recipe recipe.yaml"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(
    work: Path, capsys: Any, text: str | None, code: int, message: str
) -> None:
    if text is not None:
        (work / "recipe.yaml").write_text(text)
    assert dobisvd("run", "recipe.yaml") == code
    assert message in capsys.readouterr().err


def test_every_recipe_of_the_repository_is_valid() -> None:
    from optimum_dobisvd.commands.run import read_steps

    found = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))  # those in tasks/ are lm-eval's
    assert found
    for path in found:
        assert read_steps(str(path), [])
