"""The draw of windows from a text: from all of it where it is short, from places all over it where it is long."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .text import Text, require_text
from .token_ids import token_ids

LONGEST_WHOLE = 32_000_000
"""Characters up to which a text is tokenized as a whole: the published draw."""
_CHARACTERS_PER_TOKEN = 16  # of a cell; four to five would do for English
_TO_A_WORD = 200  # characters in which a cell looks for the beginning of a word


@dataclass(frozen=True)
class Drawn:
    """Windows (`N x seqlen`) in the order of the draw, how many there were to draw from, the sha256 of the text."""

    input_ids: Tensor
    available: int
    sha256: str


def draw(text: Text, tokenizer: Any, counts: tuple[int, int], seqlen: int, seed: int) -> Drawn:
    """Draw windows to calibrate on and to hold out (`counts`).

    A text of up to 32 million characters is tokenized whole and cut into consecutive windows that do not overlap, and
    `torch.randperm` with a CPU generator seeded by `seed` orders them: the draw that papers use.

    A longer text is read twice and never held in memory. It is cut into cells of 16 characters for every token of a
    window; the same permutation orders the cells, and the first tokens of each are a window. Cells with too few tokens
    are passed over.

    Raises:
        ValueError: no text, or too little.
    """
    beginning, characters, sha256 = _read(text)
    cell, wanted = seqlen * _CHARACTERS_PER_TOKEN, sum(counts)
    if beginning is None and characters // cell >= 2 * wanted:
        found = _from_cells(text, tokenizer, characters // cell, wanted, (seqlen, seed))
        if found is not None:
            return Drawn(found, characters // cell, sha256)
    whole = "".join(text.pieces() if beginning is None else beginning)
    ids = token_ids(tokenizer, require_text(whole, text.where))
    available = len(ids) // seqlen
    if available < wanted:
        raise ValueError(_too_little(text.name, len(ids), counts, seqlen))
    windows = ids[: available * seqlen].view(available, seqlen)
    return Drawn(windows[_order(available, seed)[:wanted]], available, sha256)


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _read(text: Text) -> tuple[list[str] | None, int, str]:
    """Read a text once; returns its pieces, or None if it is long, how many characters it has, and its digest."""
    digest, characters = hashlib.sha256(), 0
    kept: list[str] | None = []
    for piece in text.pieces():
        digest.update(piece.encode())
        characters += len(piece)
        if kept is not None:
            kept.append(piece)
            if characters > LONGEST_WHOLE:
                kept = None
    return kept, characters, digest.hexdigest()


def _from_cells(text: Text, tokenizer: Any, cells: int, wanted: int, draw: tuple[int, int]) -> Tensor | None:
    """Windows of the first cells, by the permutation, that have enough tokens; None where there are too few such."""
    seqlen, seed = draw
    order = _order(cells, seed).tolist()
    found: dict[int, Tensor] = {}
    looked, size = 0, seqlen * _CHARACTERS_PER_TOKEN
    while len(found) < wanted and looked < len(order):
        # As many again as are missing, since cells that are too short are rare; each round reads the text once.
        asked = order[looked : looked + (wanted - len(found)) + wanted // 8 + 1]
        looked += len(asked)
        for cell, characters in _cells(text, asked, size):
            ids = tokenizer(_from_a_word(characters), add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= seqlen:
                found[cell] = torch.tensor(ids[:seqlen], dtype=torch.int64)
    chosen = [found[cell] for cell in order if cell in found][:wanted]
    return torch.stack(chosen) if len(chosen) == wanted else None


def _cells(text: Text, wanted: list[int], size: int) -> Iterator[tuple[int, str]]:
    """Yield the cells of these numbers with their characters, in the order of the text."""
    ahead = sorted(wanted, reverse=True)
    held, start = "", 0  # characters that are not passed yet, and where in the text they start
    for piece in text.pieces():
        held += piece
        while ahead and start + len(held) >= (ahead[-1] + 1) * size:
            begin = ahead[-1] * size - start
            yield ahead.pop(), held[begin : begin + size]
        if not ahead:
            return
        passed = min(max(ahead[-1] * size - start, 0), len(held))
        held, start = held[passed:], start + passed


def _from_a_word(characters: str) -> str:
    """Leave out the rest of a word at the beginning."""
    for at, character in enumerate(characters[:_TO_A_WORD]):
        if character.isspace():
            return characters[at + 1 :]
    return characters


def _too_little(name: str, tokens: int, counts: tuple[int, int], seqlen: int) -> str:
    (nsamples, held_out), available = counts, tokens // seqlen
    remedy = f"nsamples={available - held_out}, " if available > held_out else ""
    more = f" and {held_out} more to evaluate learned ranks on" if held_out else ""
    return (
        f"{name!r} has {tokens} tokens, which is {available} windows of seqlen={seqlen}, but nsamples={nsamples} were "
        f"asked for{more}: use {remedy}a shorter seqlen (up to {tokens // sum(counts)}), or a longer text"
    )
