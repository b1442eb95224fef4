"""The folder of statistics: same as memory, reused only where it belongs, and clear about what is wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from integration_tests.statistics.tiny_model_statistics import collect
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.statistics.store import INDEX_NAME, StatisticsStore

BLOCKS = [f"model.layers.{index}" for index in range(3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete store of a tiny model."""
    collect(tiny("llama"), tokens(2, 16), folder=tmp_path / "store")
    return tmp_path / "store"


def reopen(folder: Path) -> StatisticsStore:
    index = json.loads((folder / INDEX_NAME).read_text())
    return StatisticsStore(index["fingerprint"], index["blocks"], folder)


def test_a_store_on_disk_holds_what_one_in_memory_does(folder: Path) -> None:
    disk, memory = reopen(folder), collect(tiny("llama"), tokens(2, 16))
    assert disk.is_complete
    assert memory.is_complete
    for block in BLOCKS:
        one, other = disk.block(block), memory.block(block)
        assert one.input_key == other.input_key
        assert list(one.inputs) == list(other.inputs)
        for name, inputs in one.inputs.items():
            assert (inputs.size, inputs.tokens) == (other.inputs[name].size, other.inputs[name].tokens)
            assert torch.equal(inputs.gram, other.inputs[name].gram)
            assert torch.equal(inputs.abs_mean, other.inputs[name].abs_mean)


def test_an_empty_folder_may_be_given(tmp_path: Path) -> None:
    store = StatisticsStore({"weights": "a"}, BLOCKS, tmp_path)
    assert not store.is_complete
    assert reopen(tmp_path).fingerprint == {"weights": "a"}


@pytest.mark.parametrize("content", ["notes.txt", "model.safetensors", ".hidden"])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / content).write_text("precious")
    with pytest.raises(ValueError, match="is not a statistics store"):
        StatisticsStore({}, BLOCKS, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [content]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("precious")
    with pytest.raises(ValueError, match="is not a statistics store"):
        StatisticsStore({}, BLOCKS, tmp_path / "store")
    assert (tmp_path / "store").read_text() == "precious"


def test_a_run_killed_while_it_wrote_the_index_does_not_block_the_folder(tmp_path: Path) -> None:
    (tmp_path / f".{INDEX_NAME}.x7gh2k.json").write_text('{"format_ver')
    StatisticsStore({}, BLOCKS, tmp_path)
    assert (tmp_path / INDEX_NAME).exists()


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / INDEX_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"7", b"{}", b"\xff\xfe", b'{"format_version": 1, "fingerprint": 3, "blocks": []}'],
)
def test_a_damaged_index_is_named_with_the_remedy(folder: Path, text: bytes) -> None:
    (folder / INDEX_NAME).write_bytes(text)
    with pytest.raises(ValueError, match=rf"{INDEX_NAME} is damaged .* delete the folder"):
        StatisticsStore({}, BLOCKS, folder)


def test_another_format_is_refused(folder: Path) -> None:
    edit_index(folder, format_version=2)
    with pytest.raises(ValueError, match="has format 2, this version reads 1"):
        reopen(folder)


def test_other_blocks_are_refused(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    with pytest.raises(ValueError, match="blocks: 3 in the store, 2 now"):
        StatisticsStore(index["fingerprint"], BLOCKS[:2], folder)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign", "lacking", "misshapen", "metadata"])
def test_a_damaged_block_file_is_named_with_the_remedy(folder: Path, damage: str) -> None:
    path = folder / "block-00001.safetensors"
    data = path.read_bytes()
    tensors = load_file(path)
    metadata = {"statistics": '{"leader": {"a": "a"}, "tokens": {"a": 4}}'}
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("what is this")
    elif damage == "foreign":
        save_file(tensors, path)
    elif damage == "lacking":
        save_file({"a.abs_mean": torch.zeros(3)}, path, metadata=metadata)
    elif damage == "misshapen":
        save_file({"a.abs_mean": torch.zeros(3), "a.gram": torch.zeros(7)}, path, metadata=metadata)
    else:
        save_file(tensors, path, metadata={"statistics": '{"leader": {"a": "b"}, "tokens": {}}'})
    store = reopen(folder)
    store.block(BLOCKS[0])
    with pytest.raises(ValueError, match=r"block-00001\.safetensors is damaged .* delete this file"):
        store.block(BLOCKS[1])
    path.unlink()
    assert not reopen(folder).is_complete


def test_a_block_that_was_not_collected_is_an_error(folder: Path) -> None:
    (folder / "block-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no statistics of model\.layers\.2 yet"):
        reopen(folder).block("model.layers.2")


def test_linears_that_were_excluded_then_are_missed_before_anything_is_changed(tmp_path: Path) -> None:
    model = tiny("llama")
    collect(model, tokens(2, 16), folder=tmp_path / "store", exclude=["down_proj"])
    store = reopen(tmp_path / "store")
    fewer, all_of_them = find_layout(model, ["down_proj"]), find_layout(model)
    store.require({block: fewer.linears_of(block) for block in BLOCKS})
    with pytest.raises(ValueError, match=r"lack model\.layers\.0\.mlp\.down_proj .* excluded"):
        store.require({block: all_of_them.linears_of(block) for block in BLOCKS})


def test_spectra_are_kept_for_the_next_run(folder: Path) -> None:
    assert reopen(folder).spectra("svd_llm_v2") is None
    spectra = {"a": torch.tensor([3.0, 1.0]).double()}
    reopen(folder).put_spectra("svd_llm_v2", spectra)
    store = reopen(folder)
    assert torch.equal(store.spectra("svd_llm_v2")["a"], spectra["a"])
    assert store.spectra("svd_llm_v2")["a"].dtype == torch.float64
    assert store.spectra("asvd") is None
    memory = StatisticsStore({}, BLOCKS)
    memory.put_spectra("asvd", spectra)
    assert memory.spectra("asvd") == spectra


def test_damaged_spectra_are_named_with_the_remedy(folder: Path) -> None:
    (folder / "spectra-asvd.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"spectra-asvd\.safetensors is damaged .* delete it"):
        reopen(folder).spectra("asvd")


def test_nothing_but_the_named_files_is_left_in_the_folder(folder: Path) -> None:
    assert sorted(entry.name for entry in folder.iterdir()) == [
        *(f"block-{index:05d}.safetensors" for index in range(3)),
        INDEX_NAME,
    ]
