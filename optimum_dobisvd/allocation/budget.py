"""A byte budget turned into whole ranks, exactly: what every allocator shares.

An allocator decides how many bytes it wishes each matrix to have. `open_budget` says how many bytes there are and
which sizes each matrix can take; `spend` rounds the wishes to such sizes, never above the budget, and spends the
remainder until no further step fits. Sizes are integers or fractions throughout: nothing is lost before the ranks.
"""

import bisect
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol

from ..storage.costs import DENSE, DenseStorage, Storage, dense_levels, dense_storage_named, storage_named
from .patterns import Override, is_keep_ratio, near_names
from .plan import PlannedModule, check_rank, planned_bytes
from .target import Target, targets_by_name


@dataclass(frozen=True)
class Ladder:
    """The sizes one matrix can take, smallest first: levels 0, 1, ... are ranks, the last ones are the whole matrix.

    Attributes:
        target: the matrix.
        storage: how its factors are stored.
        lowest_rank: rank of level 0.
        rank_step: ranks from one level to the next.
        dense_level: number of low-rank levels, hence the first level of the whole matrix; 0 where no low rank is
            possible.
        dense_forms: how the whole matrix may be stored, smallest first; the last level is the last of them.
    """

    target: Target
    storage: Storage
    lowest_rank: int
    rank_step: int
    dense_level: int
    dense_forms: tuple[DenseStorage, ...]

    @property
    def top_level(self) -> int:
        """The last level: the matrix as it is."""
        return self.dense_level + len(self.dense_forms) - 1

    @property
    def largest_rank(self) -> int:
        """The largest rank whose factors are smaller than the dense matrix."""
        return self.lowest_rank + (self.dense_level - 1) * self.rank_step

    def module_at(self, level: int) -> PlannedModule:
        """What the matrix becomes at a level."""
        if level >= self.dense_level:
            return PlannedModule(rank=None, storage=self.dense_forms[level - self.dense_level].name)
        return PlannedModule(rank=self.lowest_rank + level * self.rank_step, storage=self.storage.name)

    def bytes_at(self, level: int) -> int:
        """Bytes on disk at a level; does not fall as the level grows."""
        m, n, element_size = self.target.out_features, self.target.in_features, self.target.element_size
        if level >= self.dense_level:
            return self.dense_forms[level - self.dense_level].bytes_of(m, n, element_size)
        return self.storage.bytes_at(m, n, self.lowest_rank + level * self.rank_step, element_size)

    def level_within(self, size: int | Fraction) -> int:
        """The highest level of at most that many bytes; −1 where even level 0 has more."""
        return bisect.bisect_right(range(self.top_level + 1), size, key=self.bytes_at) - 1


@dataclass(frozen=True)
class Budget:
    """How many bytes there are, and for what.

    Attributes:
        names: every target, in the order given.
        settled: the matrices with nothing to decide: the overridden ones, and those too small for any allowed rank
            (left dense, and paid for).
        ladders: the sizes that the other matrices can take.
        free_bytes: bytes for `ladders` together: the budget less what is settled.
        alternatives: the sizes that these matrices can take in other storages, where an allocator may choose them.
    """

    names: tuple[str, ...]
    settled: dict[str, PlannedModule]
    ladders: dict[str, Ladder]
    free_bytes: int
    alternatives: dict[str, tuple[Ladder, ...]] = field(default_factory=dict)


def byte_budget(targets: Sequence[Target], ratio: float) -> int:
    """⌊ratio × dense bytes of all targets⌋, the ratio taken as the decimal number a person wrote (0.7 is 7/10)."""
    return math.floor(_exact(ratio) * sum(target.dense_bytes for target in targets))


