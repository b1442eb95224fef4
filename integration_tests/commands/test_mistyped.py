"""What a person may get wrong on the command line: one sentence that says what it is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel

from integration_tests.commands.cli_in_process import dobisvd
from integration_tests.commands.conftest import COMPRESS
from integration_tests.tiny_models import tiny
from optimum_dobisvd import commands


def error_of(capsys: Any, *arguments: str) -> str:
    """The one line that a command fails with."""
    capsys.readouterr()
    assert dobisvd(*arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    "command",
    [
        (*COMPRESS, "out", "--model", "empty"),
        ("plan", "--model", "empty", "--dataset", "text.txt"),
        ("eval", "empty", "--dataset", "text.txt"),
        ("eval", "small", "--dense", "empty", "--dataset", "text.txt"),
    ],
)
def test_an_empty_folder_is_no_model(work: Path, capsys: Any, command: tuple[str, ...]) -> None:
    (work / "empty").mkdir()
    assert "cannot load empty: there is no config.json in this folder" in error_of(capsys, *command)


def test_a_model_without_a_tokenizer_is_told(work: Path, capsys: Any) -> None:
    for path in (work / "dense").glob("tokenizer*"):
        path.unlink()
    error = error_of(capsys, *COMPRESS, "out")
    assert "cannot load dense: could not load the tokenizer 'dense': save one beside the model" in error
    shutil.rmtree(work / "small")
    assert not (work / "out").exists()


# --- windows that the model cannot read -----------------------------------------------------------------------------


@pytest.fixture
def gpt2(work: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose positions end at 128; its weights are not to be read."""
    shutil.rmtree(work / "dense")
    tiny("gpt2").save_pretrained(work / "dense")
    tiny_tokenizer.save_pretrained(work / "dense")
    return work


def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", lambda *a, **k: pytest.fail("weights are read"))


SHORT = ("--model", "dense", "--dataset", "text.txt", "--nsamples", "6")


def test_too_long_windows_are_refused_before_weights(gpt2: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dobisvd("plan", *SHORT) == 0
    assert dobisvd("compress", *SHORT, "out", "--eval-dataset", "held-out.txt", "--eval-windows", "2") == 0
    options = yaml.safe_load((gpt2 / "out" / "dobisvd_recipe.yaml").read_text())["steps"][0]["compress"]
    assert options["seqlen"] == 128
    evaluation = ("--dataset", "held-out.txt", "--windows", "2", "--json", "result.json")
    assert dobisvd("eval", "out", *evaluation) == 0
    assert json.loads((gpt2 / "result.json").read_text())["seqlen"] == 128
    assert dobisvd("compare", "out", *evaluation) == 0
    without_weights(monkeypatch)
    for command in (
        ("plan", *SHORT, "--seqlen", "200"),
        ("eval", "out", *evaluation, "--seqlen", "200"),
        ("compare", "out", *evaluation, "--seqlen", "200"),
        ("compress", *SHORT, "new", "--eval-dataset", "held-out.txt", "--eval-seqlen", "200"),
    ):
        error = error_of(capsys, *command)
        assert "200" in error
        assert "has 128 positions: use 128 or fewer" in error


def test_tokens_of_another_model_are_told_before_weights(
    work: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("llama", vocab_size=90).save_pretrained(work / "dense")
    without_weights(monkeypatch)
    for command in (
        ("plan", *SHORT, "--seqlen", "32"),
        ("eval", "small", "--dense", "dense", "--dataset", "text.txt"),
    ):
        error = error_of(capsys, *command)
        assert "text.txt" in error
        assert "the embedding of LlamaForCausalLM has 90 rows: the tokenizer belongs to another model" in error


# --- the command line itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "took"),
    [
        ((*COMPRESS, "--eval-dataset", "held-out.txt", "out"), "--eval-dataset took held-out.txt out"),
        ((*COMPRESS, "--modules-to-not-convert", "q_proj", "out"), "--modules-to-not-convert took q_proj out"),
        (("eval", "--dataset", "held-out.txt", "small"), "--dataset took held-out.txt small"),
        (("run", "--set", "a=1", "recipe.yaml"), "--set took a=1 recipe.yaml"),
    ],
)
def test_an_option_that_took_out_as_a_value_is_told(
    work: Path, capsys: Any, command: tuple[str, ...], took: str
) -> None:
    assert dobisvd(*command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    flag, _, values = took.partition(" took ")
    assert f"{flag} takes all that follows it, and took {values}: put" in " ".join(error.split())


def test_a_device_that_is_not_there_is_told(work: Path, capsys: Any) -> None:
    for command in (
        ("eval", "small", "--dataset", "held-out.txt", "--device", "cuda:99"),
        ("plan", "--model", "dense", "--device", "cuda:99"),
        (*COMPRESS, "out", "--device-map", "cuda:99"),
    ):
        assert "device='cuda:99' cannot be used" in error_of(capsys, *command)


def test_a_terminal_that_knows_only_ascii_is_no_error(work: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(commands.__file__).parents[2])
    text = work / "häuser.txt"
    text.write_text((work / "text.txt").read_text())
    arguments = [part if part != "text.txt" else text.name for part in COMPRESS]
    for command in (
        [*arguments, "süß"],
        ["inspect", "süß"],
        ["eval", "süß", "--dataset", text.name, "--windows", "2"],
    ):
        code = (
            "import sys; from integration_tests.commands.cli_in_process import dobisvd\n"
            "sys.exit(dobisvd(*sys.argv[1:]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *command], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()
