"""A matrix held in two forms: one for the few rows of decoding, one for the many of a prompt."""

from __future__ import annotations

from torch import Tensor, nn

from ..model.substitutions import Substitute, tell

FEW_ROWS = 128
"""Steps of decoding and short prompts have no more; more multiply longer than they read weights or begin a product."""


class ByRows(Substitute):
    """Stands in for a matrix: `few` computes products of up to `FEW_ROWS` rows, `many` those of more."""

    def __init__(self, few: nn.Module, many: nn.Module) -> None:
        super().__init__()
        self.few, self.many = few, many
        self.training = few.training

    @property
    def weight(self) -> Tensor:
        """That of one of the two, which modeling code asks for dtype and device."""
        weight: Tensor = self.few.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        # Not by attribute, which in a module takes as long as another call.
        form = self._modules["few" if x.numel() <= FEW_ROWS * x.shape[-1] else "many"]
        y: Tensor = form(x)  # type: ignore[misc]
        return y

    def suspend(self) -> None:
        """See `Substitutions`."""
        tell(self.few, "suspend")
        tell(self.many, "suspend")

    def resume(self) -> None:
        """See `Substitutions`."""
        tell(self.few, "resume")
        tell(self.many, "resume")
