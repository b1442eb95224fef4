"""Windows come from the published draw, from every kind of source, and every misuse says what to do about it."""

import gzip
import json
import os
import socket
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import ByT5Tokenizer

import datasets
from optimum_dobisvd.calibration.dataset import CalibrationWindows, load_windows, read_text, tokenizer_identity

DOCUMENTS = [f"Document {i}: the cat counted {i * i} mice, and the café stayed open.\nIt rained." for i in range(40)]
TEXT = "\n\n".join(DOCUMENTS)


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: list) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
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
    count = len(tiny_tokenizer(TEXT)["input_ids"]) // 32
    windows = load_windows(DOCUMENTS, tiny_tokenizer, nsamples=count, seqlen=32)
    assert len({tuple(row) for row in windows.input_ids.tolist()}) == count


def test_batches_cover_all_windows_in_order(tiny_tokenizer):
    windows = load_windows(DOCUMENTS, tiny_tokenizer, nsamples=5, seqlen=16)
    batches = list(windows.batches(2))
    assert [len(ids) for ids, _ in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([ids for ids, _ in batches]), windows.input_ids)
    assert torch.equal(torch.cat([mask for _, mask in batches]), windows.attention_mask)
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got 0"):
        next(windows.batches(0))


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c.txt.gz", "c.jsonl", "c.jsonl.gz", "c.json", "c.json.gz", "c.parquet", "C.TXT"])
def test_every_kind_of_file_gives_the_same_windows(tiny_tokenizer, tmp_path, name):
    path = tmp_path / name
    if "json" in name:
        write_jsonl(path, [{"id": i, "text": document} for i, document in enumerate(DOCUMENTS)])
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS}), path)
    else:
        path.write_bytes(gzip.compress(TEXT.encode()) if name.endswith(".gz") else TEXT.encode())

    from_file = load_windows(path, tiny_tokenizer, nsamples=4, seqlen=16)
    from_texts = load_windows(DOCUMENTS, tiny_tokenizer, nsamples=4, seqlen=16)
    assert read_text(path) == TEXT
    assert from_file.sha256() == from_texts.sha256()
    assert from_file.description["sha256"] == from_texts.description["sha256"]
    assert (from_file.description["kind"], from_file.description["dataset"]) == ("file", name)


def test_description_is_json_without_the_folder(tiny_tokenizer, text_file):
    description = load_windows(str(text_file), tiny_tokenizer, nsamples=4, seqlen=16, seed=3).description
    text = json.dumps(description)
    assert str(text_file.parent) not in text
    assert {key: description[key] for key in ("kind", "dataset", "nsamples", "seqlen", "seed")} == {
        "kind": "file",
        "dataset": "corpus.txt",
        "nsamples": 4,
        "seqlen": 16,
        "seed": 3,
    }
    assert description["tokenizer"] == tokenizer_identity(tiny_tokenizer)


def test_json_lines_keep_separators_inside_strings_and_skip_blank_lines(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": "one\u2028still one"}, {"text": "two"}])
    path.write_text("\n" + path.read_text(encoding="utf-8") + "\n  \n", encoding="utf-8")
    assert read_text(path) == "one\u2028still one\n\ntwo"


def test_home_folder_is_expanded(text_file, monkeypatch):
    monkeypatch.setenv("HOME", str(text_file.parent))
    assert read_text("~/corpus.txt") == TEXT


def malformed(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", b"", r"c\.txt' holds no text: pass another dataset"),
        ("c.txt", b" \n\n ", "holds no text"),
        ("c.txt", b"caf\xe9", r"c\.txt: not UTF-8 text"),
        ("c.txt.gz", b"plain text", r"c\.txt\.gz: not a whole gzip file"),
        ("c.txt.gz", gzip.compress(TEXT.encode())[:-40], r"c\.txt\.gz: not a whole gzip file"),
        ("c.jsonl", b'{"text": "a"}\n{"text": ', r"c\.jsonl, line 2: not JSON"),
        ("c.jsonl", b'{"text": "a"}\n["b"]', r"c\.jsonl, line 2: a JSON list; one object a line"),
        ("c.jsonl", b'{"body": "a", "url": "b"}', r"line 1: needs a column 'text' of strings; found: body, url"),
        ("c.jsonl", b'{"text": 3}', r"line 1: needs a column 'text' of strings; found: text"),
        ("c.parquet", b"PAR1 or not", r"c\.parquet: not a parquet file"),
        ("c.csv", b"text\na", r"c\.csv: cannot read this kind of file; pass one of \.txt"),
    ],
)
def test_a_malformed_file_is_named(tiny_tokenizer, tmp_path, name, content, message):
    path = malformed(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        load_windows(path, tiny_tokenizer, nsamples=1, seqlen=4)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "url": ["b"]}, "needs a column 'text' of strings; found: body, url"),
        ({"text": ["a", None]}, "row 2: the column 'text' holds a NoneType"),
        ({"text": [1, 2]}, "row 1: the column 'text' holds a int"),
    ],
)
def test_a_parquet_file_needs_a_text_column(tmp_path, columns, message):
    path = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(ValueError, match=message):
        read_text(path)


