"""From calibration text to windows of token ids (how they are drawn: `draw`)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .draw import draw
from .rows import COLUMNS
from .text import HUB_TEXTS, Text, first_rows, open_text, read_text, text_of_list, text_of_rows
from .tokenizer import TokenizerSource, text_tokenizer, tokenizer_identity

__all__ = ["CalibrationWindows", "load_windows", "read_text", "tokenizer_identity"]

# A token of English is four to five characters, so this much streamed text is about twice what the windows need.
_STREAMED_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True, eq=False)
class CalibrationWindows:
    """Token windows to run through a model, and a record of where they come from.

    Attributes:
        input_ids: `N x seqlen`, int64, on the CPU.
        attention_mask: `N x seqlen`, bool; False marks padding, which is kept out of the statistics.
        description: JSON values without absolute paths, for fingerprints and reports. Its keys: `kind` ("dataset",
            "file", "texts" or "tokens"), `dataset` (its name, the file's base name, or the kind), `sha256` (of the
            text in UTF-8; for tokens, of the windows), `nsamples` (windows taken), `windows_available`, `seqlen`,
            `seed` (None for tokens, which are not drawn) and `tokenizer` (`tokenizer_identity`, or None).
    """

    input_ids: Tensor
    attention_mask: Tensor
    description: dict[str, Any]

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `(input_ids, attention_mask)` of `batch_size` windows in order; the last batch may be smaller.

        ValueError if `batch_size` is not a positive integer.
        """
        _require_positive("batch_size", batch_size)
        for start in range(0, len(self.input_ids), batch_size):
            yield self.input_ids[start : start + batch_size], self.attention_mask[start : start + batch_size]

    def first(self, count: int | None) -> CalibrationWindows:
        """Return the first `count` windows; all of them if there are no more, or for None."""
        return self._cut(slice(count))

    def shortened(self, seqlen: int | None) -> CalibrationWindows:
        """Return the first `seqlen` tokens of every window; the windows as they are for None."""
        ids, mask = self.input_ids[:, :seqlen], self.attention_mask[:, :seqlen]
        return CalibrationWindows(ids, mask, {**self.description, "seqlen": ids.shape[1]})

    def split(self, held_out: int) -> tuple[CalibrationWindows, CalibrationWindows]:
        """Return all but the last `held_out` windows, and these. ValueError if nothing is left before them."""
        count = len(self.input_ids) - held_out
        if count < 1:
            raise ValueError(
                f"there are {len(self.input_ids)} windows of calibration text, and {held_out} of them are held out to "
                "evaluate learned ranks: give more, or lower held_out in training"
            )
        return self.first(count), self._cut(slice(count, None))

    def _cut(self, part: slice) -> CalibrationWindows:
        ids = self.input_ids[part]
        return CalibrationWindows(ids, self.attention_mask[part], {**self.description, "nsamples": len(ids)})

    def sha256(self) -> str:
        """Return a hexadecimal digest of the shape, the ids and the mask."""
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        for tensor in (self.input_ids, self.attention_mask):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_windows(
    dataset: Any, tokenizer: Any, *, nsamples: int = 128, seqlen: int = 2048, seed: int = 0, held_out: int = 0
) -> CalibrationWindows:
    """Draw calibration windows.

    Args:
        dataset: what to draw from, one of
            - a name: "wikitext2", "c4" or "ptb" (train split, from the hub);
            - a path to a .txt, .jsonl, .json (objects, one a line or in an array), .csv, .tsv or .parquet file, .gz
              of all but the last, or to a folder of such files;
            - a list of strings, of rows or of paths (`Path`), joined by blank lines;
            - a `datasets.Dataset`, or an `IterableDataset`, of which as many rows are read as are needed;
            (rows have a column `text`, or `messages`: chats, which the tokenizer's template writes out)
            - tokens: an integer tensor `N x seqlen`, a list of 1-D or 2-D ones, or what a tokenizer returns (a mapping
              with `input_ids` and perhaps `attention_mask`, or a list of them). They are taken as given and in order:
              the first `nsamples` rows, or all if there are fewer; `seqlen` and `seed` have no effect, and shorter
              rows are padded on the right to the longest. A Dataset with a column `input_ids` is tokens, too.
        tokenizer: a tokenizer, a processor that has one, the name or path of one, or where one lies; None if `dataset`
            is tokens.
        nsamples, seqlen, seed: how many windows to take, tokens in each, and the seed of the draw.
        held_out: how many more windows to take; `split` separates them from the others.

    Raises:
        ValueError: nothing to draw from, too little text, an unknown name or suffix, a malformed file, a row of
            padding only, negative ids, or `nsamples` or `seqlen` below 1.
        TypeError: a dataset or tokenizer of an unusable type, ids that are no integers, text without a tokenizer.
        FileNotFoundError: the path leads to no file.
        ConnectionError: a named dataset could not be loaded from the hub.
    """
    _require_positive("nsamples", nsamples)
    _require_positive("seqlen", seqlen)
    if isinstance(dataset, (list, tuple)) and len(dataset) == 0:
        raise ValueError("the calibration dataset is an empty list: pass texts, or token ids")

    text = _text_of(dataset, nsamples * seqlen * _STREAMED_CHARACTERS_PER_TOKEN)
    if text is None:
        return _windows_from_tokens(_as_tokens(dataset, nsamples + held_out), tokenizer, nsamples + held_out)
    tokenizer = text_tokenizer(tokenizer)  # before a long download
    opened = text(tokenizer)
    drawn = draw(opened, tokenizer, (nsamples, held_out), seqlen, seed)
    return CalibrationWindows(
        input_ids=drawn.input_ids,
        attention_mask=torch.ones_like(drawn.input_ids, dtype=torch.bool),
        description={
            "kind": opened.kind,
            "dataset": opened.name,
            "sha256": drawn.sha256,
            "nsamples": len(drawn.input_ids),
            "windows_available": drawn.available,
            "seqlen": seqlen,
            "seed": seed,
            "tokenizer": tokenizer_identity(tokenizer),
        },
    )


