"""Subclasses of nn.Linear: compressed where they compute the product and nothing else, named where not."""

import pytest
import torch
from torch import Tensor, nn

from integration_tests.tiny_architectures import tiny_architecture
from integration_tests.tiny_models import tiny
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.model.subclasses import computes_like_linear


class Spelled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class WithFlag(nn.Linear):
    """What it computes hangs on an attribute."""

    def __init__(self, *args: int, scale: float) -> None:
        super().__init__(*args)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class Clipped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-30, 30)


class Tuple(nn.Linear):
    def forward(self, input: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(input), None


class WithAdapter(nn.Linear):
    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.adapter = nn.Linear(*args)


class Widening(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input.float(), self.weight.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_computes_the_product_is_a_linear(dtype: torch.dtype, device: str) -> None:
    for bias in (True, False):
        assert computes_like_linear(Spelled(12, 20, bias=bias).to(device=device, dtype=dtype))
    assert computes_like_linear(WithFlag(12, 20, scale=1.0).to(dtype))


@pytest.mark.parametrize(
    "module",
    [
        WithFlag(12, 20, scale=2.0),
        Clipped(12, 20),
        Tuple(12, 20),
        WithAdapter(12, 20),
        Widening(12, 20, bias=False).half(),
        nn.Embedding(12, 20),
        nn.Conv1d(12, 20, 1),
    ],
)
def test_what_computes_something_else_is_none(module: nn.Module) -> None:
    assert not computes_like_linear(module)


def test_falcons_linears_are_compressed() -> None:
    layout = find_layout(tiny_architecture("falcon"), min_coverage=1.0)
    assert {name.rpartition(".")[2] for name in layout.linears} == {
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    }


def test_the_others_are_named() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = Clipped(32, 48, bias=False)
    assert find_layout(model).describe_left_dense() == "4,608 parameters in Clipped"
