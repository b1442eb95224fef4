"""What a token takes at least: counted on models whose sizes are known."""

import pytest
import torch

from integration_tests.tiny_models import tiny
from optimum_dobisvd.benchmark.bounds import MachineSpeed, Traffic, bound_of, bytes_needed, traffic_of
from optimum_dobisvd.benchmark.generation import Cell

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_a_token_reads_every_weight_once_and_one_row_of_the_embedding(name: str) -> None:
    model = tiny(name)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    norms = sum(each.numel() for each in model.parameters() if each.dim() == 1)
    found = traffic_of(model, CPU)
    assert found.macs == sum(module.weight.numel() for module in linears)
    assert found.head_macs == head.numel()
    # The frequencies of the rotary embedding are read as well: buffers of half the width of a head, kept twice.
    rotary = sum(each.nbytes for each in model.model.rotary_emb.buffers())
    row = embedding.shape[1]
    assert found.weight_bytes == 4 * (found.macs + norms + row) + rotary
    assert found.cache_bytes == 3 * 2 * 2 * 8 * 4, "three layers, keys and values, two heads of eight, four bytes"


def test_experts_that_a_token_is_not_routed_to_are_not_read() -> None:
    from optimum_dobisvd.model.experts import linearize

    model = tiny("mixtral")
    linearize(model)
    experts = [m for n, m in model.named_modules() if ".experts." in n and isinstance(m, torch.nn.Linear)]
    every = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    unused = sum(m.weight.numel() for m in experts) // 2  # two of four are chosen
    assert traffic_of(model, CPU).macs <= every - unused


def test_the_bound_is_the_slower_of_moving_and_multiplying() -> None:
    traffic = Traffic(weight_bytes=1000, macs=500, head_macs=100, cache_bytes=10, attention_macs=2)
    slow_memory = MachineSpeed(bandwidth=100, flops=1e12)
    cell = Cell(batch=2, prompt=8)
    found = bound_of(traffic, cell, 4, slow_memory)
    assert found.gap == pytest.approx((1000 + 2 * 10 * 10) / 100), "weights, and the cache of ten tokens on average"
    assert found.first == pytest.approx((1000 + 2 * 8 * 10) / 100)
    slow_products = MachineSpeed(bandwidth=1e12, flops=100)
    found = bound_of(traffic, cell, 4, slow_products)
    assert found.gap == pytest.approx(2 * 2 * (500 + 10 * 2) / 100)
    # The head sees the last token alone, and a token looks back at half of the prompt on average.
    assert found.first == pytest.approx(2 * 2 * (8 * 400 + 100 + 8 * 4 * 2) / 100)


def test_a_window_ends_what_attention_reads() -> None:
    traffic = Traffic(1000, 500, 100, 10, 2, window=3)
    found = bound_of(traffic, Cell(1, 100), 4, MachineSpeed(1, 1e12))
    assert found.gap == pytest.approx(1000 + 3 * 10)


def test_a_generation_needs_more_the_more_sequences_and_tokens_it_has() -> None:
    model = tiny("llama")
    one = bytes_needed(model, Cell(1, 16), 4)
    assert 0 < one < bytes_needed(model, Cell(2, 16), 4) < bytes_needed(model, Cell(2, 64), 4)
    cache = 3 * 2 * 16 * 20 * 4
    assert one > cache