def _text_of(dataset: Any, streamed_characters: int) -> Callable[[Any], Text] | None:
    """Return what opens the text with a tokenizer; None where the dataset is token ids."""
    if isinstance(dataset, (str, os.PathLike)):
        return lambda tokenizer: open_text(dataset, streamed_characters=streamed_characters, tokenizer=tokenizer)
    if hasattr(dataset, "column_names"):  # of the library `datasets`
        if isinstance(dataset, Mapping):
            raise ValueError(
                f"the {type(dataset).__name__} has the splits {', '.join(map(str, dataset))}: pass one of them, "
                f"dataset[{next(iter(dataset), 'train')!r}]"
            )
        names = dataset.column_names or list(first_rows(dataset, 1)[0])
        if not set(COLUMNS) & set(names) and "input_ids" in names:
            return None
        return lambda tokenizer: text_of_rows(dataset, tokenizer, streamed_characters)
    if isinstance(dataset, (list, tuple)) and all(_holds_text(part) for part in dataset):
        return lambda tokenizer: text_of_list(dataset, tokenizer)
    return None


def _holds_text(part: Any) -> bool:
    is_row = isinstance(part, Mapping) and "input_ids" not in part and any(column in part for column in COLUMNS)
    return part is None or is_row or isinstance(part, (str, os.PathLike))


def _as_tokens(dataset: Any, count: int) -> Any:
    """Return token ids as `_token_rows` takes them: of a `datasets.Dataset` the first `count` rows."""
    if not hasattr(dataset, "column_names"):
        return dataset
    keys = ("input_ids", "attention_mask")
    return [{key: row[key] for key in keys if key in row} for row in first_rows(dataset, count)]


