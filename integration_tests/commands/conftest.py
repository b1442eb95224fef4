"""A tiny dense model and a text in a working directory, and a checkpoint compressed from them."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from integration_tests.commands.cli_in_process import dobisvd
from integration_tests.tiny_models import tiny

WORDS = "the cat sat on mat while dog ran over hill state of union president spoke to young republic and its layers"
COMPRESS = ("compress", "--model", "dense", "--dataset", "text.txt", "--nsamples", "6", "--seqlen", "32")
OFFLINE = "huggingface_hub.constants.HF_HUB_OFFLINE"


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is not there is not asked for on the network, which would be tried several times."""
    monkeypatch.setattr(OFFLINE, True)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: Any, tiny_tokenizer: Any) -> Path:
    """A folder with `dense/` (a Llama and its tokenizer), `text.txt`, `held-out.txt` and `small/`, made of them."""
    folder = tmp_path_factory.mktemp("prepared")
    tiny("llama").save_pretrained(folder / "dense")
    tiny_tokenizer.save_pretrained(folder / "dense")
    draw = random.Random(0)
    for name in ("text.txt", "held-out.txt"):
        (folder / name).write_text(" ".join(draw.choices(WORDS.split(), k=1500)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OFFLINE, True)
        patch.chdir(folder)
        assert dobisvd(*COMPRESS, "small") == 0
    return folder


@pytest.fixture
def work(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working directory."""
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    return folder
