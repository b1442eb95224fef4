"""A byte budget turned into whole ranks, exactly: what every allocator shares.

An allocator decides how many bytes it would give each matrix. `open_budget` says how many bytes there are and which
sizes each matrix can take; `spend` rounds the target bytes to such sizes, never above the budget, and spends the
remainder until no further step fits. Sizes are integers or fractions throughout: nothing is lost before the ranks.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from ..model.patterns import Override, is_keep_ratio, near_names
from ..model.target import Target, targets_by_name
from ..structures.format import AS_IS, Format
from .options import Options, SizeOptions, allowed_multiple, size_options
from .plan import PlannedModule, check_possible, planned_bytes


@dataclass(frozen=True)
class BudgetRequest:
    """What a person asked for.

    Attributes:
        format: of the factors.
        ratio: fraction of the dense bytes of all targets to keep, in (0, 1]; None where `size` is given.
        size: bytes for all targets together.
        alternatives: other formats that allocators may choose for a matrix which know what each costs the loss.
        overrides: `{target name: Override}`, as `resolve_overrides` returns it.
        rank_multiple: ranks are multiples of it, at least 1. None: what the kernels of the encoding like.
        min_rank: no rank is smaller, at least 1.
    """

    format: Format
    ratio: float | None = None
    size: int | None = None
    alternatives: tuple[Format, ...] = ()
    overrides: Mapping[str, Override] = field(default_factory=dict)
    rank_multiple: int | None = None
    min_rank: int = 1

    def options_of(self, target: Target, format: Format) -> SizeOptions:
        """Return the sizes that a matrix can take in a format."""
        return size_options(target, format, self.rank_multiple, self.min_rank)


@dataclass(frozen=True)
class Budget:
    """How many bytes there are, and for what.

    Attributes:
        names: every target, in the order given.
        fixed: the matrices with nothing to decide: the overridden ones, and those too small for any allowed rank
            (left as they are, and paid for).
        options: the sizes that the other matrices can take.
        free_bytes: bytes for `options` together: the budget less what is fixed.
        alternatives: the sizes that these matrices can take in other formats, where an allocator may choose them.
    """

    names: tuple[str, ...]
    fixed: dict[str, PlannedModule]
    options: dict[str, SizeOptions]
    free_bytes: int
    alternatives: dict[str, tuple[SizeOptions, ...]] = field(default_factory=dict)

    def all_options(self, name: str) -> tuple[SizeOptions, ...]:
        """Return the sizes of a matrix in every format that it may have."""
        return (self.options[name], *self.alternatives.get(name, ()))


def byte_budget(targets: Sequence[Target], ratio: float) -> int:
    """Return ⌊ratio × dense bytes of all targets⌋, the ratio taken as the decimal number that was written."""
    return math.floor(_exact(ratio) * sum(target.dense_bytes for target in targets))


def open_budget(targets: Sequence[Target], request: BudgetRequest) -> Budget:
    """Set aside what the overrides take and say what is left for the other matrices.

    Ranks are multiples of `rank_multiple` and at least `min_rank` rounded up to one. A matrix whose largest useful
    rank lies below that is left as it is. A rank override is taken as it is; a ratio override gets the largest allowed
    rank within that fraction of its own dense bytes.

    Args:
        targets: the matrices, names distinct.
        request: what was asked for.

    Raises:
        ValueError: a bad argument; a `rank_multiple` that the encoding cannot take; an override for an unknown matrix,
            or one that cannot be honored; or a budget too small for the overrides and the minimum ranks (the message
            gives the smallest reachable one).
    """
    known = targets_by_name(targets)
    _check_request(known, request)
    formats = (request.format, *request.alternatives)
    options = {name: [request.options_of(target, each) for each in formats] for name, target in known.items()}
    fixed = {name: _fixed_by(options[name], override) for name, override in request.overrides.items()}
    for name, found in options.items():
        if name not in fixed and all(len(each) == 1 for each in found):
            fixed[name] = found[0].module_at(0)
    free = {name: found for name, found in options.items() if name not in fixed}
    budget = Budget(
        tuple(known),
        fixed,
        {name: found[0] for name, found in free.items()},
        0,
        {name: tuple(found[1:]) for name, found in free.items()} if request.alternatives else {},
    )
    return replace(budget, free_bytes=_free_bytes(known, budget, request))


def _free_bytes(known: Mapping[str, Target], budget: Budget, request: BudgetRequest) -> int:
    """What is left of the bytes asked for; ValueError where that is too little."""
    targets = list(known.values())
    total = byte_budget(targets, request.ratio) if request.ratio is not None else request.size or 0
    fixed = sum(planned_bytes(known[name], module) for name, module in budget.fixed.items())
    smallest = sum(min(each.bytes_at(0) for each in budget.all_options(name)) for name in budget.options)
    if fixed + smallest > total:
        dense = sum(target.dense_bytes for target in targets)
        free_choice = request.format.encoding.required_rank_multiple == 1
        raise ValueError(
            f"{_asked(request.ratio, total)} of {dense} bytes, but overrides and matrices too small to factorize take "
            f"{fixed} and the other {len(budget.options)} need {smallest} at their lowest ranks; raise "
            f"{_reachable(request.ratio, fixed + smallest, dense)}, the smallest reachable, or lower "
            f"{'rank_multiple, ' if free_choice else ''}min_rank or what the overrides ask"
        )
    return total - fixed


def _asked(ratio: float | None, budget: int) -> str:
    return f"the size asked for leaves {budget}" if ratio is None else f"ratio {ratio} keeps {budget}"


def _reachable(ratio: float | None, needed: int, dense: int) -> str:
    if ratio is None:
        return f"it to leave {needed} for them"
    # Rounded up, so that the ratio printed is one that works.
    return f"ratio to {math.ceil(Fraction(needed, dense) * 10**6) / 10**6}"


def proportional_shares(
    weights: Sequence[int | Fraction],
    lower: Sequence[int | Fraction],
    upper: Sequence[int | Fraction],
    total: int | Fraction,
) -> list[int | Fraction]:
    """Return shares of `total` proportional to `weights`, clipped; what clipping frees goes to the rest.

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


