"""The cost of rounding factors to 8 bits, by quantizer and by type of matrix: the tables in `recipes/RESULTS.md`.

    python recipes/benchmarks/quantizers.py --model DIR_OR_ID --dataset TRAIN_TEXT [--eval-dataset TEXT ...] \
        [--method global] [--ratio 0.6] [--work DIR] [--out results.jsonl]

One plan in the encoding `remap` (Dobi-SVD, Alg. 3), one set of factors; every quantizer rounds these, and the products
are evaluated in float32 on windows of the training text that calibration does not see (and on other texts, if some are
named; choose by the former). Quantizers:

* none: the same ranks in 16 bits, so the effect of ranks alone (Table 4's 16-bit row)
* absmax: linear, one scale per rank
* absmax, rows: the same, and one scale per output row; what the package does (Table 4's 8+16-bit row)
* dynamic: the paper's, bitsandbytes' dynamic map with one scale per rank
* absmax 64, dynamic 64: the same maps, a 16-bit scale for every 64 values (3 % more bytes, not counted)
* error-aware: absmax; rounding errors of `first` are passed on along the inputs' second moment, `second` is fitted
  anew to the rounded `first` and rounded the same way (GPTQ, on both factors)
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer
from optimum_dobisvd.calibration.dataset import CalibrationWindows, load_windows, read_text
from optimum_dobisvd.evaluation.perplexity import perplexity
from optimum_dobisvd.factorization.decompositions import PreparedInputs, map_linears
from optimum_dobisvd.factorization.errors import output_error
from optimum_dobisvd.factorization.factors import Decomposition, Factors
from optimum_dobisvd.pipeline.allocate import allocate
from optimum_dobisvd.pipeline.collect import collect
from optimum_dobisvd.pipeline.job import Job
from optimum_dobisvd.statistics.fingerprint import fingerprint
from optimum_dobisvd.structures.format import format_named

Rounding = Callable[[Tensor], Tensor]
"""Vectors (rows) in, the values they are stored as out."""


def linear(rows: Tensor) -> Tensor:
    """Round to 127 equal steps on either side, as far as the largest value of the row."""
    step = rows.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (rows / step).round() * step


def dynamic(rows: Tensor) -> Tensor:
    """Round to bitsandbytes' dynamic map: finer steps for smaller values."""
    from bitsandbytes.functional import create_dynamic_map

    values = create_dynamic_map(signed=True).double()
    largest = rows.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    middles = (values[1:] + values[:-1]) / 2
    return values[torch.bucketize(rows / largest, middles)] * largest


def in_blocks(rounding: Rounding, size: int = 64) -> Rounding:
    """Return the same rounding with a scale for every `size` values of a row."""

    def rounded(rows: Tensor) -> Tensor:
        missing = -rows.shape[1] % size
        padded = torch.nn.functional.pad(rows, (0, missing))
        return rounding(padded.view(-1, size)).view(padded.shape)[:, : rows.shape[1]]

    return rounded


def each_value_alone(
    second: Tensor, first: Tensor, weight: Tensor, gram: Tensor, rounding: Rounding
) -> tuple[Tensor, Tensor]:
    """Round the first min(m, n) rows of both factors; the others are kept."""
    small = min(weight.shape)
    second, first = second.clone(), first.clone()
    second[:small] = rounding(second[:small].T.contiguous()).T
    first[:, :small] = rounding(first[:, :small].contiguous())
    return second, first