def open_budget(
    targets: Sequence[Target],
    ratio: float | None,
    *,
    storage: str,
    size: int | None = None,
    alternatives: Sequence[str] = (),
    dense_storage: str | None = None,
    overrides: Mapping[str, Override] | None = None,
    rank_multiple: int | None = None,
    min_rank: int = 1,
) -> Budget:
    """Sets aside what the overrides take and says what is left for the other matrices.

    Ranks are multiples of `rank_multiple` and at least `min_rank` rounded up to one. A matrix whose largest useful
    rank lies below that is left dense. A rank override is taken as it is; a ratio override gets the largest allowed
    rank within that fraction of its own dense bytes.

    Args:
        targets: the matrices, names distinct.
        ratio: fraction of the dense bytes of all targets to keep, in (0, 1]; None where `size` is given.
        storage: name of a storage for the factors.
        size: bytes for all targets together.
        alternatives: other storages that allocators may choose for a matrix which know what each costs the loss.
        dense_storage: how matrices may be stored that are not factorized: `dense` (as they are), or `dense_int8`, and
            as they are where the budget is enough. None: what goes with the storage.
        overrides: `{target name: Override}`, as `resolve_overrides` returns it.
        rank_multiple: at least 1. None: what the kernels of the storage like.
        min_rank: at least 1.

    Raises:
        ValueError: a bad argument; a `rank_multiple` that the storage cannot take; an override for an unknown matrix,
            or one that cannot be honored; or a budget too small for the overrides and the minimum ranks (the message
            gives the smallest reachable one).
    """
    known = targets_by_name(targets)
    overrides = overrides or {}
    if (ratio is None) == (size is None):
        raise ValueError("give either a ratio or a size for the matrices to compress")
    form = storage_named(storage)
    _check_options(known, ratio, overrides, rank_multiple=_multiple(form, rank_multiple), min_rank=min_rank)
    ladders = {name: _ladder(target, form, dense_storage, rank_multiple, min_rank) for name, target in known.items()}
    settled = {name: _settle(ladders[name], override) for name, override in overrides.items()}
    for name, ladder in ladders.items():
        if ladder.top_level == 0:
            settled.setdefault(name, ladder.module_at(0))
    free = {name: ladder for name, ladder in ladders.items() if name not in settled}

    budget = byte_budget(targets, ratio) if ratio is not None else size or 0
    settled_bytes = sum(planned_bytes(known[name], module) for name, module in settled.items())
    others = {name: _others(ladder, alternatives, rank_multiple, min_rank) for name, ladder in free.items()}
    smallest = sum(min(each.bytes_at(0) for each in (free[name], *others[name])) for name in free)
    if settled_bytes + smallest > budget:
        dense = sum(target.dense_bytes for target in targets)
        raise ValueError(
            f"{_asked(ratio, budget)} of {dense} bytes, but overrides and matrices too small to factorize take "
            f"{settled_bytes} and the other {len(free)} need {smallest} at their lowest ranks; raise "
            f"{_reachable(ratio, settled_bytes + smallest, dense)}, the smallest reachable, or lower "
            f"{'' if form.form else 'rank_multiple, '}min_rank or what the overrides ask"
        )
    return Budget(tuple(known), settled, free, budget - settled_bytes, {k: v for k, v in others.items() if v})


def _asked(ratio: float | None, budget: int) -> str:
    return f"the size asked for leaves {budget}" if ratio is None else f"ratio {ratio} keeps {budget}"


def _reachable(ratio: float | None, needed: int, dense: int) -> str:
    if ratio is None:
        return f"it to leave {needed} for them"
    # Rounded up, so that the ratio printed is one that works.
    return f"ratio to {math.ceil(Fraction(needed, dense) * 10**6) / 10**6}"


def _others(
    ladder: Ladder, alternatives: Sequence[str], rank_multiple: int | None, min_rank: int
) -> tuple[Ladder, ...]:
    forms = [storage_named(name) for name in alternatives]
    return tuple(_ladder(ladder.target, form, None, rank_multiple, min_rank) for form in forms)


def proportional_shares(
    weights: Sequence[int | Fraction],
    lower: Sequence[int | Fraction],
    upper: Sequence[int | Fraction],
    total: int | Fraction,
) -> list[int | Fraction]:
    """Shares of `total` proportional to `weights`, clipped to [lower, upper]; what clipping frees goes to the rest.

    That is `clip(c·weight, lower, upper)` with the one `c` for which the shares sum to `total`, exactly. Where `total`
    is not below Σ upper, the shares are `upper`.

    Args:
        weights: above 0.
        lower, upper: `0 <= lower <= upper`, one each per weight.
        total: at least Σ lower.
    """
    if total >= sum(upper):
        return list(upper)
    rows = list(zip(weights, lower, upper, strict=True))

    def shares(scale: int | Fraction) -> list[int | Fraction]:
        return [min(max(scale * weight, low), high) for weight, low, high in rows]

    # The sum grows with the scale, linearly between the scales at which a share meets one of its bounds.
    knees = sorted({Fraction(bound) / weight for weight, low, high in rows for bound in (low, high)})
    knee = knees[bisect.bisect_right(knees, total, key=lambda scale: sum(shares(scale))) - 1]
    growth = sum(weight for weight, low, high in rows if low <= knee * weight < high)
    return shares(knee + (total - sum(shares(knee))) / Fraction(growth))