@pytest.mark.parametrize("source", ["missing.txt", "folder/missing", "Salesforce/wikitext", "~nobody-here/c.txt"])
def test_a_missing_file_is_not_mistaken_for_a_name(source, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=r"check the path .* known names: wikitext2, c4, ptb"):
        read_text(source)


@pytest.mark.parametrize("source", ["wikitext-2", "x" * 5000, "no\0name"])
def test_an_unknown_name_lists_the_known_ones(source):
    with pytest.raises(ValueError, match=r"neither a known dataset nor a file\. Known names: wikitext2, c4, ptb") as e:
        read_text(source)
    assert len(str(e.value)) < 500


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder: pass a file"):
        read_text(tmp_path)


# --- named texts ----------------------------------------------------------------------------------------------------


class FakeHub:
    """Stands in for datasets.load_dataset: remembers what was asked for and how many rows were read."""

    def __init__(self, rows: list[dict]):
        self.rows, self.calls, self.rows_read = rows, [], 0

    def __call__(self, path, name=None, *, split, streaming=False, **rest):
        self.calls.append((path, name, split, rest))
        return self.stream() if streaming else datasets.Dataset.from_list(self.rows)

    def stream(self):
        for row in self.rows:
            self.rows_read += 1
            yield row


def test_wikitext2_rows_are_joined_by_blank_lines(tiny_tokenizer, monkeypatch):
    hub = FakeHub([{"text": ""}, {"text": " = Title = \n"}, {"text": DOCUMENTS[0]}])
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert read_text("wikitext2", split="test") == "\n\n = Title = \n\n\n" + DOCUMENTS[0]
    windows = load_windows("wikitext2", tiny_tokenizer, nsamples=1, seqlen=8)
    assert [call[:3] for call in hub.calls] == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    ]
    assert (windows.description["kind"], windows.description["dataset"]) == ("dataset", "wikitext2")


def test_ptb_is_read_from_its_sentence_column(monkeypatch):
    hub = FakeHub([{"sentence": "no it was n't"}, {"sentence": "black monday"}])
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert read_text("ptb", split="validation") == "no it was n't\n\nblack monday"


def test_c4_is_streamed_no_further_than_needed(tiny_tokenizer, monkeypatch):
    hub = FakeHub([{"text": document} for document in DOCUMENTS * 50])
    monkeypatch.setattr(datasets, "load_dataset", hub)
    windows = load_windows("c4", tiny_tokenizer, nsamples=4, seqlen=32)
    assert windows.input_ids.shape == (4, 32)
    assert windows.description["windows_available"] > 4
    assert hub.rows_read < 30
    assert read_text("c4", "test", streamed_characters=1) == DOCUMENTS[0]
    assert hub.calls[-1][:3] == ("allenai/c4", "en", "validation")


def test_an_unreachable_hub_says_to_pass_a_file(tiny_tokenizer, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("Couldn't reach 'Salesforce/wikitext' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match=r"'wikitext2' \(Salesforce/wikitext\).*reach.*pass the path of a file"):
        load_windows("wikitext2", tiny_tokenizer)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'wikitext2' has no split 'dev'; it has: train, validation, test"):
        read_text("wikitext2", split="dev")


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
def test_named_texts_load_from_the_real_hub(name):
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        pytest.skip("HF_HUB_OFFLINE is set")
    try:
        socket.create_connection(("huggingface.co", 443), timeout=5).close()
    except OSError as error:
        pytest.skip(f"the Hugging Face hub cannot be reached: {error}")
    assert len(read_text(name, split="test", streamed_characters=10_000)) >= 10_000


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
        match=rf"'texts' has {tokens} tokens, which is {have} windows of seqlen=64, but nsamples={have + 1} were asked "
        rf"for: use nsamples={have}, a shorter seqlen \(up to {tokens // (have + 1)}\), or a longer text",
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
    with pytest.raises(ValueError, match="could not load the tokenizer .*Pass a tokenizer, or its folder"):
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


def test_identity_changes_with_the_tokenisation(tiny_tokenizer, tmp_path):
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
