"""Text by name, from files or from rows in memory: what calibration draws from and what perplexity is measured on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from .files import FILE_SUFFIXES, file_pieces
from .rows import joined, row_text

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


@dataclass(frozen=True)
class Text:
    """A text that is read in pieces, any number of times.

    `kind` is "dataset", "file" or "texts", `name` what it is remembered by, `where` what errors call it; `pieces()`
    yields strings that are the text when they are joined.
    """

    kind: str
    name: str
    where: str
    pieces: Callable[[], Iterator[str]]


def read_text(
    source: str | os.PathLike[str],
    split: str = "train",
    *,
    streamed_characters: int = 4_000_000,
    tokenizer: Any = None,
) -> str:
    """Read the text of a benchmark dataset ("wikitext2", "c4", "ptb") or of a file, documents joined by blank lines.

    Args:
        source: the name, or the path of a file or of a folder of files; a name wins over a file called the same.
        split: "train", "validation" or "test" of a named text. A file has no splits: all of it is read.
        streamed_characters: C4 is streamed, and its first documents are read until they hold this many characters.
        tokenizer: writes out chats (rows of `messages`) by its template.

    Raises:
        ValueError: an unknown name, split or suffix, a malformed file, or no text.
        FileNotFoundError: the path leads to no file.
        ConnectionError: the hub could not provide the named text.
    """
    text = open_text(source, split, streamed_characters=streamed_characters, tokenizer=tokenizer)
    return require_text("".join(text.pieces()), text.where)


def open_text(
    source: str | os.PathLike[str],
    split: str = "train",
    *,
    streamed_characters: int = 4_000_000,
    tokenizer: Any = None,
) -> Text:
    """Return the text of `read_text`, unread yet. Raises FileNotFoundError, and ValueError for an unknown name."""
    name = os.fspath(source)
    if name in HUB_TEXTS:

        def pieces() -> Iterator[str]:
            return joined(_hub_documents(name, split, streamed_characters))

        return Text("dataset", name, f"the {split} split of {name!r}", pieces)
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path) or os.path.isfile(path):  # unlike Path's own, they take a whole text passed by mistake
        called = "folder" if os.path.isdir(path) else "file"
        return Text("file", path.name, f"the {called} {name!r}", lambda: file_pieces(path, tokenizer))
    known = ", ".join(HUB_TEXTS)
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(
            f"no file {_shorten(name)}: check the path (relative ones start from the working directory), "
            f"or pass one of the known names: {known}"
        )
    raise ValueError(
        f"{_shorten(name)} is neither a known dataset nor a file. Known names: {known}. Pass the path of a file "
        f"({', '.join(FILE_SUFFIXES)}) otherwise; to calibrate on a text itself, pass it in a list"
    )


def text_of_list(parts: Iterable[Any], tokenizer: Any) -> Text:
    """Return the text of a list of strings, of rows (mappings with `text` or `messages`), or of files (paths).

    ValueError names the part that is something else.
    """
    parts = list(parts)

    def documents() -> Iterator[str]:
        for number, part in enumerate(parts, start=1):
            where = f"text {number} of the list"
            if part is None:
                raise ValueError(f"{where} is None: drop it")
            if isinstance(part, os.PathLike):
                yield "".join(open_text(part, tokenizer=tokenizer).pieces())
            else:
                yield row_text(part, where, tokenizer)

    return Text("texts", "texts", "the list of texts", lambda: joined(documents()))


def text_of_rows(rows: Any, tokenizer: Any, streamed_characters: int) -> Text:
    """Return the text of a `datasets.Dataset`; of one without a length, the first rows of so many characters."""
    endless = not hasattr(rows, "__len__")

    def documents() -> Iterator[str]:
        texts = (row_text(row, f"row {number} of the dataset", tokenizer) for number, row in enumerate(rows, start=1))
        return _first(texts, streamed_characters) if endless else texts

    return Text("texts", "texts", f"the {type(rows).__name__}", lambda: joined(documents()))


def first_rows(rows: Any, count: int) -> list[Mapping[str, Any]]:
    """Return the first rows of a dataset, as many as there are up to `count`."""
    return list(islice(iter(rows), count))


def _hub_documents(name: str, split: str, streamed_characters: int) -> Iterator[str]:
    text = HUB_TEXTS[name]
    if split not in text.splits:
        raise ValueError(f"{name!r} has no split {split!r}; it has: {', '.join(text.splits)}")
    from datasets import load_dataset

    try:
        rows = load_dataset(**text.load, split=text.splits[split])
        if not text.load.get("streaming"):
            yield from rows[text.column]
        else:
            yield from _first((row[text.column] for row in rows), streamed_characters)
    except Exception as error:  # the hub's client, its HTTP library and `datasets` raise a family of errors each
        raise ConnectionError(
            f"could not load {name!r} ({text.load['path']}) from the Hugging Face hub: "
            f"{type(error).__name__}: {error}. On a machine without the hub, pass the path of a file instead "
            f"({', '.join(FILE_SUFFIXES)})"
        ) from error


def _first(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Yield documents until they hold so many characters."""
    found = 0
    for document in documents:
        yield document
        found += len(document)
        if found >= characters:
            return


def require_text(text: str, where: str) -> str:
    """Return `text` itself; ValueError, naming `where` it is from, if it is blank."""
    if not text.strip():
        raise ValueError(f"{where} holds no text: pass another dataset")
    return text


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