def spend(budget: Budget, target_bytes: Mapping[str, int | Fraction]) -> dict[str, PlannedModule]:
    """Turn target bytes into ranks whose bytes are at most the budget and leave no room for any further step.

    The target bytes are scaled to use the budget up (see `proportional_shares`) and rounded down to an option each;
    the remainder goes to whichever matrix is furthest below its own, relative to it, one option at a time.

    Args:
        budget: what `open_budget` returned.
        target_bytes: above 0 for every name in `budget.options`; only their proportions matter, up to clipping.

    Returns:
        A planned module for every target, fixed ones included, in the targets' order.
    """
    options = budget.options
    shares = proportional_shares(
        [target_bytes[name] for name in options],
        [each.bytes_at(0) for each in options.values()],
        [each.bytes_at(len(each) - 1) for each in options.values()],
        budget.free_bytes,
    )
    wanted = dict(zip(options, shares, strict=True))
    chosen = {name: each.option_within(wanted[name]) for name, each in options.items()}
    spend_remainder(
        options,
        budget.free_bytes,
        chosen,
        lambda name, option: float(1 - options[name].bytes_at(option) / Fraction(wanted[name])),
    )
    return planned(budget, options, chosen)


def planned(budget: Budget, options: Mapping[str, Options], chosen: Mapping[str, int]) -> dict[str, PlannedModule]:
    """Return what every target becomes at the chosen options, fixed ones included, in the targets' order."""
    found = budget.fixed | {name: each.module_at(chosen[name]) for name, each in options.items()}
    return {name: found[name] for name in budget.names}


def spend_remainder(
    options: Mapping[str, Options], free_bytes: int, chosen: dict[str, int], priority: Callable[[str, int], float]
) -> None:
    """Raise `chosen` in place, one option at a time, until no matrix's next one fits into the bytes there are.

    Args:
        options: the sizes of every matrix.
        free_bytes: for all of them.
        chosen: an option for every matrix, together within `free_bytes`.
        priority: `(name, present option) -> number`; the highest goes first, on a tie the earlier name.
    """
    left = free_bytes - sum(each.bytes_at(chosen[name]) for name, each in options.items())
    queue = [(-priority(name, chosen[name]), order, name) for order, name in enumerate(options)]
    heapq.heapify(queue)
    while queue:
        _, order, name = heapq.heappop(queue)
        each, option = options[name], chosen[name]
        if option == len(each) - 1:
            continue
        cost = each.bytes_at(option + 1) - each.bytes_at(option)
        # What is left only shrinks, so a step that does not fit now never will: the matrix leaves the queue.
        if cost <= left:
            left -= cost
            chosen[name] = option + 1
            heapq.heappush(queue, (-priority(name, option + 1), order, name))


def _exact(ratio: float) -> Fraction:
    return Fraction(repr(ratio))


def _check_request(known: Mapping[str, Target], request: BudgetRequest) -> None:
    if (request.ratio is None) == (request.size is None):
        raise ValueError("give either a ratio or a size for the matrices to compress")
    if request.ratio is not None and not is_keep_ratio(request.ratio):
        raise ValueError(f"ratio is {request.ratio!r}; it is the fraction of the bytes kept, above 0 and at most 1")
    multiple = allowed_multiple(request.format, request.rank_multiple)
    for option, value in {"rank_multiple": multiple, "min_rank": request.min_rank}.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{option} is {value!r}; it must be a whole number of at least 1")
    for name in request.overrides:
        if name not in known:
            raise ValueError(
                f"there is an override for {name!r}, which is not a matrix to compress; {near_names(name, known)}; "
                "correct or remove it"
            )


def _fixed_by(formats: Sequence[SizeOptions], override: Override) -> PlannedModule:
    """What an override makes of its matrix: in the first one's encoding, whichever structure makes most of it."""
    same = [options for options in formats if options.format.encoding.name == formats[0].format.encoding.name]
    target = same[0].target
    if override.dense:
        return PlannedModule(*AS_IS.key)
    if override.rank is not None:
        modules = [PlannedModule(*options.format.key, rank=override.rank) for options in same]
        possible = [module for module in modules if _is_possible(target, module)]
        if not possible:
            check_possible(target, modules[-1])
        return min(possible, key=lambda module: planned_bytes(target, module))
    size = math.floor(_exact(override.ratio or 0) * target.dense_bytes)
    found = [(options, option) for options in same if (option := options.option_within(size)) >= 0]
    if not found:
        raise ValueError(
            f"{target.name}: the override's ratio {override.ratio} of {target.dense_bytes} bytes is below the "
            f"{min(options.bytes_at(0) for options in same)} bytes of the smallest size allowed for this matrix; "
            "raise that ratio, lower rank_multiple or min_rank, or override it with a rank or with dense: true"
        )
    largest = [options.module_at(option) for options, option in found]
    return max(largest, key=lambda module: math.inf if module.rank is None else module.rank)


def _is_possible(target: Target, module: PlannedModule) -> bool:
    try:
        check_possible(target, module)
    except ValueError:
        return False
    return True
