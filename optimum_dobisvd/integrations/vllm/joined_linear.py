"""Compressed linears that read the same input, one after the other in their outputs, as vLLM's joined layers are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...structures.base import CompressedLinear, bare_linear
from ...structures.low_rank import LowRankLinear

if TYPE_CHECKING:
    from .member import Member

_MACS_OF_A_MOVE = 128
"""Multiply-adds in the time in which a CPU core puts a value elsewhere, 16 bits each: AVX-512, many rows, measured."""


class JoinedLinear(nn.Module):
    """`y` is what its members give of `x`, one after the other.

    After `finish`, the linears of members that read the input are one product where their encoding can join them, and
    outputs that come in another order are put in theirs at once.
    """

    sources: Tensor | None

    def __init__(self, members: Sequence[CompressedLinear]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.first = nn.ModuleList()
        self._split: list[tuple[list[int], list[int]]] = []
        self._only_first = False
        self.register_buffer("sources", None, persistent=False)

    def finish(self, members: Sequence[Member], dtype: torch.dtype, plain: Callable[[nn.Linear], nn.Module]) -> None:
        """Prepare loaded members for inference; `plain` gives what computes a plain linear."""
        for member in members:
            for name, child in list(member.module.named_children()):
                member.module.set_submodule(name, member.format.encoding.loaded(f"{member.name}.{name}", child))
            member.module.set_inference(True)
            if _is_better_unfolded(member):
                _unfold(member)
        self.members = nn.ModuleList([member.module for member in members])
        self.sources = _sources(members)
        self._join(members, dtype)
        for path, child in list(self.named_modules()):
            if type(child) is nn.Linear:
                self.set_submodule(path, plain(child))

    def _join(self, members: Sequence[Member], dtype: torch.dtype) -> None:
        """Join the linears that read the input, those of one encoding with each other."""
        alike: dict[str, list[int]] = {}
        for index, member in enumerate(members):
            alike.setdefault(member.format.encoding.name, []).append(index)
        for indices in alike.values():
            modules = [members[index].module for index in indices]
            linears = [module.get_submodule(module.input_linear) for module in modules]
            joined = members[indices[0]].format.encoding.for_inference(linears, dtype)
            if len(linears) < 2 or joined is None:
                continue
            self._split.append((indices, [int(linear.out_features) for linear in linears]))  # type: ignore[arg-type]
            self.first.append(joined)
            for module in modules:
                module.set_submodule(module.input_linear, nn.Identity())
        # Nothing is left to do after one product of all members with a single linear each.
        single = all(len(list(member.module.children())) == 1 for member in members)
        self._only_first = single and len(self.first) == 1 and len(self._split[0][0]) == len(members)

    def forward(self, x: Tensor) -> Tensor:
        if self._only_first:
            return self.first[0](x)
        given: dict[int, Tensor] = {}
        for linear, (indices, sizes) in zip(self.first, self._split, strict=True):
            given.update(zip(indices, linear(x).split(sizes, dim=-1), strict=True))
        pieces = [
            piece
            for index, member in enumerate(self.members)
            for piece in member.parts(given.get(index, x))  # type: ignore[operator]
        ]
        stacked = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        if self.sources is None:
            return stacked
        return stacked.gather(-1, self.sources.expand(*stacked.shape[:-1], -1))


def _is_better_unfolded(member: Member) -> bool:
    """Whether a matrix whose outputs come in another order is to be two factors that give them in theirs.

    That takes `k^2` more multiply-adds, and as much more memory, than putting the outputs in order afterwards. It is
    for a process that has few of the outputs, and for CPUs, where moving a value takes as long as many multiply-adds.
    """
    module, rank = member.module, member.module.rank
    if module.sources is None or rank is None or not member.is_plain:
        return False
    if member.rows < module.out_features:
        return member.rows < module.out_features - rank
    on_cpu = module.weight.device.type == "cpu"
    return on_cpu and rank * rank < _MACS_OF_A_MOVE * module.out_features


def _unfold(member: Member) -> None:
    """Put two factors in the place of a member's matrix, with the outputs of this process alone."""
    module = member.module
    second = module.factors()[0]
    if member.outputs is not None:
        second = second[member.outputs.to(second.device)]
    unfolded = LowRankLinear(module.in_features, len(second), module.rank, bias=False, device="meta")
    unfolded.weight = module.weight
    unfolded.set_submodule("first", module.get_submodule(module.input_linear))
    unfolded.set_submodule("second", bare_linear(second.to(module.weight.dtype).contiguous()))
    member.module = unfolded


def _sources(members: Sequence[Member]) -> Tensor | None:
    """Return for every output of this process the number that it has among all that is computed; None if its own."""
    found, count = [], 0
    for member in members:
        computed = member.module.out_features
        sources = member.module.sources
        here = torch.arange(computed) if sources is None else sources.cpu()
        if member.rows < computed:
            assert member.outputs is not None
            here = here[member.outputs.cpu()]
        found.append(here + count)
        count += computed
    places = torch.cat(found)
    if torch.equal(places, torch.arange(count)):
        return None
    return places.to(members[0].module.weight.device)
