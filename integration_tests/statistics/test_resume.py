"""A run that was cut short goes on where it was and ends with the very same bytes."""

import os
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from integration_tests.statistics.tiny_model_statistics import collect
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.statistics.store import StatisticsStore

REPOSITORY = Path(__file__).parents[2]

# The process dies while the second block is on disk under its temporary name and not yet renamed.
KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(int(sys.argv[2]))
from integration_tests.statistics.tiny_model_statistics import collect
from integration_tests.tiny_models import tiny, tokens

rename = os.replace
def replace(source, target):
    if str(target).endswith("block-00001.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace
collect(tiny("llama"), tokens(5, 24), folder=sys.argv[1])
"""


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name[0] != "."}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    collect(tiny("llama"), tokens(5, 24), folder=folder)
    return digests(folder)


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_failed_run_resumes_after_its_last_finished_block(
    tmp_path: Path, uninterrupted: dict[str, str], monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    model = tiny("llama")
    put = StatisticsStore.put
    finished: list[str] = []

    def failing(store: StatisticsStore, block: str, statistics: Any) -> None:
        if len(finished) == done:
            raise OSError("No space left on device")
        put(store, block, statistics)
        finished.append(block)

    monkeypatch.setattr(StatisticsStore, "put", failing)
    with pytest.raises(OSError, match="No space left"):
        collect(model, tokens(5, 24), folder=tmp_path)
    assert not any(module._forward_pre_hooks for module in model.modules())
    monkeypatch.setattr(StatisticsStore, "put", put)

    collected: list[str] = []
    monkeypatch.setattr(
        StatisticsStore, "put", lambda store, block, values: (collected.append(block), put(store, block, values))
    )
    collect(tiny("llama"), tokens(5, 24), folder=tmp_path)
    assert [*finished, *collected] == list(find_layout(model).blocks)
    assert digests(tmp_path) == uninterrupted


def test_a_killed_process_leaves_a_folder_that_another_resumes(tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "store"), str(torch.get_num_threads())],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert digests(tmp_path / "store").keys() == {"statistics.json", "block-00000.safetensors"}
    collect(tiny("llama"), tokens(5, 24), folder=tmp_path / "store")
    assert digests(tmp_path / "store") == uninterrupted


def test_a_complete_store_needs_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even hooks: every block is there, so none is watched."""
    collect(tiny("llama"), tokens(2, 16), folder=tmp_path)

    def watched(*_: Any, **__: Any) -> None:
        raise AssertionError("a linear was watched again")

    monkeypatch.setattr("optimum_dobisvd.statistics.collect.InputCollector.enter", watched)
    collect(tiny("llama"), tokens(2, 16), folder=tmp_path)


def test_a_block_lost_from_the_folder_is_collected_again(tmp_path: Path) -> None:
    collect(tiny("gpt2"), tokens(3, 16), folder=tmp_path)
    before = digests(tmp_path)
    (tmp_path / "block-00001.safetensors").unlink()
    collect(tiny("gpt2"), tokens(3, 16), folder=tmp_path)
    assert digests(tmp_path) == before


def test_resuming_does_not_need_linears_of_finished_blocks(tmp_path: Path) -> None:
    """The finished blocks run only to feed the next: their linears are not watched, whatever they now are."""
    model = tiny("llama")
    collect(model, tokens(2, 16), folder=tmp_path)
    (tmp_path / "block-00002.safetensors").unlink()
    hooked: list[str] = []
    register = nn.Module.register_forward_pre_hook

    def recording(module: nn.Module, hook: Any, **kwargs: Any) -> Any:
        if type(module) is nn.Linear:
            hooked.extend(name for name, each in model.named_modules() if each is module)
        return register(module, hook, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_forward_pre_hook", recording)
        collect(model, tokens(2, 16), folder=tmp_path)
    assert hooked
    assert all(name.startswith("model.layers.2.") for name in hooked)
