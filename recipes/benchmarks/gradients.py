"""Time of gradients and rank training against a plain forward and backward pass of the dense model, in one run.

    python recipes/benchmarks/gradients.py --model DIR_OR_ID --dataset FILE_OR_NAME [--nsamples 8] [--rounds 3]

Plain passes (all weights' gradients, as a fine-tuning step without its optimizer), gradient statistics over the same
windows, and steps of the rank training in both modes take turns, because machines are noisy. Prints one JSON object:
seconds of every round, and ratios of medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dobisvd.allocation.budget import BudgetRequest, open_budget
from optimum_dobisvd.allocation.global_allocation import allocate_globally
from optimum_dobisvd.calibration.backward import BackwardRunner
from optimum_dobisvd.calibration.dataset import CalibrationWindows, load_windows
from optimum_dobisvd.calibration.loss import NextTokenLoss
from optimum_dobisvd.factorization.decompositions import decompositions
from optimum_dobisvd.factorization.factors import Decomposition
from optimum_dobisvd.factorization.registry import FACTORIZATIONS
from optimum_dobisvd.learning.activation import ActivationTruncation
from optimum_dobisvd.learning.directions import DirectionOptimizer
from optimum_dobisvd.learning.fixed_basis import FixedBasis, backward_loss
from optimum_dobisvd.model.layout import Layout, find_layout
from optimum_dobisvd.pipeline.stages import Stages
from optimum_dobisvd.statistics.gradients import GradientCollector
from optimum_dobisvd.statistics.store import StatisticsStore
from optimum_dobisvd.structures.format import format_named


def seconds_of(work: Callable[[], object]) -> float:
    """Return the wall-clock seconds of a call."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def plain_pass(model: torch.nn.Module, windows: CalibrationWindows) -> None:
    """Take all windows forward and backward, one by one; gradients are dropped."""
    for ids, mask in windows.batches(1):
        backward_loss(model, ids, mask)
        model.zero_grad(set_to_none=True)


def gradient_statistics(model: torch.nn.Module, windows: CalibrationWindows, batch_size: int) -> StatisticsStore:
    """Collect the gradient Grams of every linear."""
    layout = find_layout(model)
    store = StatisticsStore({}, list(layout.blocks))
    store.open_gradients({"tokens": windows.input_ids.numel()})
    collector = GradientCollector(layout.linears_of, store.put_gradients, lambda block: True)
    runner = BackwardRunner(model, layout.blocks, windows, batch_size=batch_size)
    runner.run_backward(collector, NextTokenLoss())
    return store


def sliding_step(
    basis: FixedBasis, objective: FixedBasis | ActivationTruncation, share: float, windows: CalibrationWindows
) -> None:
    """Take one derivative of the loss by all ranks, over all windows, as optimizer `adam` takes it."""
    ranks = {name: share * basis.count(name) for name in basis.linears}
    betas = {name: 1 / max(1.0, 0.05 * rank) for name, rank in ranks.items()}
    objective.loss_and_slopes(ranks, betas, windows.input_ids, windows.attention_mask)


def training_steps(
    model: torch.nn.Module,
    layout: Layout,
    found: list[tuple[str, Decomposition]],
    windows: dict[str, CalibrationWindows],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Return the seconds of one step of the rank training in each mode, by its name.

    Args:
        model: the dense model.
        layout: its linears.
        found: their decompositions.
        windows: those of a `step`, and the `short` one of the activation mode.
        args: `ratio` and `share`.
    """
    step, short = windows["step"], windows["short"]
    spectra = {name: each.singular_values for name, each in found}
    request = BudgetRequest(format_named("low_rank", "float"), ratio=args.ratio)
    budget = open_budget(layout.targets, request)
    with FixedBasis(model, layout.linears, found) as basis:
        optimizer = DirectionOptimizer(basis, budget, allocate_globally(budget, spectra), spectra)
        truncation = ActivationTruncation(basis)
        return {
            "fixed_basis": seconds_of(partial(optimizer.step, 0, step.input_ids, step.attention_mask)),
            "fixed_basis_adam": seconds_of(partial(sliding_step, basis, basis, args.share, step)),
            "activation": seconds_of(partial(sliding_step, basis, truncation, args.share, short)),
        }


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--nsamples", type=int, default=8, help="windows of the plain pass and of the statistics")
    parser.add_argument("--step-windows", type=int, default=2, help="of these, windows in a training step")
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--activation-seqlen", type=int, default=256, help="tokens of the one window of that mode")
    parser.add_argument("--ratio", type=float, default=0.6, help="of a step that chooses directions")
    parser.add_argument("--share", type=float, default=0.4, help="ranks of a step with Adam, of the full rank")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval().to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = load_windows(args.dataset, tokenizer, nsamples=args.nsamples, seqlen=args.seqlen)
    few = windows.first(args.step_windows)
    short = CalibrationWindows(
        windows.input_ids[:1, : args.activation_seqlen], windows.attention_mask[:1, : args.activation_seqlen], {}
    )
    layout, svd = find_layout(model), FACTORIZATIONS.get("svd")
    with torch.no_grad():
        found = list(decompositions(layout, svd, None, model.device, layout.linears))
    rounds: dict[str, list[float]] = {}
    stages = Stages()
    for _ in range(args.rounds):
        timed = {
            "plain": seconds_of(lambda: plain_pass(model, windows)),
            "plain_step": seconds_of(lambda: plain_pass(model, few)),
            "plain_short": seconds_of(lambda: plain_pass(model, short)),
        }
        with stages.stage("gradients"):
            timed["gradients"] = seconds_of(lambda: gradient_statistics(model, windows, args.batch_size))
        timed |= training_steps(model, layout, found, {"step": few, "short": short}, args)
        for name, seconds in timed.items():
            rounds.setdefault(name, []).append(round(seconds, 2))
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    result = {
        "nsamples": args.nsamples,
        "seqlen": args.seqlen,
        "tokens_per_step": few.input_ids.numel(),
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "seconds": rounds,
        "gradients_per_plain_pass": round(medians["gradients"] / medians["plain"], 2),
        "fixed_basis_step_per_plain_pass": round(medians["fixed_basis"] / medians["plain_step"], 2),
        "fixed_basis_adam_step_per_plain_pass": round(medians["fixed_basis_adam"] / medians["plain_step"], 2),
        "activation_step_per_plain_pass": round(medians["activation"] / medians["plain_short"], 2),
        "activation_tokens": short.input_ids.numel(),
        "gradients_peak_MiB": stages.peak_bytes["gradients"] >> 20,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
