"""From calibration text to windows of token ids.

The draw is the published one: the whole text is tokenized at once and cut into consecutive windows that do not
overlap; `torch.randperm` with a CPU generator seeded by `seed` orders them, and the first `nsamples` are taken.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .text import HUB_TEXTS, read_text, require_text

__all__ = ["CalibrationWindows", "load_windows", "read_text", "tokenizer_identity"]

# A token of English is four to five characters, so this much streamed text is about twice what the windows need.
_STREAMED_CHARACTERS_PER_TOKEN = 8
_IDENTITY_PROBE = "The 3 quick foxes' café\n\n\tdef f(x): return x**2  # 模型 🙂"


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
            - a path to a .txt, .jsonl, .json (one object a line) or .parquet file; .gz of the first three;
            - a list of strings, joined by blank lines;
            - tokens: an integer tensor `N x seqlen`, a list of 1-D or 2-D ones, or what a tokenizer returns (a mapping
              with `input_ids` and perhaps `attention_mask`, or a list of them). They are taken as given and in order:
              the first `nsamples` rows, or all if there are fewer; `seqlen` and `seed` have no effect, and shorter
              rows are padded on the right to the longest.
        tokenizer: a tokenizer, the name or path of one, or None if `dataset` is tokens.
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

    if isinstance(dataset, (str, os.PathLike)):
        tokenizer = _text_tokenizer(tokenizer)  # before a long download
        source = os.fspath(dataset)
        kind, name = ("dataset", source) if source in HUB_TEXTS else ("file", Path(source).name)
        text = read_text(source, streamed_characters=nsamples * seqlen * _STREAMED_CHARACTERS_PER_TOKEN)
    elif isinstance(dataset, (list, tuple)) and all(isinstance(part, str) for part in dataset):
        tokenizer = _text_tokenizer(tokenizer)
        kind = name = "texts"
        text = require_text("\n\n".join(dataset), "the list of texts")
    else:
        return _windows_from_tokens(dataset, tokenizer, nsamples + held_out)

    input_ids, available = _draw(text, name, tokenizer, (nsamples, held_out), seqlen, seed)
    return CalibrationWindows(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids, dtype=torch.bool),
        description={
            "kind": kind,
            "dataset": name,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "nsamples": len(input_ids),
            "windows_available": available,
            "seqlen": seqlen,
            "seed": seed,
            "tokenizer": tokenizer_identity(tokenizer),
        },
    )


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """Return class name, vocabulary size, and a sha256 that changes when the tokenization does, as JSON values.

    For a fast tokenizer the digest is over its serialized pipeline (vocabulary, merges, normalizer, special tokens);
    its padding and truncation are left out, because ordinary calls change them. For a Python tokenizer it is over the
    vocabulary and the ids of a short probe text. TypeError if it is no tokenizer.
    """
    if not callable(tokenizer) or not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"expected a transformers tokenizer, its name or its path, got {type(tokenizer).__name__}")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pipeline = json.loads(backend.to_str())
        content = {key: value for key, value in pipeline.items() if key not in ("padding", "truncation")}
    else:
        probed = tokenizer(_IDENTITY_PROBE, verbose=False)["input_ids"]
        content = {"vocab": tokenizer.get_vocab(), "probe": probed}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {"class": type(tokenizer).__name__, "vocab_size": len(tokenizer), "sha256": digest}


def _draw(text: str, name: str, tokenizer: Any, counts: tuple[int, int], seqlen: int, seed: int) -> tuple[Tensor, int]:
    """Draw windows to calibrate on and to hold out (`counts`); returns `input_ids`, and how many there were."""
    (nsamples, held_out), wanted = counts, sum(counts)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    available = len(ids) // seqlen
    if available < wanted:
        remedy = f"nsamples={available - held_out}, " if available > held_out else ""
        more = f" and {held_out} more to evaluate learned ranks on" if held_out else ""
        raise ValueError(
            f"{name!r} has {len(ids)} tokens, which is {available} windows of seqlen={seqlen}, but nsamples="
            f"{nsamples} were asked for{more}: use {remedy}a shorter seqlen (up to {len(ids) // wanted}), or a longer "
            "text"
        )
    windows = ids[: available * seqlen].view(available, seqlen)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return windows[order[:wanted]], available


def _windows_from_tokens(dataset: Any, tokenizer: Any, nsamples: int) -> CalibrationWindows:
    """Take the first `nsamples` rows as they are, padded on the right to the longest."""
    by_name = isinstance(tokenizer, (str, os.PathLike))  # not worth loading: nothing is tokenized
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
            "tokenizer": None if tokenizer is None or by_name else tokenizer_identity(tokenizer),
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


def _text_tokenizer(tokenizer: Any) -> Any:
    """Return the tokenizer, loaded if it is a name. Called for text only, since token ids need none."""
    if tokenizer is None:
        raise TypeError("calibrating on text needs a tokenizer: pass one, its name or its path, or pass token ids")
    if not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    from transformers import AutoTokenizer

    name = os.fspath(tokenizer)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"could not load the tokenizer {name!r}: pass a tokenizer, or its folder. {error}") from error


def _require_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
