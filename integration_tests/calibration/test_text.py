"""Text from files and by name: every kind of file gives the same text, and every misuse says what to do about it."""

import copy
import csv
import gzip
import json
import os
import socket
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from optimum_dobisvd.calibration.dataset import load_windows, read_text, tokenizer_identity

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


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("c.txt.gz", "c.jsonl", "c.jsonl.gz", "c.json", "c.json.gz", "c.parquet", "C.TXT", "bom.jsonl", "bom.txt"),
        *("array.json", "strings.json", "indented.json.gz", "c.csv", "c.tsv.gz", "folder"),
    ],
)
def test_every_kind_of_file_gives_the_same_windows(tiny_tokenizer, tmp_path, name):
    path = tmp_path / name
    rows = [{"id": i, "text": document} for i, document in enumerate(DOCUMENTS)]
    opener = gzip.open if name.endswith(".gz") else open
    if name == "folder":
        (path / "deeper").mkdir(parents=True)
        write_jsonl(path / "a.jsonl", rows[:10])
        (path / "deeper" / "b.txt").write_text("\n\n".join(DOCUMENTS[10:]), encoding="utf-8")
        (path / "notes.md").write_text("not read")
    elif name.startswith("bom"):
        write_jsonl(path, rows) if name.endswith("l") else path.write_text(TEXT, encoding="utf-8")
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    elif name.startswith(("array", "strings", "indented")):
        with opener(path, "wt", encoding="utf-8") as handle:
            json.dump(DOCUMENTS if "strings" in name else rows, handle, indent=1 if "indented" in name else None)
    elif ".csv" in name or ".tsv" in name:
        with opener(path, "wt", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, ["id", "text"], delimiter="\t" if ".tsv" in name else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif "json" in name:
        write_jsonl(path, rows)
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
        ("c.jsonl", b'{"text": 3}', r"line 1: the column 'text' holds a int, not a string"),
        (
            "c.jsonl",
            b'{"text": "a"}\n{"text": null}',
            r"line 2: the column 'text' holds a NoneType \(null\).*drop the row",
        ),
        ("c.jsonl", b'{"text": "a \\ud83d b"}', r"line 1: character 3 of the text is a lone surrogate"),
        ("c.json", b'[{"text": "a"}, {"text": null}]', r"c\.json, item 2: the column 'text' holds a NoneType"),
        ("c.json", b'[{"text": "a"}, {"text"', r"c\.json, item 2: not JSON"),
        ("c.csv", b"body,url\na,b", r"c\.csv: needs a column 'text' of strings; found: body, url"),
        ("c.jsonl", b'{"messages": []}', r"line 1: the column 'messages' holds chats, and the tokenizer has no chat"),
        ("c.parquet", b"PAR1 or not", r"c\.parquet: not a parquet file"),
        ("c.docx", b"text\na", r"c\.docx: cannot read this kind of file; pass one of \.txt"),
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


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"")
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


# --- rows in memory -------------------------------------------------------------------------------------------------


def same_as_the_list(dataset, tokenizer):
    found = load_windows(dataset, tokenizer, nsamples=4, seqlen=16)
    assert found.sha256() == load_windows(DOCUMENTS, tokenizer, nsamples=4, seqlen=16).sha256()


def test_rows_and_files_in_a_list_are_its_texts(tiny_tokenizer, text_file):
    same_as_the_list([{"text": document} for document in DOCUMENTS], tiny_tokenizer)
    same_as_the_list([text_file], tiny_tokenizer)


def test_a_dataset_object_is_read(tiny_tokenizer):
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS, "id": range(len(DOCUMENTS))})
    same_as_the_list(rows, tiny_tokenizer)
    windows = load_windows(rows.to_iterable_dataset(), tiny_tokenizer, nsamples=4, seqlen=16)
    assert windows.input_ids.shape == (4, 16)
    assert windows.description["windows_available"] < 80  # of its first rows
    with pytest.raises(
        ValueError, match=r"the DatasetDict has the splits train, test: pass one of .* dataset\['train'\]"
    ):
        load_windows(datasets.DatasetDict(train=rows, test=rows), tiny_tokenizer)
    with pytest.raises(ValueError, match="row 1 of the dataset: needs a column 'text' of strings; found: body"):
        load_windows(rows.rename_column("text", "body").remove_columns("id"), tiny_tokenizer)


def test_an_endless_dataset_is_read_no_further_than_needed(tiny_tokenizer):
    read = []

    def rows():
        for number in range(10**9):
            read.append(number)
            yield {"text": DOCUMENTS[number % 40]}

    windows = load_windows(datasets.IterableDataset.from_generator(rows), tiny_tokenizer, nsamples=4, seqlen=32)
    assert windows.input_ids.shape == (4, 32)
    assert len(read) < 60


def test_a_dataset_of_tokens_is_taken_in_order(tiny_tokenizer):
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[5, 6, 7], [8, 9]], "attention_mask": [[1, 1, 1], [1, 1]], "id": [0, 1]}
    )
    for dataset in (rows, rows.to_iterable_dataset(), rows.with_format("torch")):
        windows = load_windows(dataset, None, nsamples=2)
        assert windows.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
        assert windows.attention_mask.tolist() == [[True] * 3, [True, True, False]]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (["a", None], "text 2 of the list is None: drop it"),
        ([None], "text 1 of the list is None"),
        (["a", "b \ud800"], r"text 2 of the list: character 3 of the text is a lone surrogate \('\\ud800'\)"),
        ([{"text": "a"}, {"text": None}], r"text 2 of the list: the column 'text' holds a NoneType \(null\)"),
    ],
)
def test_a_part_of_a_list_that_is_no_text_is_named(tiny_tokenizer, dataset, message):
    with pytest.raises(ValueError, match=message):
        load_windows(dataset, tiny_tokenizer, nsamples=1, seqlen=1)


CHATS = [
    [{"role": "user", "content": f"How many mice are {i}?"}, {"role": "assistant", "content": f"As many as {i * i}."}]
    for i in range(40)
]


def test_chats_are_written_out_by_the_template(tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    texts = [f"<user> How many mice are {i}?\n<assistant> As many as {i * i}.\n" for i in range(40)]
    assert read_text(path, tokenizer=tokenizer) == "\n\n".join(texts)
    expected = load_windows(texts, tokenizer, nsamples=4, seqlen=16).sha256()
    for dataset in (path, datasets.Dataset.from_dict({"messages": CHATS}), [{"messages": chat} for chat in CHATS]):
        assert load_windows(dataset, tokenizer, nsamples=4, seqlen=16).sha256() == expected
    with pytest.raises(ValueError, match="line 1: the column 'messages' holds chats, and no tokenizer was given"):
        read_text(path)
    write_jsonl(path, [{"messages": [{"role": "user"}]}])
    tokenizer.chat_template = "{{ raise_exception('no content') }}"
    with pytest.raises(ValueError, match="line 1: the tokenizer's chat template cannot write its 'messages'"):
        read_text(path, tokenizer=tokenizer)