def spend(budget: Budget, wishes: Mapping[str, int | Fraction]) -> dict[str, PlannedModule]:
    """Turns wished bytes into ranks whose bytes are at most the budget and leave no room for any further step.

    The wishes are scaled to use the budget up (see `proportional_shares`) and rounded down to a level each; the
    remainder goes to whichever matrix is furthest below its wish, relative to it, one level at a time.

    Args:
        budget: what `open_budget` returned.
        wishes: bytes above 0 for every name in `budget.ladders`; only their proportions matter, up to clipping.

    Returns:
        A planned module for every target, settled ones included, in the targets' order.
    """
    ladders = budget.ladders
    shares = proportional_shares(
        [wishes[name] for name in ladders],
        [ladder.bytes_at(0) for ladder in ladders.values()],
        [ladder.bytes_at(ladder.top_level) for ladder in ladders.values()],
        budget.free_bytes,
    )
    wished = dict(zip(ladders, shares, strict=True))
    levels = {name: ladder.level_within(wished[name]) for name, ladder in ladders.items()}
    top_up(
        ladders,
        budget.free_bytes,
        levels,
        lambda name, level: float(1 - ladders[name].bytes_at(level) / Fraction(wished[name])),
    )
    planned = budget.settled | {name: ladder.module_at(levels[name]) for name, ladder in ladders.items()}
    return {name: planned[name] for name in budget.names}


class Sizes(Protocol):
    """The sizes that one matrix can take, smallest first."""

    @property
    def top_level(self) -> int: ...

    def bytes_at(self, level: int) -> int: ...


def top_up(
    ladders: Mapping[str, Sizes], free_bytes: int, levels: dict[str, int], priority: Callable[[str, int], float]
) -> None:
    """Raises `levels` in place, one level at a time, until no matrix's next level fits into the bytes there are.

    Args:
        ladders: the sizes of every matrix.
        free_bytes: for all of them.
        levels: a level for every matrix, together within `free_bytes`.
        priority: `(name, present level) -> number`; the highest goes first, on a tie the earlier name.
    """
    left = free_bytes - sum(ladder.bytes_at(levels[name]) for name, ladder in ladders.items())
    queue = [(-priority(name, levels[name]), order, name) for order, name in enumerate(ladders)]
    heapq.heapify(queue)
    while queue:
        _, order, name = heapq.heappop(queue)
        ladder, level = ladders[name], levels[name]
        if level == ladder.top_level:
            continue
        cost = ladder.bytes_at(level + 1) - ladder.bytes_at(level)
        # What is left only shrinks, so a step that does not fit now never will: the matrix leaves the queue.
        if cost <= left:
            left -= cost
            levels[name] = level + 1
            heapq.heappush(queue, (-priority(name, level + 1), order, name))


def _exact(ratio: float) -> Fraction:
    return Fraction(repr(ratio))


def _multiple(storage: Storage, wanted: int | None) -> int:
    """What ranks are multiples of. ValueError for one that the storage cannot take."""
    if wanted is None:
        return storage.rank_multiple
    needed = 1 if storage.form is None else storage.form.rank_multiple
    if type(wanted) is int and wanted % needed:
        raise ValueError(
            f"rank_multiple is {wanted}, and {storage.name} takes ranks in multiples of {needed} only; leave "
            f"rank_multiple out, or make it a multiple of {needed}"
        )
    return wanted


def _check_options(
    known: Mapping[str, Target], ratio: float | None, overrides: Mapping[str, Override], **ranks: int
) -> None:
    if ratio is not None and not is_keep_ratio(ratio):
        raise ValueError(f"ratio is {ratio!r}; it is the fraction of the bytes kept, above 0 and at most 1")
    for option, value in ranks.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{option} is {value!r}; it must be a whole number of at least 1")
    for name in overrides:
        if name not in known:
            raise ValueError(
                f"there is an override for {name!r}, which is not a matrix to compress; {near_names(name, known)}; "
                "correct or remove it"
            )


def _ladder(
    target: Target, storage: Storage, dense_storage: str | None, rank_multiple: int | None, min_rank: int
) -> Ladder:
    m, n, element_size = target.out_features, target.in_features, target.element_size
    multiple = _multiple(storage, rank_multiple)
    lowest = -(-min_rank // multiple) * multiple
    whole = dense_storage_named(storage.dense_storage if dense_storage is None else dense_storage)
    forms = dense_levels(whole.name, m, n, element_size)
    count = 0
    if storage.obstacle(m, n) is None:
        largest = storage.largest_rank_below(forms[0].bytes_of(m, n, element_size), m, n, element_size)
        count = max(0, (largest - lowest) // multiple + 1)
    return Ladder(target, storage, lowest, multiple, dense_level=count, dense_forms=forms)


def _settle(ladder: Ladder, override: Override) -> PlannedModule:
    target = ladder.target
    if override.dense:
        return PlannedModule(rank=None, storage=DENSE)
    if override.rank is not None:
        check_rank(target, override.rank, ladder.storage.name)
        return PlannedModule(rank=override.rank, storage=ladder.storage.name)
    level = ladder.level_within(math.floor(_exact(override.ratio or 0) * target.dense_bytes))
    if level < 0:
        raise ValueError(
            f"{target.name}: the override's ratio {override.ratio} of {target.dense_bytes} bytes is below the "
            f"{ladder.bytes_at(0)} bytes of the smallest size allowed for this matrix; raise that ratio, lower "
            "rank_multiple or min_rank, or override it with a rank or with dense: true"
        )
    return ladder.module_at(level)
