"""What a person may get wrong on the command line: one sentence that says what it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel

from integration_tests.commands.cli_in_process import dobisvd
from integration_tests.commands.conftest import COMPRESS
from integration_tests.tiny_models import tiny


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
