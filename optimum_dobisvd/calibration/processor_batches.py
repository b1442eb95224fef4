"""Calibration on what a processor gives: batches of token ids with pixel values, audio features and the like."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .dataset import CalibrationWindows, load_windows
from .model_inputs import NO_LABEL, SampleIds


@dataclass(frozen=True, eq=False)
class ProcessorWindows(CalibrationWindows):
    """Rows of a processor's batches, each run by itself, since texts with images have lengths and sizes of their own.

    `input_ids` and `attention_mask` are those of all rows, padded on the right; what a model is given is in `samples`.
    """

    samples: tuple[Mapping[str, Tensor], ...] = ()

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ids and mask of every row, however many a batch may have."""
        for sample in self.samples:
            ids = SampleIds.of(sample)
            yield ids, _mask_of(sample, ids)

    def sha256(self) -> str:
        """Return a hexadecimal digest of all tensors."""
        return _digest(self.samples)

    def _cut(self, part: slice) -> CalibrationWindows:
        cut = super()._cut(part)
        return replace(self, **{**vars(cut), "samples": self.samples[part]})


def first_processor_batch(dataset: Any) -> Mapping[str, Tensor] | None:
    """Return the first row of a processor's batches; None if the dataset is none of such."""
    batches = _batches_in(dataset)
    return None if batches is None else next(_rows(batches[0], 0))


def draw_windows(dataset: Any, tokenizer: Any, *, held_out: int = 0, **draw: int) -> CalibrationWindows:
    """Return what `load_windows` does with these arguments, or the first rows of a processor's batches, in order.

    Raises:
        ValueError: as `load_windows`; a batch of several rows that cannot be taken apart.
    """
    batches = _batches_in(dataset)
    if batches is None:
        return load_windows(dataset, tokenizer, held_out=held_out, **draw)
    nsamples = draw["nsamples"] + held_out
    rows = [row for index, batch in enumerate(batches) for row in _rows(batch, index)]
    samples = tuple(rows[:nsamples])
    ids = [SampleIds.of(sample) for sample in samples]
    masks = [_mask_of(sample, row) for sample, row in zip(samples, ids, strict=True)]
    input_ids, mask = (
        pad_sequence([row[0].as_subclass(Tensor) for row in each], batch_first=True) for each in (ids, masks)
    )
    described = {
        "kind": "processor batches",
        "dataset": "processor batches",
        "sha256": _digest(samples),
        "nsamples": len(samples),
        "windows_available": len(rows),
        "seqlen": input_ids.shape[1],
        "seed": None,
        "tokenizer": None,
    }
    return ProcessorWindows(input_ids, mask, described, samples)


def _batches_in(dataset: Any) -> list[Mapping[str, Tensor]] | None:
    """Return the batches as tensors if some have values that are no token ids; None otherwise."""
    if isinstance(dataset, str | os.PathLike):
        return None
    given = [dataset] if isinstance(dataset, Mapping) else dataset
    if not isinstance(given, list | tuple) or not given or not all(isinstance(each, Mapping) for each in given):
        return None
    batches = [{key: torch.as_tensor(value) for key, value in each.items() if _is_numeric(value)} for each in given]
    if not any(value.is_floating_point() for batch in batches for value in batch.values()):
        return None
    return [{key: value.cpu() for key, value in batch.items()} for batch in batches]


def _is_numeric(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__array__")


def _rows(batch: Mapping[str, Tensor], index: int) -> Iterator[Mapping[str, Tensor]]:
    """Yield the rows of a batch. ValueError if they cannot be told apart."""
    count = len(batch["input_ids"]) if "input_ids" in batch else len(next(iter(batch.values())))
    if count == 1:
        yield _without_padding(batch)
        return
    uneven = next((key for key, value in batch.items() if len(value) != count), None)
    if uneven is not None:
        raise ValueError(
            f"batch {index} of the calibration dataset has {count} texts, and {uneven} of {len(batch[uneven])} rows, "
            "which cannot be told apart: call the processor for one text at a time"
        )
    for row in range(count):
        yield _without_padding({key: value[row : row + 1] for key, value in batch.items()})


def _without_padding(sample: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Cut off the end of labels that are none, where a decoder has them to itself."""
    labels = sample.get("labels")
    if labels is None or "input_ids" in sample or labels.dim() != 2:
        return sample
    count = int((labels[0] != NO_LABEL).nonzero().max()) + 1 if bool((labels != NO_LABEL).any()) else 0
    return {**sample, "labels": labels[:, :count]}


def _mask_of(sample: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    given = sample.get("attention_mask")
    fits = given is not None and given.shape == ids.shape
    return given.bool() if fits and given is not None else torch.ones(ids.shape, dtype=torch.bool)


def _digest(samples: tuple[Mapping[str, Tensor], ...]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for key in sorted(sample):
            value = sample[key].contiguous()
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
