"""Where a model keeps its weights: the repeated blocks, and the linears in them that can be compressed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from .footprint import checkpoint_bytes, tensor_bytes
from .linears import is_dense_linear, weight_matrix
from .patterns import select
from .target import Target


@dataclass(frozen=True)
class LeftDense:
    """Weights inside the blocks that are not compressed, and why."""

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Layout:
    """The blocks of a model in order, its compressible linears by full name, and what is left out.

    `other_bytes` is what all that is not the weight of such a linear takes in a checkpoint.
    """

    blocks: dict[str, nn.Module]
    linears: dict[str, nn.Module]
    left_dense: list[LeftDense] = field(default_factory=list)
    other_bytes: int = 0

    @property
    def targets(self) -> list[Target]:
        """The linears as shapes, for the allocators."""
        weights = {name: weight_matrix(module) for name, module in self.linears.items()}
        return [Target(name, len(weight), weight.shape[1], weight.element_size()) for name, weight in weights.items()]

    def linears_of(self, block: str) -> dict[str, nn.Module]:
        """The compressible linears of one block, by full name."""
        return {name: module for name, module in self.linears.items() if f"{name}.".startswith(f"{block}.")}

    @property
    def coverage(self) -> float:
        """Share of the blocks' weight matrices that are targets; what the user excluded is not counted either way."""
        taken = sum(weight_matrix(module).numel() for module in self.linears.values())
        missed = sum(left.parameters for left in self.left_dense if left.reason != EXCLUDED)
        return taken / (taken + missed) if taken + missed else 0.0

    def describe_left_dense(self) -> str:
        """What is not compressed, in one line per reason, with parameter counts."""
        counts: Counter[str] = Counter()
        for left in self.left_dense:
            counts[left.reason] += left.parameters
        return "; ".join(f"{count:,} parameters {reason}" for reason, count in counts.items()) or "nothing"


EXCLUDED = "excluded by modules_to_not_convert"


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder blocks by full name: the outermost `ModuleList` that holds most of the model's linear weights."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    largest = 0
    blocks: dict[str, nn.Module] = {}
    for name, module in lists.items():
        size = sum(weight_matrix(each).numel() for each in module.modules() if is_dense_linear(each))
        if size > largest and not any(name.startswith(f"{outer}.") for outer in lists):
            largest, blocks = size, {f"{name}.{child}": block for child, block in module.named_children()}
    return blocks


def find_layout(model: nn.Module, modules_to_not_convert: Iterable[str] = (), min_coverage: float = 0.0) -> Layout:
    """Sort the weights of a dense model into what is compressed and what is not. Works on meta tensors.

    Raises:
        ValueError: no block or no eligible linear; a pattern of `modules_to_not_convert` that matches nothing; a
            coverage below `min_coverage`; a model that is quantized already.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks with nn.Linear layers; there is nothing to compress. "
            "A model that is quantized already must be loaded dense first"
        )
    # Parameters that go by more than one name, in two modules or in one that stands in two places.
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    eligible: dict[str, nn.Module] = {}
    left: list[LeftDense] = []
    for block_name, block in blocks.items():
        for name, module in block.named_modules(prefix=block_name):
            if is_dense_linear(module) and owners[id(module.weight)] <= 1:
                eligible[name] = module
                continue
            reason = "shared with another module" if is_dense_linear(module) else f"in {type(module).__name__}"
            for parameter in module.parameters(recurse=False):
                if parameter.dim() >= 2 and parameter.numel() > 0:
                    left.append(LeftDense(name, parameter.numel(), reason))
    # Everyone names lm_head, whatever the head is called here: like every other module it may be named, if in vain.
    excluded = select(modules_to_not_convert, [*eligible, *(name for name, _ in model.named_modules()), "lm_head"])
    left += [LeftDense(name, weight_matrix(eligible[name]).numel(), EXCLUDED) for name in eligible if name in excluded]
    linears = {name: module for name, module in eligible.items() if name not in excluded}
    target_bytes = sum(tensor_bytes(module.weight) for module in linears.values())
    layout = Layout(blocks, linears, left, other_bytes=checkpoint_bytes(model) - target_bytes)
    if not layout.linears:
        raise ValueError(f"no eligible linear in {type(model).__name__}: {layout.describe_left_dense()}")
    if layout.coverage < min_coverage:
        raise ValueError(
            f"only {layout.coverage:.1%} of the weights in the blocks of {type(model).__name__} can be compressed "
            f"(min_coverage={min_coverage:g}); left dense: {layout.describe_left_dense()}. Lower min_coverage to "
            "accept that"
        )
    return layout
