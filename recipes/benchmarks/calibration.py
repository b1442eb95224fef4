"""Time and memory of a compression against a plain forward pass over the same windows, in one run.

    python recipes/benchmarks/calibration.py --model DIR_OR_ID --dataset FILE_OR_NAME [--nsamples 64] [--seqlen 1024]

Forward passes and statistics passes alternate (F S F S ...), because machines are noisy, and the last statistics pass
goes on to factorize every matrix. Prints one JSON object: seconds, the ratio of medians, and the peak memory of each
stage above what the model takes.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer
from optimum_dobisvd.calibration.dataset import CalibrationWindows
from optimum_dobisvd.calibration.runner import BlockRunner
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.pipeline.stages import Stages
from optimum_dobisvd.statistics.collect import InputCollector
from optimum_dobisvd.statistics.store import StatisticsStore


def forward_pass(model: torch.nn.Module, windows: CalibrationWindows, batch_size: int) -> float:
    """Return the seconds of a plain forward pass, logits included."""
    started = time.perf_counter()
    with torch.inference_mode():
        for ids, _ in windows.batches(batch_size):
            model(input_ids=ids.to(model.device), use_cache=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def statistics_pass(model: torch.nn.Module, windows: CalibrationWindows, batch_size: int) -> tuple[float, int, int]:
    """Return seconds and peak bytes of collecting every Gram, and the bytes of the Grams themselves."""
    layout = find_layout(model)
    store = StatisticsStore({}, list(layout.blocks))
    stages = Stages()
    with stages.stage("statistics"):
        collector = InputCollector(layout.linears_of, store.put, lambda block: True)
        BlockRunner(model, layout.blocks, windows, batch_size=batch_size).run(collector)
    grams = sum(
        inputs.gram.numel() * inputs.gram.element_size()
        for block in layout.blocks
        for inputs in store.block(block).inputs.values()
    )
    return stages.seconds["statistics"], stages.peak_bytes["statistics"], grams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--method", default="svd_llm_v2")
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=1, help="statistics passes beside the one of the compression")
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    settings = {"nsamples": args.nsamples, "seqlen": args.seqlen, "batch_size": args.batch_size, "ratio": args.ratio}
    config = DobiSVDConfig(method=args.method, allocation="uniform", dataset=args.dataset, **settings)
    quantizer = DobiSVDQuantizer(config)
    windows = quantizer.prepare(model, tokenizer).windows

    forward, collected = [forward_pass(model, windows, args.batch_size)], []
    for _ in range(args.runs):
        collected.append(statistics_pass(model, windows, args.batch_size))
        forward.append(forward_pass(model, windows, args.batch_size))
    quantizer.quantize_model(model, tokenizer)
    report = quantizer.report
    collected.append((report.seconds["statistics"], report.peak_bytes["statistics"], 0))
    seconds = statistics.median(run[0] for run in collected)
    print(
        json.dumps(
            {
                **settings,
                "dtype": args.dtype,
                "threads": torch.get_num_threads(),
                "forward_seconds": [round(each, 1) for each in forward],
                "statistics_seconds": [round(run[0], 1) for run in collected],
                "statistics_per_forward": round(seconds / statistics.median(forward), 2),
                "factorization_seconds": report.seconds["factorization"],
                "matrices": len(report.modules),
                "statistics_peak_MiB": max(run[1] for run in collected) >> 20,
                "grams_MiB": max(run[2] for run in collected) >> 20,
                "hidden_states_MiB": (windows.input_ids.numel() * model.config.hidden_size * dtype.itemsize) >> 20,
                "factorization_peak_MiB": report.peak_bytes["factorization"] >> 20,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