def _windows_from_tokens(dataset: Any, tokenizer: Any, nsamples: int) -> CalibrationWindows:
    """Take the first `nsamples` rows as they are, padded on the right to the longest."""
    by_name = isinstance(tokenizer, (str, os.PathLike, TokenizerSource))  # not worth loading: nothing is tokenized
    rows = _token_rows(dataset)
    taken = rows[:nsamples]
    for index, (ids, mask) in enumerate(taken):
        if not mask.any():
            raise ValueError(f"row {index} of the calibration tokens is padding only: drop it, or mend its mask")
        if ids.min() < 0:
            raise ValueError(f"row {index} of the calibration tokens holds a negative id ({int(ids.min())})")
    input_ids, attention_mask = (pad_sequence(list(each), batch_first=True) for each in zip(*taken, strict=True))
    return CalibrationWindows(
        input_ids=input_ids,
        attention_mask=attention_mask,
        description={
            "kind": "tokens",
            "dataset": "tokens",
            "sha256": CalibrationWindows(input_ids, attention_mask, {}).sha256(),
            "nsamples": len(taken),
            "windows_available": len(rows),
            "seqlen": input_ids.shape[1],
            "seed": None,
            "tokenizer": None if tokenizer is None or by_name else tokenizer_identity(text_tokenizer(tokenizer)),
        },
    )


def _token_rows(dataset: Any) -> list[tuple[Tensor, Tensor]]:
    """Return `(ids, mask)` of every row, both 1-D on the CPU, from any of the accepted kinds of tokens."""
    if isinstance(dataset, Mapping):
        if "input_ids" not in dataset:
            raise ValueError(f"calibration tokens need the key 'input_ids'; found: {', '.join(map(str, dataset))}")
        ids = _flatten(dataset["input_ids"], "input_ids")
        mask = dataset.get("attention_mask")
        masks = [torch.ones_like(row) for row in ids] if mask is None else _flatten(mask, "attention_mask")
        if [len(row) for row in ids] != [len(row) for row in masks]:
            raise ValueError("attention_mask and input_ids of the calibration tokens differ in shape")
        return [(row, mask_row.bool()) for row, mask_row in zip(ids, masks, strict=True)]
    if isinstance(dataset, (list, tuple)) and any(isinstance(part, Mapping) for part in dataset):
        if not all(isinstance(part, Mapping) for part in dataset):
            raise TypeError("the calibration dataset mixes mappings with other things: pass one kind")
        return [row for part in dataset for row in _token_rows(part)]
    if isinstance(dataset, (list, tuple, Tensor)):
        return [(row, torch.ones_like(row, dtype=torch.bool)) for row in _flatten(dataset, "input_ids")]
    raise TypeError(
        f"cannot calibrate on a {type(dataset).__name__}: pass a dataset name ({', '.join(HUB_TEXTS)}), a path, "
        "a list of strings, or token ids"
    )


def _flatten(value: Any, what: str) -> list[Tensor]:
    """Return the 1-D integer rows of a tensor, an array, or nested lists of them."""
    if isinstance(value, (list, tuple)) and value and not all(isinstance(part, int) for part in value):
        return [row for part in value for row in _flatten(part, what)]
    try:
        tensor = torch.as_tensor(value).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} must be integers, got a {type(value).__name__} among them") from error
    if tensor.numel() == 0:
        raise ValueError(f"{what} of the calibration dataset is empty, or has an empty row: drop it")
    is_mask = what == "attention_mask"
    if tensor.is_floating_point() or tensor.is_complex() or (tensor.dtype == torch.bool and not is_mask):
        raise TypeError(f"{what} must be integers, got {tensor.dtype}: pass them with dtype torch.long")
    if tensor.dim() not in (1, 2):
        raise ValueError(f"{what} must be [seqlen] or [N, seqlen], got the shape {tuple(tensor.shape)}")
    return list(tensor.long()) if tensor.dim() == 2 else [tensor.long()]


def _require_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
