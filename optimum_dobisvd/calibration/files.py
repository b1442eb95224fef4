"""Files of text, read piece by piece: plain, JSON lines and arrays, CSV, parquet, and folders of them."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .rows import COLUMNS, joined, missing_column, row_text

logger = logging.getLogger(__name__)

FILE_SUFFIXES = (
    *(".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz"),
    *(".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet"),
)
_CHARACTERS_AT_ONCE = 1 << 20
_ROWS_AT_ONCE = 16  # a row may be a book
_LONGEST_FIELD = (1 << 31) - 1  # of a CSV file; Python's own limit is 131,072 characters


def file_pieces(path: Path, tokenizer: Any = None) -> Iterator[str]:
    """Yield the text of a file, or of all files in a folder, in pieces of any length, blank lines between documents.

    Raises:
        ValueError: an unknown suffix, a folder without a file of text, or a malformed file (names the line).
    """
    if path.is_dir():
        yield from _between(file_pieces(file, tokenizer) for file in files_in(path))
        return
    suffix = suffix_of(path)
    if suffix is None:
        raise ValueError(f"{path}: cannot read this kind of file; pass one of {', '.join(FILE_SUFFIXES)}")
    try:
        if suffix == ".parquet":
            yield from joined(_parquet_texts(path, tokenizer))
            return
        with (gzip.open if suffix.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as handle:
            if suffix.startswith(".txt"):
                while piece := handle.read(_CHARACTERS_AT_ONCE):
                    yield piece
            elif suffix.startswith(".json"):
                yield from joined(_json_texts(path, handle, tokenizer))
            else:
                yield from joined(_csv_texts(path, handle, "\t" if suffix.startswith(".tsv") else ",", tokenizer))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); convert the file") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); copy it again") from error


def suffix_of(path: Path) -> str | None:
    """Return which of `FILE_SUFFIXES` a file has, None if none."""
    return next((suffix for suffix in FILE_SUFFIXES if path.name.lower().endswith(suffix)), None)


def files_in(folder: Path) -> list[Path]:
    """Return the files of text in a folder and below it, sorted; what is left out is logged. ValueError for none."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    shown = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    read = [path for path in shown if suffix_of(path) is not None]
    if not read:
        raise ValueError(
            f"{str(folder)!r} is a folder: pass a file ({', '.join(FILE_SUFFIXES)}), or a folder that holds some. "
            "(One of datasets.save_to_disk is read by datasets.load_from_disk: pass what that returns)"
        )
    left = [str(path.relative_to(folder)) for path in shown if suffix_of(path) is None]
    if left:
        logger.warning("%s: %d files are not read as text: %s", folder, len(left), ", ".join(left[:5]))
    return read


def _between(texts: Iterator[Iterator[str]]) -> Iterator[str]:
    for number, pieces in enumerate(texts):
        if number:
            yield "\n\n"
        yield from pieces


def _json_texts(path: Path, handle: Any, tokenizer: Any) -> Iterator[str]:
    """Texts of an array of rows, or of rows one a line."""
    first = handle.read(1)
    while first and first.isspace():
        first = handle.read(1)
    if first == "[":
        for number, row in enumerate(_array_items(path, handle), start=1):
            yield row_text(row, f"{path}, item {number}", tokenizer)
        return
    handle.seek(0)
    for number, line in enumerate(handle, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not JSON ({error}); one object a line is expected, or one array of objects"
            ) from error
        yield row_text(row, f"{path}, line {number}", tokenizer)


def _array_items(path: Path, handle: Any) -> Iterator[Any]:
    """Items of a JSON array whose opening bracket has been read, without holding all of it."""
    decoder, text, number = json.JSONDecoder(), "", 0
    while True:
        text = text.lstrip(" \t\r\n,")
        if text.startswith("]"):
            return
        try:
            item, end = decoder.raw_decode(text)
        except json.JSONDecodeError as error:
            more = handle.read(max(_CHARACTERS_AT_ONCE, len(text)))  # twice as much each time
            if not more:
                raise ValueError(f"{path}, item {number + 1}: not JSON ({error}); copy the file again") from error
            text += more
            continue
        number, text = number + 1, text[end:]
        yield item


def _csv_texts(path: Path, handle: Any, delimiter: str, tokenizer: Any) -> Iterator[str]:
    rows = csv.DictReader(handle, delimiter=delimiter)
    usual = csv.field_size_limit(_LONGEST_FIELD)
    try:
        if not set(COLUMNS) & set(rows.fieldnames or ()):
            raise ValueError(f"{path}: {missing_column(rows.fieldnames or ())}")
        for row in rows:
            yield row_text(row, f"{path}, line {rows.line_num}", tokenizer)
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(usual)


def _parquet_texts(path: Path, tokenizer: Any) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_CHARACTERS_AT_ONCE) as file:
            names = file.schema_arrow.names
            column = next((name for name in COLUMNS if name in names), None)
            if column is None:
                raise ValueError(f"{path}: {missing_column(names)}")
            number = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield row_text({column: value}, f"{path}, row {number}", tokenizer)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error
