"""What a structure costs: errors of its roundings on a real model, and speed on layers as wide as real ones.

    python recipes/benchmarks/structures.py errors --model DIR_OR_ID --dataset TRAIN_TEXT [--statistics DIR]
    python recipes/benchmarks/structures.py speed [--dtype float32 bfloat16] [--rows 1 512] [--device cuda]

`errors`: of pivoted rows against the factors that they stand for, relative, on the calibration inputs; median and
largest over all matrices of a model; in float32, bfloat16 and int8, with the refit and without. Beside it those of two
factors. Ranks are those at which a structure keeps `--keep` of a matrix's numbers.

`speed`: dense, two factors and pivoted rows of equal bytes by turns; medians of milliseconds, and times dense.
"""

import argparse
import statistics
import time
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer
from optimum_dobisvd.factorization.decompositions import PreparedInputs, map_linears
from optimum_dobisvd.factorization.factors import Factors
from optimum_dobisvd.pipeline.collect import collect
from optimum_dobisvd.statistics.fingerprint import fingerprint
from optimum_dobisvd.structures.format import Format, format_named

STRUCTURES = ("low_rank", "pivoted")


def rank_at(format: Format, m: int, n: int, keep: float, multiple: int = 1) -> int:
    """Return the largest rank with at most that share of the matrix's numbers."""
    ranks = range(multiple, min(m, n), multiple)
    return max(rank for rank in ranks if format.macs(m, n, rank) <= keep * m * n or rank == multiple)


def relative_error(format: Format, factors: Factors, dtype: torch.dtype, gram: Tensor, *, refit: bool) -> float:
    """Return the error of what is stored against the factors, relative, on inputs with that Gram."""
    full_rank = min(len(factors.second), factors.first.shape[1])
    weights = format.structure.written(factors, format.encoding.gauge, dtype)
    _, matrices = format.quantize(weights, None, dtype, full_rank, gram if refit else None)
    exact = factors.product()
    error = format.structure.product({name: each.to(gram) for name, each in matrices.items()}) - exact
    return float(((error @ gram * error).sum() / (exact @ gram * exact).sum()).sqrt())


@torch.no_grad()
def errors(args: argparse.Namespace) -> None:
    """Print the table of errors."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    settings: dict[str, Any] = {"nsamples": args.nsamples, "seqlen": args.seqlen, "statistics": args.statistics}
    quantizer = DobiSVDQuantizer(DobiSVDConfig(ratio=args.keep, dataset=args.dataset, **settings))
    job = quantizer.prepare(model, AutoTokenizer.from_pretrained(args.model))
    assert job.windows is not None
    store = collect(model, job, job.windows, fingerprint(model, job.windows))
    found: dict[tuple[str, str], list[float]] = defaultdict(list)

    def measure(name: str, inputs: PreparedInputs) -> dict[tuple[str, str], float]:
        weight = job.layout.linears[name].weight.detach()
        decomposition, gram = job.method.factorizer.decompose(weight, inputs.of(name)), inputs.gram(name)
        assert gram is not None
        measured = {}
        for structure in STRUCTURES:
            factors = decomposition.truncate(rank_at(format_named(structure, "float"), *weight.shape, args.keep))
            for encoding, dtype in (("float", torch.float32), ("float", torch.bfloat16), ("int8", torch.bfloat16)):
                what = "int8" if encoding == "int8" else str(dtype).removeprefix("torch.")
                for refit in (True, False) if structure == "pivoted" else (True,):
                    key = structure if refit else f"{structure}, not refitted"
                    format = format_named(structure, encoding)
                    measured[key, what] = relative_error(format, factors, dtype, gram, refit=refit)
        return measured

    for measured in map_linears(job.layout, job.method.factorizer, store, None, job.layout.linears, measure):
        for key, error in measured.items():
            found[key].append(error)
    print(f"{len(job.layout.linears)} matrices at keep {args.keep}; relative errors, median (largest)\n")
    print("| structure | stored in | error |\n|---|---|---|")
    for (structure, what), values in found.items():
        print(f"| {structure} | {what} | {statistics.median(values):.2g} ({max(values):.2g}) |")


def layer(format: Format, m: int, n: int, keep: float, device: str, dtype: torch.dtype) -> nn.Module:
    """Return a layer of random weights with that share of the numbers, its rank a multiple of 16."""
    plain = nn.Linear(n, m, bias=False, device="meta", dtype=dtype)
    if format.leaves_as_is:
        new: Any = plain.to_empty(device=device)
    else:
        new = format.empty(plain, rank_at(format, m, n, keep, 16)).to_empty(device=device)
    for weight in new.parameters():
        nn.init.normal_(weight, std=n**-0.5)
    if format.structure.structure == "pivoted":
        order = torch.randperm(m)
        pivots, rest = order[: new.rank].sort().values, order[new.rank :].sort().values
        new.permutation.copy_(torch.cat([pivots, rest]))
    return new


@torch.inference_mode()
def speed(args: argparse.Namespace) -> None:
    """Print the table of speeds."""
    names = {"dense": "dense", **{name: name for name in STRUCTURES}}
    print(f"keep {args.keep}, {args.device}, {torch.get_num_threads()} threads; medians of {args.rounds} rounds\n")
    print(f"| outputs x inputs | dtype | rows | {' | '.join(f'{name}, ms' for name in names)} |")
    print("|---" * (3 + len(names)) + "|")
    for m, n in args.shapes:
        for dtype in (getattr(torch, name) for name in args.dtype):
            make = partial(layer, m=m, n=n, keep=args.keep, device=args.device, dtype=dtype)
            layers = {name: make(format_named(structure, "float")) for name, structure in names.items()}
            for rows in args.rows:
                x = torch.randn(rows, n, dtype=dtype, device=args.device)
                times: dict[str, list[float]] = defaultdict(list)
                for turn in range(args.rounds + 2):
                    for name, module in layers.items():
                        started = time.perf_counter()
                        module(x)
                        if args.device != "cpu":
                            torch.cuda.synchronize()
                        if turn >= 2:
                            times[name].append(time.perf_counter() - started)
                medians = {name: 1000 * statistics.median(found) for name, found in times.items()}
                cells = [f"{taken:.2f} ({medians['dense'] / taken:.2f}x)" for taken in medians.values()]
                print(f"| {m} x {n} | {str(dtype)[6:]} | {rows} | {' | '.join(cells)} |", flush=True)


def shape(text: str) -> tuple[int, int]:
    m, n = text.split("x")
    return int(m), int(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    of_errors = commands.add_parser("errors")
    of_errors.add_argument("--model", required=True)
    of_errors.add_argument("--dataset", required=True)
    of_errors.add_argument("--statistics")
    of_errors.add_argument("--nsamples", type=int, default=96)
    of_errors.add_argument("--seqlen", type=int, default=1024)
    of_errors.add_argument("--keep", type=float, default=0.8)
    of_errors.set_defaults(run=errors)
    of_speed = commands.add_parser("speed")
    of_speed.add_argument(
        "--shapes", type=shape, nargs="+", default=[(4096, 4096), (11008, 4096), (4096, 11008)], metavar="MxN"
    )
    of_speed.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    of_speed.add_argument("--rows", type=int, nargs="+", default=[1, 512])
    of_speed.add_argument("--rounds", type=int, default=15)
    of_speed.add_argument("--keep", type=float, default=0.5)
    of_speed.add_argument("--device", default="cpu")
    of_speed.set_defaults(run=speed)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