def passing_errors_on(rows: Tensor, step: Tensor, gram: Tensor, count: int) -> Tensor:
    """Round the first `count` columns to multiples of `step`, each error made up for by the later columns (GPTQ).

    Args:
        rows: r x c.
        step: broadcastable to `rows`, column by column.
        gram: c x c, second moment of what the columns are multiplied with.
        count: columns to round.
    """
    rows = rows.clone()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    steps = step.expand_as(rows)
    for column in range(count):
        values, by = rows[:, column], steps[:, column]
        rounded = (values / by).round().clamp(-127, 127) * by
        error = (values - rounded) / upper[column, column]
        rows[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
        rows[:, column] = rounded
    return rows


def error_aware(second: Tensor, first: Tensor, weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Round both factors with their errors passed on, see above."""
    small = min(weight.shape)
    step = first[:, :small].abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    first = passing_errors_on(first, step, gram, small)
    middle = first @ gram @ first.T  # second moment of the ranks
    damped = middle + 1e-9 * middle.diagonal().mean() * torch.eye(len(middle), dtype=middle.dtype)
    second = torch.linalg.solve(damped, first @ gram @ weight.T).T
    step = second[:small].abs().amax(0, keepdim=True).clamp_min(1e-30) / 127
    second[:small] = passing_errors_on(second[:small], step, middle, len(middle))
    return second, first


def as_shipped(second: Tensor, first: Tensor, weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Round as the package does for a bfloat16 model."""
    format = format_named("low_rank", "remap")
    weights = format.structure.written(Factors(second, first), format.encoding.gauge, torch.bfloat16)
    _, matrices = format.quantize(weights, None, torch.bfloat16, min(weight.shape))
    return matrices["second"], matrices["first"]


QUANTIZERS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "none": lambda second, first, weight, gram: (second, first),
    "absmax": lambda *given: each_value_alone(*given, linear),
    "absmax, rows": as_shipped,
    "dynamic": lambda *given: each_value_alone(*given, dynamic),
    "absmax 64": lambda *given: each_value_alone(*given, in_blocks(linear)),
    "dynamic 64": lambda *given: each_value_alone(*given, in_blocks(dynamic)),
    "error-aware": error_aware,
}


@dataclass
class Rounded:
    """What one quantizer made of all factors.

    Attributes:
        products: the matrices that the rounded factors stand for, by name, float32.
        errors: relative errors of outputs, by type of matrix.
        seconds: of all roundings.
    """

    products: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    seconds: float = 0.0


def round_all(model: Any, job: Job, quantizers: list[str]) -> dict[str, Rounded]:
    """Return what every quantizer makes of the factors of one plan."""
    assert job.windows is not None
    store = collect(model, job, job.windows, fingerprint(model, job.windows))
    plan = allocate(job, store)
    ranked = [name for name, module in plan.modules.items() if module.rank is not None]
    found = {quantizer: Rounded() for quantizer in quantizers}
    row, linears = job.method.factorizer, job.layout.linears

    def decompose(name: str, inputs: PreparedInputs) -> tuple[str, Decomposition, Tensor | None]:
        return name, row.decompose(linears[name].weight.detach(), inputs.of(name)), inputs.gram(name)

    for name, decomposition, gram in map_linears(job.layout, row, store, job.device, ranked, decompose):
        weight = linears[name].weight.detach().double()
        factors = decomposition.keep(plan.modules[name].kept).balanced()
        for quantizer, rounded in found.items():
            started = time.perf_counter()
            second, first = QUANTIZERS[quantizer](factors.second.double(), factors.first.double(), weight, gram)
            rounded.seconds += time.perf_counter() - started
            product = second.double() @ first.double()
            lost, total = output_error(factors.product().double(), product, gram)
            rounded.errors[name.rsplit(".", 1)[-1]].append(lost / total)
            rounded.products[name] = product.float()
    return found


def held_out_loss(model: torch.nn.Module, ids: Tensor) -> float:
    """Return nats per token."""
    losses = [float(model(input_ids=window[None], labels=window[None], use_cache=False).loss) for window in ids]
    return round(math.fsum(losses) / len(losses), 5)


def windows_of(args: argparse.Namespace, tokenizer: Any) -> tuple[CalibrationWindows, CalibrationWindows]:
    """Draw the windows to calibrate on and those held out: together, so that none is in both."""
    drawn = load_windows(
        args.dataset, tokenizer, nsamples=args.nsamples, seqlen=args.seqlen, seed=0, held_out=args.held_out
    )
    return drawn.split(args.held_out)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True, help="calibration text (train)")
    parser.add_argument("--eval-dataset", nargs="+", default=[])
    parser.add_argument("--method", default="global")
    parser.add_argument("--ratio", type=float, default=0.6)
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=list(QUANTIZERS))
    parser.add_argument("--work", default="quantizers-work", help="statistics, kept")
    parser.add_argument("--out", type=Path, default=Path("quantizers.jsonl"))
    parser.add_argument("--nsamples", type=int, default=96)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--held-out", type=int, default=8)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = arguments()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    draw = {"nsamples": args.nsamples, "seqlen": args.seqlen}
    config = DobiSVDConfig(method=args.method, quantization="remap", ratio=args.ratio, statistics=args.work, **draw)
    windows, held_out = windows_of(args, tokenizer)
    job = DobiSVDQuantizer(config).prepare(model, tokenizer, windows)
    found = round_all(model, job, args.quantizers)
    model = model.to(torch.float32)
    texts = {Path(name).name: read_text(name, "test") for name in args.eval_dataset}
    for quantizer, rounded in found.items():
        for name, product in rounded.products.items():
            job.layout.linears[name].weight.copy_(product)
        result = {
            "method": args.method,
            "ratio": args.ratio,
            "quantizer": quantizer,
            "held_out_loss": held_out_loss(model, held_out.input_ids),
            "perplexity": {
                name: round(perplexity(model, tokenizer, text, seqlen=1024, windows=8), 3)
                for name, text in texts.items()
            },
            "error": {kind: sum(values) / len(values) for kind, values in rounded.errors.items()},
            "seconds": round(rounded.seconds, 1),
        }
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
