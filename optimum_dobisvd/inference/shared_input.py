"""One product for linears that read the same input: q, k and v of an attention, gate and up of a feed-forward part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..model.substitutions import Substitute


class _Kept:
    """The parts that nobody has asked for yet. No module, in which setting an attribute takes microseconds."""

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.parts: list[Tensor | None] = []
        self.left = 0


class SharedInput(nn.Module):
    """The product of one input with the weights of several linears, kept until each of them has asked for its part.

    Which linears belong together is only a guess at speed: an input that is not the one kept is multiplied anew. So
    what is computed is right in whatever order and with whatever inputs they are called.

    The joined linear has the only copy of the weights. Those of the linears are views of its rows, and it is not among
    the model's modules, whose parameters are the same as before.
    """

    def __init__(self, joined: nn.Module, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        self._linears, self._joined = tuple(linears), (joined,)  # in tuples: not registered
        self._sizes = [int(linear.out_features) for linear in linears]  # type: ignore[arg-type]
        self._kept = _Kept()
        self._share_memory()

    @property
    def joined(self) -> nn.Module:
        """The linear that has all weights."""
        return self._joined[0]

    def part(self, x: Tensor, index: int) -> Tensor:
        """Return the product of `x` with the weight of one of the linears."""
        kept = self._kept
        if kept.input is not x or kept.parts[index] is None:
            kept.parts = list(self._joined[0](x).split(self._sizes, dim=-1))
            kept.input, kept.left = x, len(kept.parts)
        found = kept.parts[index]
        assert found is not None
        kept.parts[index] = None
        kept.left -= 1
        if kept.left == 0:
            kept.input = None
        return found

    def _share_memory(self) -> None:
        bounds = list(pairwise(accumulate(self._sizes, initial=0)))
        for name, tensor in self._joined[0].named_parameters():
            for linear, (begin, end) in zip(self._linears, bounds, strict=True):
                own = getattr(linear, name)
                if own is not None:
                    own.data = tensor.data[begin:end]

    def release(self) -> None:
        """Give the linears memory of their own again."""
        for linear in self._linears:
            for tensor in linear.parameters():
                tensor.data = tensor.data.clone()
        release = getattr(self._joined[0], "release", None)
        if release is not None:
            release()

    def order_values(self, method: str) -> None:
        """Have the joined linear `suspend` or `resume` its order of the values, if it has one of its own."""
        if hasattr(self._joined[0], method):
            getattr(self._joined[0], method)()
            self._share_memory()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As every module's, for `model.to`: the weights stay one piece of memory."""
        super()._apply(fn, recurse)
        self._joined[0]._apply(fn, recurse)
        self._share_memory()
        return self


class SharedInputPart(Substitute):
    """What stands in for one of the linears: the same tensors, computed with as a part of a whole.

    With a gradient for them it computes by itself: the joined weight takes none.
    """

    def __init__(self, linear: Any, shared: SharedInput, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, tensor in linear.named_parameters():
            self.register_parameter(name, tensor)
        for name, buffer in linear.named_buffers(recurse=False):
            self.register_buffer(name, buffer, name not in linear._non_persistent_buffers_set)
        self.shared, self._index, self._linear = shared, index, (linear,)
        self.training = linear.training

    @property
    def runs(self) -> nn.Module:
        """What computes."""
        return self.shared.joined

    def suspend(self) -> None:
        """See `Substitutions`."""
        self.shared.order_values("suspend")

    def resume(self) -> None:
        """See `Substitutions`."""
        self.shared.order_values("resume")

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.parameters(recurse=False)):
            return self._linear[0](x)
        return self.shared.part(x, self._index)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
