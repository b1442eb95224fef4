"""Long texts: little memory, windows from all over the text, the same for the same seed."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from integration_tests.fresh_processes import run_python
from optimum_dobisvd.calibration import draw as drawing
from optimum_dobisvd.calibration import token_ids as pieces
from optimum_dobisvd.calibration.dataset import load_windows
from optimum_dobisvd.calibration.token_ids import token_ids

PARAGRAPHS = [
    f"Paragraph {i} tells of {i * i % 977} cats and of {i % 13} dogs;\nthe café was open. " for i in range(6000)
]


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long begins at 20,000 characters, pieces have 4,096."""
    monkeypatch.setattr(drawing, "LONGEST_WHOLE", 20_000)
    monkeypatch.setattr(pieces, "_PIECE", 4096)
    monkeypatch.setattr(pieces, "_OVERLAP", 1024)


def written(folder: Path) -> dict[str, Path]:
    """The same text as files of several kinds."""
    paths = {name: folder / name for name in ("a.txt", "a.jsonl", "a.json", "a.jsonl.gz")}
    rows = [json.dumps({"text": paragraph}) for paragraph in PARAGRAPHS]
    paths["a.txt"].write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    paths["a.jsonl"].write_text("\n".join(rows), encoding="utf-8")
    paths["a.json"].write_text(f"[{', '.join(rows)}]", encoding="utf-8")
    paths["a.jsonl.gz"].write_bytes(gzip.compress("\n".join(rows).encode()))
    return paths


def test_long_texts_are_drawn_from_everywhere(tiny_tokenizer: Any, tmp_path: Path, short_limits: None) -> None:
    settings = {"nsamples": 40, "seqlen": 100}
    found = {name: load_windows(path, tiny_tokenizer, **settings) for name, path in written(tmp_path).items()}
    first = found["a.txt"]
    assert {windows.sha256() for windows in found.values()} == {first.sha256()}
    assert {windows.description["sha256"] for windows in found.values()} == {first.description["sha256"]}
    text = "\n\n".join(PARAGRAPHS)
    places = [text.index(tiny_tokenizer.decode(row)) for row in first.input_ids]  # they are of the text, as it is
    assert len(set(places)) == 40
    tenths = {10 * place // len(text) for place in places}
    assert tenths == set(range(10))
    assert max(places) - min(places) > 0.9 * len(text)
    again = load_windows(tmp_path / "a.txt", tiny_tokenizer, **settings)
    assert again.sha256() == first.sha256()
    assert load_windows(tmp_path / "a.txt", tiny_tokenizer, seed=1, **settings).sha256() != first.sha256()
    more = load_windows(tmp_path / "a.txt", tiny_tokenizer, nsamples=50, seqlen=100)
    assert torch.equal(more.input_ids[:40], first.input_ids)


def test_cells_with_too_few_tokens_are_passed_over(tiny_tokenizer: Any, tmp_path: Path, short_limits: None) -> None:
    text = "".join(paragraph + " " * 400 for paragraph in PARAGRAPHS[:600])  # runs of blanks, one token each
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    windows = load_windows(path, tiny_tokenizer, nsamples=20, seqlen=24)
    assert windows.input_ids.shape == (20, 24)


def test_many_windows_of_a_long_text_are_the_published_draw(
    tiny_tokenizer: Any, tmp_path: Path, short_limits: None
) -> None:
    path = written(tmp_path)["a.txt"]
    ids = tiny_tokenizer("\n\n".join(PARAGRAPHS))["input_ids"]
    count = len(ids) // 500
    windows = load_windows(path, tiny_tokenizer, nsamples=count, seqlen=500)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    assert windows.input_ids.tolist() == [ids[500 * i : 500 * (i + 1)] for i in order]


def test_pieces_give_the_ids_of_the_whole(tiny_tokenizer: Any, short_limits: None) -> None:
    for text in ("".join(PARAGRAPHS), "\n\n".join(PARAGRAPHS), "é模型🙂 x" * 4000):
        expected = tiny_tokenizer(text)["input_ids"]
        assert token_ids(tiny_tokenizer, text).tolist() == expected
        assert token_ids(tiny_tokenizer, text, at_most=777).tolist() == expected[:777]


@pytest.mark.parametrize("text", ["a" * 30_000, " " * 30_000, "ab" * 15_000])
def test_texts_without_a_seam_are_tokenized_at_once(tiny_tokenizer: Any, short_limits: None, text: str) -> None:
    assert token_ids(tiny_tokenizer, text).tolist() == tiny_tokenizer(text)["input_ids"]


def test_special_tokens_stand_at_the_ends(tiny_tokenizer: Any, tmp_path: Path, short_limits: None) -> None:
    from tokenizers.processors import TemplateProcessing

    tiny_tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos> <eos>", special_tokens=[("<eos>", 0)]
    )
    text = "".join(PARAGRAPHS)
    expected = tokenizer(text)["input_ids"]
    assert expected[:1] + expected[-2:] == [0, 0, 0]
    assert token_ids(tokenizer, text).tolist() == expected


MEASURE = """
import resource, sys
from transformers import AutoTokenizer
from optimum_dobisvd.calibration.dataset import load_windows
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
windows = load_windows(sys.argv[1], tokenizer, nsamples=128, seqlen=2048)
print(tuple(windows.input_ids.shape), (peak() - before) // 1024)
"""


@pytest.mark.parametrize(("suffix", "size"), [("txt", 500), ("jsonl", 200)])
def test_a_text_of_hundreds_of_megabytes_takes_little_memory(
    tiny_tokenizer: Any, tmp_path: Path, suffix: str, size: int
) -> None:
    """Under 1 GB for 500 MB of text. It was about 100 bytes for each byte of text."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / f"large.{suffix}"
    block = "".join(
        paragraph + "\n\n" if suffix == "txt" else json.dumps({"text": paragraph}) + "\n" for paragraph in PARAGRAPHS
    )
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(size * 1_000_000 // len(block)):
            file.write(block)
    done = run_python(
        MEASURE, str(path), str(tmp_path / "tokenizer"), PYTHONPATH=str(Path(drawing.__file__).parents[2])
    )
    path.unlink()
    assert done.returncode == 0, done.stderr
    shape, _, megabytes = done.stdout.strip().rpartition(" ")
    assert shape == "(128, 2048)"
    assert int(megabytes) < 500
