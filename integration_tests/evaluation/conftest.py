"""The working directory of the command tests, with a folder `data` of rows for each of the eight local tasks."""

from pathlib import Path

import pytest

from integration_tests.commands.conftest import _no_hub, prepared, work  # noqa: F401
from integration_tests.evaluation.task_rows import write_rows


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of data sets that other tests and this machine's user have nothing to do with."""
    config = pytest.importorskip("datasets.config")
    folder = tmp_path / "datasets-cache"
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))  # for new processes
    return folder


@pytest.fixture
def data(work: Path) -> Path:  # noqa: F811
    """`data/` in the working directory."""
    folder = work / "data"
    folder.mkdir()
    write_rows(folder)
    return folder
