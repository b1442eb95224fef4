"""Blocks are what the text passes through, however many stacks there are and whatever holds them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from integration_tests.tiny_architectures import image_text_batches, tiny_architecture
from integration_tests.tiny_models import tiny
from optimum_dobisvd.model.layout import NO_TEXT, OUTSIDE, READ, Layout, find_layout
from optimum_dobisvd.model.linears import is_linear

WIDTH = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(self.up(hidden).tanh())


class Written(nn.Module):
    """A model of three blocks, however they are held."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(300, WIDTH), nn.Linear(WIDTH, 300)
        self.hold([Block() for _ in range(3)])

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def hold(self, blocks: list[Block]) -> None:
        self.layers: Any = nn.ModuleList(blocks)

    def in_order(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden = self.embedding(input_ids)
        for block in self.in_order():
            hidden = block(hidden)
        return self.head(hidden)


class InSequential(Written):
    def hold(self, blocks: list[Block]) -> None:
        self.layers = nn.Sequential(*blocks, nn.LayerNorm(WIDTH))

    def in_order(self) -> list[nn.Module]:
        return [self.layers]


class InDictionary(Written):
    def hold(self, blocks: list[Block]) -> None:
        self.layers = nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), **dict(zip("abc", blocks, strict=True))})

    def in_order(self) -> list[nn.Module]:
        return [self.layers[key] for key in "abc"]


class InAttributes(Written):
    def hold(self, blocks: list[Block]) -> None:
        self.block_0, self.block_1, self.block_2 = blocks

    def in_order(self) -> list[nn.Module]:
        return [self.block_0, self.block_1, self.block_2]


class InNestedLists(Written):
    def hold(self, blocks: list[Block]) -> None:
        self.stages = nn.ModuleList([nn.ModuleList(blocks[:1]), nn.ModuleList(blocks[1:])])

    def in_order(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in stage]


class InListInDictionary(Written):
    def hold(self, blocks: list[Block]) -> None:
        self.transformer = nn.ModuleDict({"wte": self.embedding, "h": nn.ModuleList(blocks)})

    def in_order(self) -> list[nn.Module]:
        return list(self.transformer["h"])


SPELLINGS = (Written, InSequential, InDictionary, InAttributes, InNestedLists, InListInDictionary)


@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_blocks_are_found_whatever_holds_them(kind: type[Written], device: str) -> None:
    with torch.device(device):
        model = kind()
    layout = find_layout(model)
    assert list(layout.blocks.values()) == [each for each in model.modules() if isinstance(each, Block)]
    assert len(layout.linears) == 6
    assert layout.coverage == 1


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_and_decoder_are_both_compressed(name: str) -> None:
    model = tiny_architecture(name)
    layout = find_layout(model)
    linears = {each for each, module in model.named_modules() if is_linear(module) and each != "lm_head"}
    assert set(layout.linears) == linears
    assert layout.coverage == 1
    assert len(layout.blocks) == 4
    assert ["encoder" in block for block in layout.blocks] == [True, True, False, False]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_of_a_vision_language_model_the_language_part_is_compressed(name: str) -> None:
    """Even where the tower is larger; what is left is counted and said."""
    model = tiny_architecture(name)
    layout = find_layout(model, min_coverage=1.0)
    assert all("language_model" in block for block in layout.blocks)
    assert len(layout.linears) == 14
    tower = sum(entry.parameters for entry in layout.left_dense if entry.reason == NO_TEXT)
    taken = sum(target.out_features * target.in_features for target in layout.targets)
    assert tower > taken
    assert layout.coverage == taken / (taken + tower)
    assert "text does not pass through (nontext_modules=True" in layout.describe_left_dense()


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
@pytest.mark.parametrize("given", [True, False])
def test_the_tower_is_compressed_on_request(name: str, given: bool) -> None:
    model = tiny_architecture(name)
    batch = image_text_batches(name, 1)[0] if given else None
    layout = find_layout(model, nontext=True, batch=batch)
    linears = {each for each, module in model.named_modules() if is_linear(module) and each != "lm_head"}
    assert set(layout.linears) == linears
    assert layout.coverage == 1


def test_a_batch_alone_does_not_add_the_tower() -> None:
    model = tiny_architecture("llava")
    layout = find_layout(model, batch=image_text_batches("llava", 1)[0])
    assert list(layout.linears) == list(find_layout(model).linears)


def test_linears_outside_the_blocks_are_counted_and_said() -> None:
    model = tiny("opt", word_embed_proj_dim=16)
    layout = find_layout(model)
    assert {entry.name for entry in layout.left_dense} == {"model.decoder.project_in", "model.decoder.project_out"}
    assert layout.describe_left_dense() == f"{2 * 16 * 32:,} parameters {OUTSIDE}"
    assert layout.coverage < 1


@pytest.mark.parametrize("name", ["mamba", "jamba"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_that_code_reads_are_left_dense_and_said(name: str, device: str) -> None:
    layout = find_layout(tiny_architecture(name).to(device))
    read = [entry.name for entry in layout.left_dense if entry.reason == READ]
    assert len(read) == 2
    assert all(each.endswith(".dt_proj") for each in read)
    assert not set(read) & set(layout.linears)
    assert any(each.endswith(".x_proj") for each in layout.linears)


def test_a_linear_that_no_token_reaches_is_not_read() -> None:
    class Routed(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            return self.down(self.up(hidden)) if bool((hidden != 0).any()) else hidden.to(self.up.weight.dtype)

    class Model(Written):
        def hold(self, blocks: list[Block]) -> None:
            self.layers = nn.ModuleList([Routed(), Routed()])

    assert len(find_layout(Model()).linears) == 4


def test_figures_outlive_the_linears() -> None:
    """A run that frees memory deletes linears as it replaces them."""
    layout = find_layout(tiny("llama"), ["layers.0"])
    before = (layout.coverage, layout.targets, layout.describe_left_dense(), layout.other_bytes)
    layout.linears.clear()
    assert (layout.coverage, layout.targets, layout.describe_left_dense(), layout.other_bytes) == before
    assert layout.coverage == 1


def test_weights_and_modules_are_as_before_the_trial() -> None:
    model = tiny_architecture("jamba").train()
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    layout: Layout = find_layout(model)
    assert layout.linears
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before
    assert all(module.training and "forward" not in vars(module) for module in model.modules())


def test_a_model_that_cannot_be_tried_is_taken_by_its_embeddings(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_architecture("llava")
    model.model.forward = None
    layout = find_layout(model)
    assert all("language_model" in block for block in layout.blocks)
    assert "LlavaForConditionalGeneration could not be tried on a tiny window" in caplog.text
