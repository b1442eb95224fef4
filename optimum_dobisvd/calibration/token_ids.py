"""Token ids of a long text in little memory: the ids of tokenizing it at once, found piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_PIECE = 1 << 20  # characters; a tokenizer takes about 150 bytes for each
_OVERLAP = 1 << 13
_AGREEING = 32  # tokens on either side of a seam


def token_ids(tokenizer: Any, text: str, at_most: int | None = None) -> Tensor:
    """Return the ids of the whole text, int64, or the first `at_most` of them.

    A long text is tokenized in pieces that overlap. Two pieces are joined inside their overlap, where both have the
    same tokens at the same characters, 32 on either side; where they have none such, and for tokenizers that do not
    tell characters, the text is tokenized at once.
    """
    if len(text) > 2 * _PIECE and getattr(tokenizer, "is_fast", False):
        pieces = _in_pieces(tokenizer, text, at_most)
        if pieces is not None:
            return torch.cat(pieces)[:at_most]
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)[:at_most]


def _in_pieces(tokenizer: Any, text: str, at_most: int | None) -> list[Tensor] | None:
    """Ids in order, None where two pieces cannot be joined."""
    before, after = _special_ids(tokenizer)
    found, count = [before], len(before)
    held_ids, held_spans = torch.empty(0, dtype=torch.int64), torch.empty(0, 2, dtype=torch.int64)
    for start, ids, spans in _tokenized(tokenizer, text):
        if start:
            seam = _seam(held_ids, held_spans, ids, spans, start)
            if seam is None:
                return None
            found.append(held_ids[: seam[0]])
            count += len(found[-1])
            if at_most is not None and count >= at_most:
                return found
            ids, spans = ids[seam[1] :], spans[seam[1] :]
        held_ids, held_spans = ids, spans
    return [*found, held_ids, after]


def _tokenized(tokenizer: Any, text: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Pieces one after the other: where each starts, its ids, and their first and last characters in the text."""
    start = 0
    while True:
        end = start + _PIECE if start + 2 * _PIECE < len(text) else len(text)
        part = tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = torch.tensor(part["offset_mapping"], dtype=torch.int64).view(-1, 2) + start
        yield start, torch.tensor(part["input_ids"], dtype=torch.int64), spans
        if end == len(text):
            return
        start = end - _OVERLAP


def _seam(left: Tensor, left_spans: Tensor, right: Tensor, right_spans: Tensor, start: int) -> tuple[int, int] | None:
    """The token at which the right piece, which begins at the character `start`, goes on from the left one."""
    middle = start + _OVERLAP // 2
    at_left, at_right = (
        int(torch.searchsorted(spans[:, 0].contiguous(), middle)) for spans in (left_spans, right_spans)
    )
    near_left, near_right = (slice(max(at - _AGREEING, 0), at + _AGREEING) for at in (at_left, at_right))
    if min(at_left, at_right) < _AGREEING or at_left + _AGREEING > len(left):
        return None
    same = torch.equal(left[near_left], right[near_right])
    return (at_left, at_right) if same and torch.equal(left_spans[near_left], right_spans[near_right]) else None


def _special_ids(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """What a tokenizer puts before and after a text."""
    with_them, without = (
        tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"] for special in (True, False)
    )
    first = next((at for at in range(len(with_them)) if with_them[at : at + len(without)] == without), 0)
    ends = with_them[:first], with_them[first + len(without) :]
    before, after = (torch.tensor(end, dtype=torch.int64) for end in ends)
    return before, after
