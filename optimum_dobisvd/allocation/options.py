"""The sizes one matrix can take."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch

from ..encodings.registry import beside
from ..model.target import Target
from ..structures.format import AS_IS, Format
from .plan import PlannedModule, bytes_as


class Options(Protocol):
    """The sizes one matrix can take, smallest first, by number."""

    def __len__(self) -> int: ...

    def bytes_at(self, option: int) -> int: ...

    def module_at(self, option: int) -> PlannedModule: ...


@dataclass(frozen=True)
class SizeOptions:
    """Ranks in one format, smallest first, and then the matrix not factorized, in ever more bits.

    Attributes:
        target: the matrix.
        format: of its factors.
        ranks: those it can have; empty where factors are no use.
        dense: formats of the matrix that is not factorized; the last leaves it as it is.
    """

    target: Target
    format: Format
    ranks: range
    dense: tuple[Format, ...]

    def __len__(self) -> int:
        return len(self.ranks) + len(self.dense)

    def module_at(self, option: int) -> PlannedModule:
        """Return what the matrix becomes."""
        format, rank = self._at(option)
        return PlannedModule(*format.key, rank=rank)

    def bytes_at(self, option: int) -> int:
        """Return the bytes on disk; they do not fall from one option to the next."""
        format, rank = self._at(option)
        return bytes_as(self.target, format, rank)

    def sizes(self) -> tuple[int, ...]:
        """Return the bytes on disk of every option."""
        target = self.target
        shape = (target.out_features, target.in_features)
        ranked = _ranked_sizes(self.format, *shape, target.element_size, self.ranks)
        return (*ranked, *(bytes_as(target, format, None) for format in self.dense))

    def option_within(self, size: int | Fraction) -> int:
        """Return the highest option of at most that many bytes; −1 where even the first has more."""
        return bisect.bisect_right(range(len(self)), size, key=self.bytes_at) - 1

    def _at(self, option: int) -> tuple[Format, int | None]:
        if option < len(self.ranks):
            return self.format, self.ranks[option]
        return self.dense[option - len(self.ranks)], None


@dataclass(frozen=True)
class ParetoFront:
    """Sizes of one matrix, in any format, of which none is both larger and worse than another.

    Attributes:
        sizes, losses: of every one: bytes, rising, and what is lost, falling.
        sources: whose option each is, and which.
    """

    sizes: tuple[int, ...]
    losses: tuple[float, ...]
    sources: tuple[tuple[SizeOptions, int], ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def bytes_at(self, option: int) -> int:
        """Return the bytes on disk."""
        return self.sizes[option]

    def module_at(self, option: int) -> PlannedModule:
        """Return what the matrix becomes."""
        options, number = self.sources[option]
        return options.module_at(number)


def pareto_front(choices: Sequence[tuple[SizeOptions, Sequence[float]]]) -> ParetoFront:
    """Return the front of the sizes that a matrix can take, each with what is lost at every one of its options."""
    sizes = torch.tensor([size for options, _ in choices for size in options.sizes()])
    losses = torch.tensor([loss for _, lost in choices for loss in lost], dtype=torch.float64)
    order = losses.argsort(stable=True)
    order = order[sizes[order].argsort(stable=True)]
    least = losses[order].cummin(0).values
    # A larger one must lose less, but for the matrix as it is, which nothing is put in the place of.
    as_is = order == len(choices[0][0]) - 1
    better = torch.cat([torch.ones(1, dtype=torch.bool), least[1:] < least[:-1]])
    kept = order[better | (as_is & (losses[order] <= least))]
    sources = [(options, number) for options, _ in choices for number in range(len(options))]
    return ParetoFront(
        tuple(sizes[kept].tolist()), tuple(losses[kept].tolist()), tuple(sources[place] for place in kept.tolist())
    )


@functools.lru_cache(256)  # most matrices of a model have one of a few shapes
def _ranked_sizes(
    format: Format, out_features: int, in_features: int, element_size: int, ranks: range
) -> tuple[int, ...]:
    return tuple(format.bytes(out_features, in_features, rank, element_size) for rank in ranks)


def size_options(target: Target, format: Format, rank_multiple: int | None, min_rank: int) -> SizeOptions:
    """Return the sizes of a matrix in a format.

    Args:
        target: the matrix.
        format: of its factors; what it may be without goes with the encoding.
        rank_multiple: ranks are multiples of it. None: what the encoding's kernels like.
        min_rank: no rank is smaller.

    Raises:
        ValueError: the encoding cannot take such multiples.
    """
    dense = dense_formats(target, format)
    multiple = allowed_multiple(format, rank_multiple)
    lowest = -(-min_rank // multiple) * multiple
    largest = 0
    shape = (target.out_features, target.in_features)
    if format.structure.has_rank and format.unsupported_reason(*shape) is None:
        largest = format.largest_rank_below(bytes_as(target, dense[0], None), *shape, target.element_size)
    return SizeOptions(target, format, range(lowest, largest + 1, multiple), dense)


def dense_formats(target: Target, format: Format) -> tuple[Format, ...]:
    """Return what a matrix may be stored as that is not factorized, smallest first; the last leaves it as it is."""
    named = [beside(format.encoding, name) for name in format.encoding.dense_encodings]
    fitting = [
        Format(AS_IS.structure, encoding)
        for encoding in named
        if encoding.unsupported_reason(target.out_features, target.in_features) is None
    ]
    smaller = [each for each in fitting if bytes_as(target, each, None) < target.dense_bytes]
    return (*sorted(smaller, key=lambda each: bytes_as(target, each, None)), AS_IS)


def allowed_multiple(format: Format, wanted: int | None) -> int:
    """Return what ranks are multiples of. ValueError for multiples that the encoding cannot take."""
    if wanted is None:
        return format.encoding.rank_multiple
    needed = format.encoding.required_rank_multiple
    if type(wanted) is int and wanted % needed:
        raise ValueError(
            f"rank_multiple is {wanted}, and {format.encoding.name} takes ranks in multiples of {needed} only; leave "
            f"rank_multiple out, or make it a multiple of {needed}"
        )
    return wanted
