"""Compressed linears that read the same input, one after the other in their outputs, as vLLM's joined layers are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...structures.base import CompressedLinear

if TYPE_CHECKING:
    from .member import Member


class JoinedLinear(nn.Module):
    """`y` is what its members give of `x`, one after the other.

    After `finish`, the linears of members that read the input are one product where their encoding can join them.
    """

    def __init__(self, members: Sequence[CompressedLinear]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.first = nn.ModuleList()
        self._split: list[tuple[list[int], list[int]]] = []
        self._kept: list[Tensor | None] = [None] * len(members)
        self._only_first = False

    def finish(self, members: Sequence[Member], dtype: torch.dtype, plain: Callable[[nn.Linear], nn.Module]) -> None:
        """Prepare loaded members for inference; `plain` gives what computes a plain linear."""
        for index, member in enumerate(members):
            for name, child in list(member.module.named_children()):
                member.module.set_submodule(name, member.format.encoding.loaded(f"{member.name}.{name}", child))
            if member.rows < member.module.out_features:
                assert member.outputs is not None
                self._kept[index] = member.outputs.to(member.module.weight.device)
            member.module.set_inference(True)
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
        outputs = []
        for index, (member, kept) in enumerate(zip(self.members, self._kept, strict=True)):
            y = member(given.get(index, x))
            outputs.append(y if kept is None else y.index_select(-1, kept))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
