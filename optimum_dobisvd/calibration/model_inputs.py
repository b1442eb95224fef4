"""What a model is given of a window or of a processor's batch, and which tokens its logits are to predict.

A causal language model reads the window and predicts each next token. The encoder of an encoder-decoder reads the
first half of it, and the decoder predicts the second (prefix language modeling, as T5 was adapted to it: arXiv
1910.10683, section 3.2.1). A batch of a processor is given as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..model.trial import is_encoder_decoder

NO_LABEL = -100
"""What transformers takes for a place without a label."""


class SampleIds(Tensor):
    """The token ids of one row of a processor's batch, `1 x tokens`, with all of its tensors as `inputs`.

    Whatever gives ids of the same shape, such as a slice of all rows or another device, keeps them.
    """

    inputs: Mapping[str, Tensor]

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor]) -> SampleIds:
        """Return the ids of a batch of one row: those it reads, or writes; one zero where it has none."""
        labels = inputs.get("labels")
        written = labels.clamp_min(0) if labels is not None and labels.dim() == 2 else torch.zeros(1, 1)
        ids = inputs.get("input_ids", written).long().as_subclass(cls)
        ids.inputs = inputs
        return ids

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        source = next((each for each in args if isinstance(each, cls)), None)
        for each in result if isinstance(result, tuple) else (result,):
            if isinstance(each, cls) and source is not None and each.shape == source.shape:
                each.inputs = source.inputs
        return result


def inputs_of(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the arguments of a forward pass over a batch; `ids`, `mask` (bool): `batch x seqlen`."""
    if isinstance(ids, SampleIds):
        given = {key: value for key, value in ids.inputs.items() if key != "labels"}
        labels = ids.inputs.get("labels")
        if is_encoder_decoder(model) and labels is not None and "decoder_input_ids" not in given:
            given["decoder_input_ids"] = _shifted(model, labels)
        return given
    half = _half(model, ids)
    read = mask[:, :half]
    # An all-ones mask says nothing, and without it attention can take its fast path.
    inputs = {"input_ids": ids[:, :half]} | ({} if bool(read.all()) else {"attention_mask": read.long()})
    return inputs | ({"decoder_input_ids": _shifted(model, ids[:, half:])} if is_encoder_decoder(model) else {})


def predicted_tokens(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels of a model's first logits, `batch x positions`, and which of them count."""
    if isinstance(ids, SampleIds):
        labels = ids.inputs.get("labels")
        if labels is None:
            shown = _stand_ins(model)
            wanted = mask & ~torch.isin(ids.as_subclass(Tensor), torch.tensor(shown)) if shown else mask
            return ids.as_subclass(Tensor)[:, 1:], (wanted[:, 1:] & mask[:, :-1])
        labels = labels if is_encoder_decoder(model) else labels[:, 1:]
        return labels.clamp_min(0), labels != NO_LABEL
    if is_encoder_decoder(model):
        half = _half(model, ids)
        return ids[:, half:], mask[:, half:]
    return next_tokens(ids, mask)


def own_labels(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the arguments of a forward pass with labels, from which a model makes the loss of the same tokens."""
    labels, wanted = predicted_tokens(model, ids, mask)
    labels = labels.masked_fill(~wanted, NO_LABEL)
    inputs = inputs_of(model, ids, mask)
    if is_encoder_decoder(model):
        inputs.pop("decoder_input_ids", None)  # made of the labels
        return {**inputs, "labels": labels.contiguous()}
    return {**inputs, "labels": torch.nn.functional.pad(labels, (1, 0), value=NO_LABEL)}


def next_tokens(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return every next token, `batch x (seqlen - 1)`, and whether it is text that follows on text."""
    return ids[:, 1:], mask[:, 1:] & mask[:, :-1]


def _half(model: Any, ids: Tensor) -> int:
    return ids.shape[1] // 2 if is_encoder_decoder(model) else ids.shape[1]


def _shifted(model: Any, labels: Tensor) -> Tensor:
    """Return what a decoder is given to predict these labels."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # a config that names no start
        if prepare is not None:
            return prepare(labels=labels)
    configs = (getattr(model, "generation_config", None), model.config)
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    starts = (getattr(config, name, None) for name in names for config in configs)
    start = torch.full_like(labels[:, :1], next((each for each in starts if each is not None), 0))
    return torch.cat([start, labels[:, :-1].clamp_min(0)], 1)


def _stand_ins(model: Any) -> list[int]:
    """Return the tokens in whose place another modality is put: nobody predicts these."""
    settings = model.config.to_dict() if hasattr(model, "config") else {}
    kinds = ("image", "video", "audio")
    return [
        value
        for key, value in settings.items()
        if key.startswith(kinds) and key.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    ]
