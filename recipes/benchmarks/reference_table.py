"""Perplexity of every method at several ratios, all from one calibration pass: the table in `recipes/RESULTS.md`.

    python recipes/benchmarks/reference_table.py --model DIR_OR_ID --dataset TRAIN_TEXT \
        --eval-dataset wiki.test.raw c4.jsonl.gz --out results.jsonl [--work DIR]

8-bit rows are for `--dtype bfloat16`: bytes count against those of the dense model in its own dtype.

Statistics are collected once and kept in the work folder, with the singular values that ranks are allocated by.
Finished rows are appended to the results; rows that are there with the same settings are skipped, so a killed run goes
on where it was. Ends with a table.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer
from optimum_dobisvd.calibration.dataset import read_text
from optimum_dobisvd.evaluation.perplexity import perplexity
from optimum_dobisvd.report.training_pictures import predictions_picture

# Cheap enough for two cores: a step of this mode decomposes every activation.
ACTIVATION = {"seqlen": 256, "windows": 1, "steps": 16, "evaluate_every": 4}

# Name in the table -> what it changes in the config. `svd_llm_v2, uniform` has the factors of V2 without its ranks.
ROWS = {
    "svd": {"method": "svd"},
    "asvd": {"method": "asvd"},
    "svd_llm": {"method": "svd_llm"},
    "svd_llm_v2, uniform": {"method": "svd_llm_v2", "allocation": "uniform"},
    "output_pca": {"method": "output_pca"},
    "svd_llm_v2": {"method": "svd_llm_v2"},
    "kfac, uniform": {"method": "global", "allocation": "uniform"},
    "global": {"method": "global"},
    "global, two factors": {"method": "global", "structure": "low_rank"},
    "dobi, fixed basis": {"method": "global", "allocation": "dobi_fixed_basis"},
    "dobi, fixed basis, two factors": {
        "method": "global",
        "allocation": "dobi_fixed_basis",
        "structure": "low_rank",
    },
    "dobi without remapping, untrained": {
        "method": "dobi_no_remap",
        "allocation": "uniform",
        "factorization": "output_pca",
    },
    "dobi without remapping": {"method": "dobi_no_remap", "factorization": "output_pca", "training": ACTIVATION},
    "uniform, remap": {"method": "output_pca", "quantization": "remap"},
    "global, remap": {"method": "global", "quantization": "remap"},
    "global, int8": {"method": "global", "quantization": "int8"},
    "dobi": {"method": "dobi", "factorization": "output_pca", "training": ACTIVATION},
    "dobi, remap, fixed basis": {"method": "global", "allocation": "dobi_fixed_basis", "quantization": "remap"},
}


def load(args: argparse.Namespace) -> tuple:
    """Load the dense model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    return model, AutoTokenizer.from_pretrained(args.model)


def evaluate(model: torch.nn.Module, tokenizer: object, texts: dict[str, str], windows: int) -> dict[str, float]:
    """Return perplexity by text, computed in float32 whatever the weights are stored in."""
    model.to(torch.float32)
    return {
        name: round(perplexity(model, tokenizer, text, seqlen=1024, windows=windows), 3)
        for name, text in texts.items()
    }


def measure(row: dict, ratio: float, texts: dict[str, str], args: argparse.Namespace) -> dict:
    """Compress once; returns perplexities by text, seconds and ratio of bytes."""
    model, tokenizer = load(args)
    calibration = {"nsamples": args.nsamples, "seqlen": args.seqlen, "seed": args.seed, "dataset": args.dataset}
    quantizer = DobiSVDQuantizer(
        DobiSVDConfig(**row, ratio=ratio, **calibration, statistics=str(args.work / "statistics"))
    )
    started = time.perf_counter()
    quantizer.quantize_model(model, tokenizer)
    seconds = round(time.perf_counter() - started, 1)
    report = quantizer.report
    return {
        "perplexity": evaluate(model, tokenizer, texts, args.eval_windows),
        "seconds": seconds,
        "stages": report.seconds,
        "bytes": report.target_bytes / report.dense_target_bytes,
        "predicted": report.predicted_increase,
    }


def print_table(rows: list[dict], texts: list[str], ratios: list[float]) -> None:
    """Print Markdown: a line per method, a column per text, ratios side by side."""
    by_key = {(row["row"], row["ratio"]): row["perplexity"] for row in rows}
    heads = [f"{text}, keep {' / '.join(f'{ratio:g}' for ratio in ratios)}" for text in texts]
    print("| method | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for name in ROWS:
        known = [by_key.get((name, ratio)) for ratio in ratios]
        cells = [" / ".join(f"{found[text]:.4g}" if found else "–" for found in known) for text in texts]
        print(f"| {name} | " + " | ".join(cells) + " |")


def draw(rows: list[dict], path: Path) -> None:
    """Draw predicted against measured increase of the loss on the first text, for all rows that have a prediction."""
    text = next(iter(rows[0]["perplexity"]))
    dense = next(row["perplexity"][text] for row in rows if row["row"] == "dense")
    points = [
        (f"{row['row']} {row['ratio']:g}", row["predicted"], math.log(row["perplexity"][text] / dense))
        for row in rows
        if row.get("predicted")
    ]
    predictions_picture(points, path, title=f"predicted by importance scores, and measured on {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True, help="calibration text (train)")
    parser.add_argument("--eval-dataset", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True, help="results, one JSON object a line")
    parser.add_argument("--work", type=Path, default=Path("reference-table-work"))
    parser.add_argument("--picture", type=Path, help="draw predicted against measured increases of the loss")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--nsamples", type=int, default=96)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-windows", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    texts = {Path(name).name: read_text(name, "test") for name in args.eval_dataset}
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    wanted = [("dense", 1.0), *((name, ratio) for ratio in args.ratios for name in args.rows)]
    for name, ratio in wanted:
        settings = {**ROWS.get(name, {}), "nsamples": args.nsamples, "seqlen": args.seqlen, "seed": args.seed}
        if any((done["row"], done["ratio"], done.get("settings")) == (name, ratio, settings) for done in rows):
            continue
        if name == "dense":
            found = {"perplexity": evaluate(*load(args), texts, args.eval_windows)}
        else:
            found = measure(ROWS[name], ratio, texts, args)
        rows.append({"row": name, "ratio": ratio, "settings": settings, **found})
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(rows[-1]), flush=True)
    now = {"nsamples": args.nsamples, "seqlen": args.seqlen, "seed": args.seed}
    rows = [row for row in rows if row.get("settings") == {**ROWS.get(row["row"], {}), **now}]
    print_table(rows, list(texts), args.ratios)
    if args.picture is not None:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
