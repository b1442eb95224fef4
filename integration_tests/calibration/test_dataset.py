"""Windows come from the published draw, from text or tokens, and every misuse says what to do about it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from optimum_dobisvd.calibration.dataset import CalibrationWindows, load_windows, tokenizer_identity

DOCUMENTS = [f"Document {i}: the cat counted {i * i} mice, and the café stayed open.\nIt rained." for i in range(40)]
TEXT = "\n\n".join(DOCUMENTS)


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


# --- the draw -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_windows_are_those_of_the_published_draw(tiny_tokenizer, seed):
    windows = load_windows(DOCUMENTS, tiny_tokenizer, nsamples=5, seqlen=16, seed=seed)

    ids = tiny_tokenizer(TEXT)["input_ids"]
    count = len(ids) // 16
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    expected = [ids[16 * i : 16 * (i + 1)] for i in order[:5]]
    assert windows.input_ids.tolist() == expected
    assert windows.input_ids.dtype == torch.int64
    assert windows.attention_mask.dtype == torch.bool
    assert windows.attention_mask.shape == (5, 16)
    assert windows.attention_mask.all()
    assert windows.description["windows_available"] == count


def test_draw_depends_on_the_seed_and_on_nothing_else(tiny_tokenizer):
    def draw(seed: int) -> CalibrationWindows:
        return load_windows(DOCUMENTS, tiny_tokenizer, nsamples=5, seqlen=16, seed=seed)

    torch.manual_seed(1)
    first = draw(0)
    torch.manual_seed(2)
    assert torch.equal(first.input_ids, draw(0).input_ids)
    assert first.sha256() == draw(0).sha256()
    assert first.description == draw(0).description
    assert not torch.equal(first.input_ids, draw(1).input_ids)
    assert first.sha256() != draw(1).sha256()


def test_more_samples_extend_the_same_draw(tiny_tokenizer):
    few = load_windows(DOCUMENTS, tiny_tokenizer, nsamples=3, seqlen=16)
    many = load_windows(DOCUMENTS, tiny_tokenizer, nsamples=9, seqlen=16)
    assert torch.equal(many.input_ids[:3], few.input_ids)


def test_all_windows_can_be_asked_for_and_none_is_drawn_twice(tiny_tokenizer):
    ids = tiny_tokenizer(TEXT)["input_ids"]
    count = len(ids) // 32
    windows = load_windows(DOCUMENTS, tiny_tokenizer, nsamples=count, seqlen=32)
    assert sorted(windows.input_ids.tolist()) == sorted(ids[32 * i : 32 * (i + 1)] for i in range(count))


def test_batches_cover_all_windows_in_order(tiny_tokenizer):
    windows = load_windows(DOCUMENTS, tiny_tokenizer, nsamples=5, seqlen=16)
    batches = list(windows.batches(2))
    assert [len(ids) for ids, _ in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([ids for ids, _ in batches]), windows.input_ids)
    assert torch.equal(torch.cat([mask for _, mask in batches]), windows.attention_mask)
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got 0"):
        next(windows.batches(0))


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_tokens_are_taken_as_given_and_in_order():
    tokens = torch.arange(24).view(4, 6)
    windows = load_windows(tokens, None, nsamples=3, seqlen=2048, seed=5)
    assert torch.equal(windows.input_ids, tokens[:3])
    assert windows.attention_mask.all()
    description = windows.description
    assert (description["nsamples"], description["windows_available"], description["seqlen"]) == (3, 4, 6)
    assert (description["seed"], description["tokenizer"]) == (None, None)
    assert load_windows(tokens, None).description["nsamples"] == 4


@pytest.mark.parametrize(
    "dataset",
    [
        [torch.tensor([1, 2, 3]), torch.tensor([4])],
        [torch.tensor([[1, 2, 3]]), torch.tensor([[4]], dtype=torch.int32)],
        [[1, 2, 3], [4]],
        {"input_ids": [[1, 2, 3], [4]]},
        {"input_ids": torch.tensor([[1, 2, 3], [4, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])},
        {"input_ids": np.array([[1, 2, 3], [4, 0, 0]]), "attention_mask": np.array([[1, 1, 1], [1, 0, 0]])},
        [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]}, {"input_ids": torch.tensor([[4]])}],
        [{"input_ids": [[1, 2, 3]]}, {"input_ids": [4], "attention_mask": [True]}],
    ],
    ids=["1-D", "2-D", "lists", "mapping", "mapping+mask", "numpy", "mappings", "mappings 2-D"],
)
def test_shorter_rows_are_padded_on_the_right_and_masked(dataset):
    windows = load_windows(dataset, None)
    assert windows.attention_mask.tolist() == [[True, True, True], [True, False, False]]
    assert windows.input_ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert windows.input_ids.dtype == torch.int64


def test_what_the_tokenizer_returns_can_be_passed(tiny_tokenizer):
    batch = tiny_tokenizer(["the cat", "the dog ran over the hill"], padding=True, return_tensors="pt")
    windows = load_windows(batch, tiny_tokenizer)
    assert torch.equal(windows.input_ids, batch["input_ids"])
    assert torch.equal(windows.attention_mask, batch["attention_mask"].bool())
    assert not windows.attention_mask[0].all()
    assert windows.description["tokenizer"] == tokenizer_identity(tiny_tokenizer)


def test_the_mask_is_part_of_the_digest():
    ids = torch.tensor([[1, 0]])
    padded = load_windows({"input_ids": ids, "attention_mask": torch.tensor([[1, 0]])}, None)
    assert padded.sha256() != load_windows(ids, None).sha256()
    assert load_windows(ids.view(2, 1), None).sha256() != load_windows(ids, None).sha256()


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([], ValueError, "empty list: pass texts, or token ids"),
        (["", " \n"], ValueError, "the list of texts holds no text"),
        (
            torch.ones(2, 3),
            TypeError,
            "input_ids must be integers, got torch.float32: pass them with dtype torch.long",
        ),
        ([[1.5, 2.0]], TypeError, "input_ids must be integers"),
        (torch.ones(2, 3, dtype=torch.bool), TypeError, "input_ids must be integers, got torch.bool"),
        (["a", torch.tensor([1])], TypeError, "input_ids must be integers, got a str among them"),
        ([{"input_ids": [1]}, "a"], TypeError, "mixes mappings with other things"),
        (torch.ones(2, 3, 4, dtype=torch.long), ValueError, r"must be \[seqlen\] or \[N, seqlen\], got .*\(2, 3, 4\)"),
        (torch.zeros(0, 4, dtype=torch.long), ValueError, "input_ids of the calibration dataset is empty"),
        ([torch.tensor([1]), torch.tensor([])], ValueError, "has an empty row: drop it"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, ValueError, "row 0 .* is padding only: drop it"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, ValueError, "differ in shape"),
        ({"ids": [[1, 2]], "mask": 0}, ValueError, "need the key 'input_ids'; found: ids, mask"),
        (torch.tensor([[3, -100]]), ValueError, r"row 0 .* negative id \(-100\)"),
        (7, TypeError, "cannot calibrate on a int: pass a dataset name"),
        (None, TypeError, "cannot calibrate on a NoneType"),
    ],
)
def test_unusable_datasets_say_why(tiny_tokenizer, dataset, error, message):
    with pytest.raises(error, match=message):
        load_windows(dataset, tiny_tokenizer)


# --- arguments ------------------------------------------------------------------------------------------------------


def test_too_short_a_text_says_what_there_is_and_what_to_change(tiny_tokenizer):
    tokens = len(tiny_tokenizer(TEXT)["input_ids"])
    have = tokens // 64
    with pytest.raises(
        ValueError,
        match=rf"'texts' has {tokens} tokens, which is {have} windows of seqlen=64, but nsamples={have + 1} were "
        rf"asked for: use nsamples={have}, a shorter seqlen \(up to {tokens // (have + 1)}\), or a longer text",
    ):
        load_windows(DOCUMENTS, tiny_tokenizer, nsamples=have + 1, seqlen=64)
    load_windows(DOCUMENTS, tiny_tokenizer, nsamples=have + 1, seqlen=tokens // (have + 1))  # the advice holds
    with pytest.raises(ValueError, match="0 windows of seqlen=100000.*: use a shorter seqlen"):
        load_windows(DOCUMENTS, tiny_tokenizer, nsamples=1, seqlen=100_000)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8"])
@pytest.mark.parametrize("name", ["nsamples", "seqlen"])
def test_counts_must_be_positive(tiny_tokenizer, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1"):
        load_windows(DOCUMENTS, tiny_tokenizer, **{name: value})


def test_text_needs_a_tokenizer(text_file, tmp_path):
    for dataset in (DOCUMENTS, text_file, "wikitext2"):
        with pytest.raises(TypeError, match="needs a tokenizer: pass one, its name or its path, or pass token ids"):
            load_windows(dataset, None)
    with pytest.raises(ValueError, match="could not load the tokenizer .*: pass a tokenizer, or its folder"):
        load_windows(DOCUMENTS, tmp_path)
    with pytest.raises(TypeError, match="expected a transformers tokenizer, its name or its path, got int"):
        tokenizer_identity(3)


def test_a_tokenizer_may_be_a_folder(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    windows = load_windows(DOCUMENTS, str(tmp_path), nsamples=2, seqlen=8)
    assert windows.sha256() == load_windows(DOCUMENTS, tiny_tokenizer, nsamples=2, seqlen=8).sha256()
    assert str(tmp_path) not in json.dumps(windows.description)
    assert load_windows(torch.tensor([[1]]), "no/such-tokenizer").description["tokenizer"] is None


# --- identity of the tokenizer --------------------------------------------------------------------------------------


def test_identity_survives_use_and_reload(tiny_tokenizer, tmp_path):
    before = tokenizer_identity(tiny_tokenizer)
    tiny_tokenizer(["a", "bb"], padding=True, truncation=True, max_length=3)
    assert tokenizer_identity(tiny_tokenizer) == before
    tiny_tokenizer.save_pretrained(tmp_path)
    reloaded = type(tiny_tokenizer).from_pretrained(tmp_path)
    assert tokenizer_identity(reloaded) == before
    assert before["vocab_size"] == len(tiny_tokenizer)


def test_identity_changes_with_the_tokenization(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    pipeline = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    pipeline["model"]["merges"].pop()  # same vocabulary, other tokens
    (tmp_path / "tokenizer.json").write_text(json.dumps(pipeline), encoding="utf-8")
    changed = tokenizer_identity(type(tiny_tokenizer).from_pretrained(tmp_path))
    original = tokenizer_identity(tiny_tokenizer)
    assert changed["vocab_size"] == original["vocab_size"]
    assert changed["sha256"] != original["sha256"]


def test_a_python_tokenizer_has_an_identity_too():
    assert tokenizer_identity(ByT5Tokenizer()) == tokenizer_identity(ByT5Tokenizer())
    assert tokenizer_identity(ByT5Tokenizer()) != tokenizer_identity(ByT5Tokenizer(extra_ids=3))
