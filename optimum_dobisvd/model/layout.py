"""Where a model keeps its weights: the repeated blocks, and the linears in them that can be compressed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .blocks import Stack, find_stacks, holds_linears, stacks_beside_embeddings
from .experts import is_offloaded, router_names
from .footprint import checkpoint_bytes, tensor_bytes
from .linears import is_linear, weight_matrix
from .patterns import select
from .subclasses import computes_like_linear
from .target import Target
from .trial import Trial, takes_text, text_window, try_out

EXCLUDED = "excluded by modules_to_not_convert"
NO_TEXT = "in parts that text does not pass through (nontext_modules=True compresses these, too)"
READ = "read by the model's code, not called"
SHARED = "shared with another module"
OFFLOADED = "in stacked experts that are offloaded (load the model without cpu or disk offload to compress these)"
OUTSIDE = "outside the repeated blocks"
ROUTER = "in routers, which choose among experts and stay as they are"


@dataclass(frozen=True)
class LeftDense:
    """Weights that are not compressed, and why."""

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Layout:
    """The blocks of a model in the order of their calls, its compressible linears by full name, and what is left out.

    `other_bytes` is what all that is not the weight of such a linear takes in a checkpoint. `targets` are the linears
    as shapes, for the allocators: taken at the start, since linears are replaced and freed one by one.
    """

    blocks: dict[str, nn.Module]
    linears: dict[str, nn.Module]
    left_dense: list[LeftDense] = field(default_factory=list)
    other_bytes: int = 0
    targets: list[Target] = field(init=False)

    def __post_init__(self) -> None:
        weights = {name: weight_matrix(module) for name, module in self.linears.items()}
        targets = [
            Target(name, len(weight), weight.shape[1], weight.element_size()) for name, weight in weights.items()
        ]
        object.__setattr__(self, "targets", targets)

    def linears_of(self, block: str) -> dict[str, nn.Module]:
        """The compressible linears of one block, by full name."""
        return {name: module for name, module in self.linears.items() if f"{name}.".startswith(f"{block}.")}

    @property
    def coverage(self) -> float:
        """Share of the linears' weights, embeddings and output head left out, that are targets.

        Matrices in the blocks that are no linears count with them; what is left dense on purpose counts neither way.
        """
        return self._share_without(EXCLUDED, ROUTER)

    @property
    def possible_coverage(self) -> float:
        """The same where nothing counts that settings leave out: what `min_coverage` is held against."""
        return self._share_without(EXCLUDED, ROUTER, NO_TEXT)

    def _share_without(self, *reasons: str) -> float:
        taken = sum(target.out_features * target.in_features for target in self.targets)
        missed = sum(left.parameters for left in self.left_dense if left.reason not in reasons)
        return taken / (taken + missed) if taken + missed else 0.0

    def describe_left_dense(self) -> str:
        """What is not compressed, in one line per reason, with parameter counts."""
        counts: Counter[str] = Counter()
        for left in self.left_dense:
            counts[left.reason] += left.parameters
        return "; ".join(f"{count:,} parameters {reason}" for reason, count in counts.items()) or "nothing"


def find_blocks(
    model: nn.Module, batch: Mapping[str, Any] | None = None, nontext: bool = False
) -> dict[str, nn.Module]:
    """The blocks by full name, in the order of their calls; empty where there are none. See `find_layout`."""
    return _Passed.through(model, batch, nontext).blocks


def find_layout(
    model: nn.Module,
    modules_to_not_convert: Iterable[str] = (),
    min_coverage: float = 0.0,
    *,
    batch: Mapping[str, Any] | None = None,
    nontext: bool = False,
) -> Layout:
    """Sort the weights of a dense model into what is compressed and what is not. Works on meta tensors.

    Args:
        model: the model.
        modules_to_not_convert: patterns of linears to leave alone.
        min_coverage: least share of what is to be compressed that can be.
        batch: a batch of a processor, for models that take more than text.
        nontext: compress stacks, too, that text does not pass through.

    Raises:
        ValueError: no block or no eligible linear; a pattern of `modules_to_not_convert` that matches nothing; a
            coverage below `min_coverage`.
    """
    passed = _Passed.through(model, batch, nontext)
    if not passed.blocks:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks with nn.Linear layers that text passes through (a "
            "ModuleList, a Sequential or ModuleDict of several modules of a kind, or such in numbered attributes); "
            "there is nothing to compress. Of a model that was quantized, load the dense one"
        )
    eligible: dict[str, nn.Module] = {}
    left: list[LeftDense] = []
    for name, module, reason in _sorted_modules(model, passed):
        if reason is None:
            eligible[name] = module
        else:
            left += [LeftDense(name, count, reason) for count in _matrices(module)]
    # Everyone names lm_head, whatever the head is called here: like every other module it may be named, if in vain.
    excluded = select(modules_to_not_convert, [*eligible, *(name for name, _ in model.named_modules()), "lm_head"])
    left += [
        LeftDense(name, count, EXCLUDED)
        for name in eligible
        if name in excluded
        for count in _matrices(eligible[name])
    ]
    linears = {name: module for name, module in eligible.items() if name not in excluded}
    target_bytes = sum(tensor_bytes(module.weight) for module in linears.values())
    layout = Layout(passed.blocks, linears, left, other_bytes=checkpoint_bytes(model) - target_bytes)
    if not layout.linears:
        raise ValueError(f"no eligible linear in {type(model).__name__}: {layout.describe_left_dense()}")
    if layout.possible_coverage < min_coverage:
        raise ValueError(
            f"only {layout.possible_coverage:.1%} of the weights in the linears of {type(model).__name__} can be "
            f"compressed (min_coverage={min_coverage:g}); left dense: {layout.describe_left_dense()}. Lower "
            "min_coverage to accept that"
        )
    return layout


@dataclass(frozen=True)
class _Passed:
    """What trial passes found: the blocks to compress, modules that text does not reach, and weights that are read."""

    blocks: dict[str, nn.Module]
    without_text: set[nn.Module]
    read: frozenset[str]

    @classmethod
    def through(cls, model: nn.Module, batch: Mapping[str, Any] | None, nontext: bool) -> _Passed:
        text = try_out(model, text_window(model)) if takes_text(model) else None
        whole = text if batch is None else try_out(model, batch)
        stacks = find_stacks(model, whole or text)
        everything = nontext and batch is None
        chosen = stacks if everything else _reached(model, stacks, whole if nontext else text or whole)
        blocks = {name: block for stack in chosen for name, block in stack.blocks.items()}
        if whole is not None and len(chosen) < len(stacks):  # some blocks of a stack may be another modality's, too
            blocks = {name: each for name, each in blocks.items() if whole.reaches(each) or not holds_linears(each)}
        if nontext:  # projectors between the parts, each a block of its own
            inside = {each for block in blocks.values() for each in block.modules()}
            blocks |= {
                name: module
                for name, module in model.named_modules()
                if is_linear(module) and module not in inside and not _is_head(model, module)
            }
        if whole is not None:
            blocks = _in_order_of_calls(blocks, whole)
        others = [block for stack in stacks for name, block in stack.blocks.items() if name not in blocks]
        without = {each for block in others for each in block.modules()}
        if without and text is not None:
            without |= {each for each in model.modules() if each not in text.calls}
        return cls(blocks, without, frozenset().union(*(trial.read for trial in (text, whole) if trial is not None)))


def _reached(model: nn.Module, stacks: list[Stack], trial: Trial | None) -> list[Stack]:
    if trial is None:
        return stacks_beside_embeddings(model, stacks) if takes_text(model) else stacks
    return [stack for stack in stacks if stack.is_reached(trial)]


def _in_order_of_calls(blocks: dict[str, nn.Module], trial: Trial) -> dict[str, nn.Module]:
    """Return the blocks in the order of their first calls; one that was not called stays behind the one before it."""
    calls: dict[str, int] = {}
    last = -1
    for name, block in blocks.items():
        last = calls[name] = trial.first_call(block) if trial.reaches(block) else last
    return {name: blocks[name] for name in sorted(calls, key=calls.__getitem__)}


def _sorted_modules(model: nn.Module, passed: _Passed) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Yield name and module of all that has weights to count, and why it is not compressed, None if it is.

    In the blocks these are all matrices but embeddings, elsewhere all linears but the output head.
    """
    # Parameters that go by more than one name, in two modules or in one that stands in two places.
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    inside: set[nn.Module] = set()
    routers = router_names(model)
    for block_name, block in passed.blocks.items():
        for name, module in block.named_modules(prefix=block_name):
            inside.add(module)
            if name in routers:
                yield name, module, ROUTER
            elif not computes_like_linear(module):
                if not isinstance(module, nn.Embedding):
                    yield name, module, OFFLOADED if is_offloaded(module) else f"in {type(module).__name__}"
            elif owners[id(module.weight)] > 1:
                yield name, module, SHARED
            else:
                yield name, module, READ if name in passed.read else None
    for name, module in model.named_modules():
        if is_linear(module) and module not in inside and not _is_head(model, module):
            yield name, module, NO_TEXT if module in passed.without_text else OUTSIDE


def _is_head(model: nn.Module, module: Any) -> bool:
    """Whether it gives logits over the vocabulary."""
    if module is getattr(model, "get_output_embeddings", lambda: None)():
        return True
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return len(weight_matrix(module)) == getattr(text, "vocab_size", None)


def _matrices(module: nn.Module) -> list[int]:
    """Return the sizes of a module's own matrices."""
    return [each.numel() for each in module.parameters(recurse=False) if each.dim() >= 2 and each.numel() > 0]
