"""Prefill and decode of compressed models beside the dense one, plain and optimized for inference, in one run.

    python recipes/benchmarks/inference.py [--dtype float32 bfloat16] [--compiled] [--rounds 15]

Random weights of a Llama's shape. Every round takes all models by turns, so that what else the machine does falls on
all alike; medians of milliseconds, and times dense. The dense model is there twice: what the two differ by is noise.
`bound` is what the multiply-adds (prefill) or the bytes (decode) of the matrices saved alone would give; a row reaches
its aim with 0.85 of that. Embeddings and head are not compressed; `--vocab-size` says how large they are.

* `low_rank 0.5`: the largest rank, a multiple of 16, that keeps half of each matrix's numbers
* `int8`: of half the numbers, so a quarter of the bytes of 16 bits
* `optimized`: after `optimize_for_inference`; `--compiled`: that and the dense one as one graph each, static cache,
  and times the compiled dense one
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from optimum_dobisvd import optimize_for_inference
from optimum_dobisvd.encodings.registry import encoding_of
from optimum_dobisvd.structures.format import Format
from optimum_dobisvd.structures.registry import STRUCTURES

SHARE = 0.85
"""Of what is saved, what a row is to reach."""


@dataclass(frozen=True)
class Row:
    """One model: structure, encoding, which share of the numbers its linears keep; all None for the dense one."""

    structure: str | None = None
    encoding: str | None = None
    keep: float | None = None
    optimized: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """As the table has it."""
        parts = [self.structure or "dense", self.encoding or "", "" if self.keep is None else f"{self.keep}"]
        return " ".join([*filter(None, parts), *["optimized"] * self.optimized, *["compiled"] * self.compiled])


FLOAT = [(structure, None, keep) for keep in (0.5, 0.4) for structure in ("low_rank", "pivoted")]
SIXTEEN = [("low_rank", "int8", 0.5), ("pivoted", "int8", 0.5), ("dense", "gptq4_g64", None)]


def rows_of(dtype: torch.dtype, *, compiled: bool) -> list[Row]:
    """All rows of one table: 8 and 4 bits beside dense ones in 16."""
    kinds = FLOAT + (SIXTEEN if dtype is torch.bfloat16 else [])
    rows = [Row(), Row(), *(Row(*kind, optimized=optimized) for kind in kinds for optimized in (False, True))]
    if compiled:
        rows += [Row(compiled=True), *(Row(*kind, optimized=True, compiled=True) for kind in kinds)]
    return rows


def rank_at(format: Format, outputs: int, inputs: int, keep: float) -> int:
    """Return the largest rank, a multiple of 16, with at most that share of the matrix's numbers."""
    ranks = range(16, min(outputs, inputs), 16)
    return max(rank for rank in ranks if format.macs(outputs, inputs, rank) <= keep * outputs * inputs)


