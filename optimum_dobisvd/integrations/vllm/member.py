"""The matrices of one layer of vLLM, and how their tensors get from the checkpoint to the process that has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ...structures.base import CompressedLinear
from ...structures.format import AS_IS, Format, format_named


class Member:
    """One matrix of a layer: the part of it that this process computes.

    Attributes:
        name: in the checkpoint.
        format: structure and encoding.
        tensors: shape and dtype of its tensors in the checkpoint, by their names below its own.
        module: the part, compressed, without a bias; with all outputs where the structure cannot be cut there.
        whole, rows: how many outputs there are, and how many this process has.
        outputs: which ones; set when the first tensor arrives.
        bias_key: the name of its bias in the checkpoint.
    """

    def __init__(
        self,
        name: str,
        entry: Mapping[str, Any] | None,
        whole: tuple[int, int],
        part: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self.name, self.whole, self.rows = name, whole[0], part[0]
        self.format: Format = AS_IS if entry is None else format_named(entry["structure"], entry["encoding"])
        rank = None if entry is None else entry.get("rank")
        # A matrix as it is has no wrapper in the checkpoint.
        bare = self.format.leaves_as_is
        headers = self.format.tensors(*whole, rank, bias=False)
        self._inside = {key.rpartition(".")[2] if bare else key: key for key in headers}
        self.tensors = {key: headers[inside] for key, inside in self._inside.items()}
        self.bias_key = "bias" if bare else self.format.structure.bias_key
        self.outputs: Tensor | None = None
        outputs = part[0] if self.format.structure.outputs_in_order else whole[0]
        dense = nn.Linear(part[1], outputs, bias=False, device="meta", dtype=dtype)
        self.module: CompressedLinear = self.format.empty(dense, rank)
        self.module.to_empty(device=torch.empty(0).device).requires_grad_(False)
        self._missing = dict.fromkeys(self.tensors)

    @property
    def is_plain(self) -> bool:
        """Whether all its linears are PyTorch's own."""
        return all(type(child) is nn.Linear for child in self.module.children())

    def load(self, key: str, loaded: Tensor, inputs: Tensor | None) -> None:
        """Take this process's part of a tensor. ValueError if it is not as config.json says."""
        expected = self.tensors[key][0] if key in self.tensors else None
        if list(loaded.shape) != expected:
            raise ValueError(
                f"{self.name}.{key} has shape {list(loaded.shape)} in the checkpoint and {expected} by config.json: "
                "one of the two belongs to another compression; copy both from the same one"
            )
        place = self.module.state_dict(keep_vars=True)[self._inside[key]]
        for axis, kept in enumerate((self.outputs, inputs)[: loaded.ndim]):
            if place.shape[axis] != loaded.shape[axis]:
                assert kept is not None
                loaded = loaded.index_select(axis, kept.to(loaded.device))
        place.data.copy_(loaded)
        self._missing.pop(key, None)

    def check_complete(self) -> None:
        """ValueError names a tensor that has not been loaded."""
        if self._missing:
            raise ValueError(
                f"the checkpoint lacks {self.name}.{next(iter(self._missing))}, which config.json promises: it is "
                "incomplete, copy it again"
            )


class Parts:
    """Which outputs and inputs of a layer's members this process has: asked of vLLM's own loader of the layer.

    It is given the numbers of the rows, or columns, in the place of values. So heads of `k` and `v` that several
    processes have, and matrices that are one in the checkpoint and several in vLLM, are where vLLM expects them.

    Args:
        members: in the order of the layer's outputs.
        inputs: how many the layer has in all, and in this process.
        weight_loader: the layer's.
    """

    def __init__(self, members: Sequence[Member], inputs: tuple[int, int], weight_loader: Callable[..., None]) -> None:
        self._members, self._loader = members, weight_loader
        self._inputs = None
        if inputs[0] != inputs[1]:
            self._inputs = self._numbers(inputs[1], inputs[0], "input_dim")
        self._found: dict[Any, Member] = {}

    def load(self, key: str, loaded: Tensor, shard_id: Any) -> None:
        """Hand a tensor on to the member that it belongs to; `shard_id` is what vLLM calls this one."""
        if shard_id not in self._found:
            self._found[shard_id] = self._member(shard_id)
        self._found[shard_id].load(key, loaded, self._inputs)

    def _member(self, shard_id: Any) -> Member:
        """Return the member, told which of its outputs this process has."""
        sizes, wholes = ([each.rows for each in self._members], [each.whole for each in self._members])
        if len(sizes) == 1 and sizes == wholes:
            return self._members[0]
        numbers = self._numbers(sum(sizes), sum(wholes), "output_dim", shard_id)
        for member, begin, end in zip(self._members, accumulate(sizes, initial=0), accumulate(sizes), strict=False):
            if bool((numbers[begin:end] >= 0).all()):
                member.outputs = numbers[begin:end]
                return member
        raise ValueError(f"{self._members[0].name}: vLLM loads a part {shard_id!r} of it that is no member of its own")

    def _numbers(self, here: int, in_all: int, axis: str, shard_id: Any = None) -> Tensor:
        """Return the number of what is at each place of this process; -1 where another part is."""
        places = nn.Parameter(torch.full((here,), -1, device="cpu"), requires_grad=False)
        setattr(places, axis, 0)
        self._loader(places, torch.arange(in_all, device="cpu"), *(() if shard_id is None else (shard_id,)))
        return places.data
