"""What a person may get wrong on the command line: one sentence that says what it is."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from integration_tests.commands.cli_in_process import dobisvd
from integration_tests.commands.conftest import COMPRESS


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
