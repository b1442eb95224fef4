"""Targets, spectra and budget requests that the allocation tests share, and what they allow, worked out by hand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from optimum_dobisvd.allocation.budget import BudgetRequest
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.model.patterns import Override
from optimum_dobisvd.model.target import Target
from optimum_dobisvd.structures.format import format_named

SMOLLM2_SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}

# Bytes by structure and encoding, written down again here: (m, n, rank, bytes of an element).
SIZES: dict[tuple[str, str], Callable[[int, int, int, int], int]] = {
    ("low_rank", "float"): lambda m, n, k, size: k * (m + n) * size,
    ("low_rank", "remap"): lambda m, n, k, size: (
        k * (2 * min(m, n) + (max(m, n) - min(m, n)) * size + size) + min(m, n) * size
    ),
    ("low_rank", "int8"): lambda m, n, k, size: k * (m + n + size) + m * size,
    ("dense", "float"): lambda m, n, _, size: m * n * size,
    ("dense", "int8"): lambda m, n, _, size: m * n + m * size,
}
# What matrices may be stored as that are not factorized, beside factors in each encoding.
DENSE_BESIDE = {"float": ("float",), "remap": ("float",), "int8": ("int8", "float")}
LEFT_AS_IS = PlannedModule("dense", "float")


def low_rank(rank: int, encoding: str = "float", **kwargs: Any) -> PlannedModule:
    return PlannedModule("low_rank", encoding, rank, **kwargs)


def request(ratio: float | None, encoding: str = "float", **kwargs: Any) -> BudgetRequest:
    """Low-rank factors in one encoding."""
    return BudgetRequest(format_named("low_rank", encoding), ratio, **kwargs)


def smollm2_targets() -> list[Target]:
    return [
        Target(f"model.layers.{layer}.{name}", m, n, element_size=2)
        for layer in range(30)
        for name, (m, n) in SMOLLM2_SHAPES.items()
    ]


def random_spectra(targets: Sequence[Target], seed: int) -> dict[str, Tensor]:
    """Decaying spectra of very different sizes, as those of a model's layers are."""
    generator = torch.Generator().manual_seed(seed)
    spectra = {}
    for target in targets:
        count = min(target.out_features, target.in_features)
        scale, decay = torch.rand(2, generator=generator).tolist()
        values = torch.rand(count, generator=generator) * torch.arange(1, count + 1) ** -(0.2 + decay)
        spectra[target.name] = (values * 10 ** (9 * scale)).sort(descending=True).values
    return spectra


def dense_sum(targets: Sequence[Target]) -> int:
    return sum(target.dense_bytes for target in targets)


class UnreachableOverride(Exception):
    """The override's ratio is below the smallest size that its matrix can have."""


@dataclass(frozen=True)
class Case:
    """A budget request, and what it allows, worked out rank by rank."""

    targets: list[Target]
    ratio: float
    encoding: str
    overrides: dict[str, Override]
    rank_multiple: int
    min_rank: int

    @property
    def request(self) -> BudgetRequest:
        return request(
            self.ratio,
            self.encoding,
            overrides=self.overrides,
            rank_multiple=self.rank_multiple,
            min_rank=self.min_rank,
        )

    @property
    def budget(self) -> int:
        return math.floor(Fraction(str(self.ratio)) * dense_sum(self.targets))

    @property
    def free(self) -> list[Target]:
        return [target for target in self.targets if target.name not in self.overrides]

    def size(self, target: Target, module: PlannedModule) -> int:
        key = (module.structure, module.encoding)
        return SIZES[key](target.out_features, target.in_features, module.rank or 0, target.element_size)

    def choices(self, target: Target) -> list[PlannedModule]:
        """Everything the matrix may become, in ascending order of bytes: ranks, then not factorized."""
        dense = [PlannedModule("dense", encoding) for encoding in DENSE_BESIDE[self.encoding]]
        dense = [each for each in dense if self.size(target, each) < target.dense_bytes or each == LEFT_AS_IS]
        ranks = range(self.rank_multiple, min(target.out_features, target.in_features) + 1, self.rank_multiple)
        factors = [low_rank(k, self.encoding) for k in ranks if k >= self.min_rank]
        return [each for each in factors if self.size(target, each) < self.size(target, dense[0])] + dense

    def overridden(self, target: Target) -> PlannedModule:
        """What the target's override has to give; UnreachableOverride where its ratio is below every choice."""
        override = self.overrides[target.name]
        if override.dense:
            return LEFT_AS_IS
        if override.rank is not None:
            return low_rank(override.rank, self.encoding)
        within = Fraction(str(override.ratio)) * target.dense_bytes
        fitting = [each for each in self.choices(target) if self.size(target, each) <= within]
        if not fitting:
            raise UnreachableOverride(target.name)
        return fitting[-1]

    def smallest_total(self) -> int:
        smallest = {target.name: self.choices(target)[0] for target in self.free}
        smallest |= {t.name: self.overridden(t) for t in self.targets if t.name in self.overrides}
        return self.total(smallest)

    def total(self, planned: dict[str, PlannedModule]) -> int:
        return sum(self.size(target, planned[target.name]) for target in self.targets)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any case; with such small matrices and so many options the budget of most is out of reach."""
    encoding = draw(st.sampled_from(["float", "remap", "int8"]))
    bytes_of = SIZES["low_rank", encoding]
    sizes = st.integers(1, 70)
    shapes = draw(st.lists(st.tuples(sizes, sizes, st.sampled_from([1, 2, 4])), min_size=1, max_size=8))
    kinds = st.sampled_from(["q_proj", "k_proj", "up_proj"])
    targets = [Target(f"layers.{i}.{draw(kinds)}", *shape) for i, shape in enumerate(shapes)]
    ratios = st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)
    overrides = {}
    for target in targets:
        m, n, size = target.out_features, target.in_features, target.element_size
        largest = max((k for k in range(1, min(m, n) + 1) if bytes_of(m, n, k, size) < m * n * size), default=0)
        options = [st.none()] * 4 + [st.builds(Override, ratio=ratios), st.just(Override(dense=True))]
        if largest:
            options.append(st.builds(Override, rank=st.integers(1, largest)))
        override = draw(st.one_of(options))
        if override is not None:
            overrides[target.name] = override
    return Case(targets, draw(ratios), encoding, overrides, draw(st.integers(1, 12)), draw(st.integers(1, 9)))


@st.composite
def reachable_cases(draw: st.DrawFn) -> Case:
    """Cases whose overrides can be honored and whose budget is enough."""
    case = draw(cases())
    for target in case.targets:
        try:
            if target.name in case.overrides:
                case.overridden(target)
        except UnreachableOverride:
            case.overrides[target.name] = Override(dense=True)
    lowest = math.ceil(Fraction(case.smallest_total(), dense_sum(case.targets)) * 1000)
    return replace(case, ratio=draw(st.integers(lowest, 1000)) / 1000)
