"""Text by name or from a file: what calibration draws from and what perplexity is measured on."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_SPLITS = {split: split for split in ("train", "validation", "test")}


@dataclass(frozen=True)
class _HubText:
    """A text of the hub: arguments of `datasets.load_dataset`, the text's column, and its splits by our names."""

    load: dict[str, Any]
    column: str
    splits: dict[str, str] = field(default_factory=lambda: _SPLITS)


HUB_TEXTS = {
    "wikitext2": _HubText({"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}, "text"),
    # C4 has no test split; papers report its validation split.
    "c4": _HubText({"path": "allenai/c4", "name": "en", "streaming": True}, "text", _SPLITS | {"test": "validation"}),
    # The repository itself is a loading script, which `datasets` no longer runs: read the hub's own conversion.
    "ptb": _HubText(
        {
            "path": "ptb-text-only/ptb_text_only",
            "revision": "refs/convert/parquet",
            "data_files": {split: f"penn_treebank/{split}/*.parquet" for split in _SPLITS},
        },
        "sentence",
    ),
}


def read_text(source: str | os.PathLike[str], split: str = "train", *, streamed_characters: int = 4_000_000) -> str:
    """Read the text of a benchmark dataset ("wikitext2", "c4", "ptb") or of a file, documents joined by blank lines.

    Args:
        source: the name, or the path; a name wins over a file called the same.
        split: "train", "validation" or "test" of a named text. A file has no splits: all of it is read.
        streamed_characters: C4 is streamed, and its first documents are read until they hold this many characters.

    Raises:
        ValueError: an unknown name, split or suffix, a malformed file, or no text.
        FileNotFoundError: the path leads to no file.
        ConnectionError: the hub could not provide the named text.
    """
    name = os.fspath(source)
    if name in HUB_TEXTS:
        return require_text(_read_hub(name, split, streamed_characters), f"the {split} split of {name!r}")
    path = Path(os.path.expanduser(name))
    if not os.path.isfile(path):  # unlike Path.is_file, it takes a whole text passed by mistake
        known = ", ".join(HUB_TEXTS)
        if os.path.isdir(path):
            raise ValueError(f"{name!r} is a folder: pass a file ({', '.join(FILE_SUFFIXES)}), or one of: {known}")
        if path.suffix or len(path.parts) > 1:
            raise FileNotFoundError(
                f"no file {_shorten(name)}: check the path (relative ones start from the working directory), "
                f"or pass one of the known names: {known}"
            )
        raise ValueError(
            f"{_shorten(name)} is neither a known dataset nor a file. Known names: {known}. Pass the path of a file "
            f"({', '.join(FILE_SUFFIXES)}) otherwise; to calibrate on a text itself, pass it in a list"
        )
    return require_text(_read_file(path), f"the file {name!r}")


def _read_hub(name: str, split: str, streamed_characters: int) -> str:
    text = HUB_TEXTS[name]
    if split not in text.splits:
        raise ValueError(f"{name!r} has no split {split!r}; it has: {', '.join(text.splits)}")
    from datasets import load_dataset

    try:
        rows = load_dataset(**text.load, split=text.splits[split])
        if not text.load.get("streaming"):
            return "\n\n".join(rows[text.column])
        documents, characters = [], 0
        for row in rows:
            documents.append(row[text.column])
            characters += len(documents[-1])
            if characters >= streamed_characters:
                break
        return "\n\n".join(documents)
    except Exception as error:  # the hub's client, its HTTP library and `datasets` raise a family of errors each
        raise ConnectionError(
            f"could not load {name!r} ({text.load['path']}) from the Hugging Face hub: "
            f"{type(error).__name__}: {error}. On a machine without the hub, pass the path of a file instead "
            f"({', '.join(FILE_SUFFIXES)})"
        ) from error


def _read_file(path: Path) -> str:
    suffix = next((s for s in FILE_SUFFIXES if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise ValueError(f"{path}: cannot read this kind of file; pass one of {', '.join(FILE_SUFFIXES)}")
    try:
        if suffix == ".parquet":
            return "\n\n".join(_parquet_texts(path))
        opener = gzip.open if suffix.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8") as handle:
            return handle.read() if suffix.startswith(".txt") else "\n\n".join(_json_texts(path, handle))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); convert the file") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); copy it again") from error


def _json_texts(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); one object a line is expected") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a JSON {type(row).__name__}; one object a line is expected")
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{path}, line {number}: needs a column 'text' of strings; found: {', '.join(row)}")
        yield row["text"]


def _parquet_texts(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(path).names
        if "text" not in columns:
            raise ValueError(f"{path}: needs a column 'text' of strings; found: {', '.join(columns)}")
        texts = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise ValueError(f"{path}, row {number}: the column 'text' holds a {type(text).__name__}, not a string")
    return texts


def require_text(text: str, where: str) -> str:
    """Return `text` itself; ValueError, naming `where` it is from, if it is blank."""
    if not text.strip():
        raise ValueError(f"{where} holds no text: pass another dataset")
    return text


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