def fill(module: nn.Module) -> None:
    """Put random numbers of a usual size into a linear's tensors."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor.data, std=0.02)
        else:
            info = torch.iinfo(tensor.dtype)
            tensor.data.random_(info.min + 1, info.max)


@torch.no_grad()
def build(row: Row, config: LlamaConfig, dtype: torch.dtype) -> tuple[Any, float, float]:
    """Return the model, and its matrices' multiply-adds and bytes as shares of the dense model's."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(dtype)
    macs, size, whole = 0, 0, 0
    if row.structure is not None:
        format = Format(STRUCTURES.get(row.structure), encoding_of(row.encoding))
        linears = {name: each for name, each in model.model.named_modules() if isinstance(each, nn.Linear)}
        for name, linear in linears.items():
            shape = (linear.out_features, linear.in_features)
            rank = None if row.keep is None else rank_at(format, *shape, row.keep)
            macs, size = macs + format.macs(*shape, rank), size + format.bytes(*shape, rank, dtype.itemsize)
            whole += linear.weight.numel()
            model.model.set_submodule(name, format.empty(linear, rank))
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for module in list(model.modules()):
        if not list(module.children()):
            fill(module)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for name, wrapper in list(model.named_modules()):
        if row.structure is not None and hasattr(wrapper, "structure"):
            for tensor in wrapper.own().values():
                order = torch.randperm(len(tensor))  # of `pivoted`, whose places are sorted in two runs
                split = order.tensor_split([wrapper.rank])
                tensor.copy_(torch.cat([part.sort().values for part in split]))
            for child, linear in list(wrapper.named_children()):
                groups = getattr(linear, "g_idx", None)
                if groups is not None:
                    groups.data.copy_(torch.arange(len(groups)) // (len(groups) // len(linear.scales)))
                wrapper.set_submodule(child, format.encoding.loaded(f"{name}.{child}", linear))
    model.eval()
    if row.optimized:
        optimize_for_inference(model, rows=(1, 512))
    return (model, macs / whole, size / (whole * dtype.itemsize)) if whole else (model, 1.0, 1.0)


class Timed:
    """A model, and what one prefill and one step of decoding take."""

    def __init__(self, row: Row, config: LlamaConfig, dtype: torch.dtype) -> None:
        self.row, self._config = row, config
        self.model, self.macs, self.bytes = build(row, config, dtype)
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self._call: Callable[..., Any] = self.model
        if row.compiled:
            self._call = torch.compile(self.model, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def round(self, prompt: Tensor, context: int, steps: int, *, counts: bool) -> None:
        """Take the time of one prefill, and of some steps after a short one; `counts` is False while warming up."""
        prefill = self._timed(prompt, self._cache(prompt.shape[1]), 0)
        cache = self._cache(context + steps)
        self._timed(prompt[:, :context], cache, 0)
        decode = [self._timed(prompt[:, :1], cache, context + step) for step in range(steps)]
        if counts:
            self.prefill.append(prefill)
            self.decode += decode

    def _cache(self, length: int) -> Any:
        return StaticCache(config=self._config, max_cache_len=length) if self.row.compiled else DynamicCache()

    def _timed(self, ids: Tensor, cache: Any, at: int) -> float:
        where = torch.arange(at, at + ids.shape[1])[None]
        begun = time.perf_counter()
        self._call(input_ids=ids, position_ids=where, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return 1000 * (time.perf_counter() - begun)


@torch.inference_mode()
def table(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Measure and print one table."""
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
        vocab_size=args.vocab_size,
        attn_implementation="sdpa",
    )
    prompt = torch.randint(2, args.vocab_size, (1, args.prompt))
    torch._dynamo.config.recompile_limit = 1000  # one code of transformers', many models
    timed = [Timed(row, config, dtype) for row in rows_of(dtype, compiled=args.compiled)]
    for turn in range(args.rounds + 1):
        for each in timed:
            each.round(prompt, args.context, args.steps, counts=turn > 0)
    medians: dict[str, list[float]] = defaultdict(list)
    for each in timed:
        medians["prefill"].append(statistics.median(each.prefill))
        medians["decode"].append(statistics.median(each.decode))
    where = f"{torch.get_num_threads()} threads, prompt {args.prompt}, decoding after {args.context}"
    print(f"\n{dtype}, {where}; medians of {args.rounds} rounds\n")
    print("| model | prefill, ms | times dense (bound) | decode, ms a token | times dense (bound) | both reached |")
    print("|---|---|---|---|---|---|")
    dense = {
        each.row.compiled: place for place, each in reversed(list(enumerate(timed))) if each.row.structure is None
    }
    for each, prefill, decode in zip(timed, medians["prefill"], medians["decode"], strict=True):
        beside = dense[each.row.compiled]
        faster = medians["prefill"][beside] / prefill, medians["decode"][beside] / decode
        bounds = 1 / each.macs, 1 / each.bytes
        reached = all(found >= SHARE * bound for found, bound in zip(faster, bounds, strict=True))
        cells = [f"{faster[which]:.2f} ({bounds[which]:.2f})" for which in (0, 1)]
        print(f"| {each.row.name} | {prefill:.1f} | {cells[0]} | {decode:.2f} | {cells[1]} | {reached} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--context", type=int, default=32, help="tokens before those that are decoded")
    parser.add_argument("--steps", type=int, default=5, help="steps of decoding in a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    for name in args.dtype:
        table(args, getattr(torch, name))


if __name__ == "__main__":
    main()
