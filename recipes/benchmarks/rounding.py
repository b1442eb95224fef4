"""How codes are chosen, and what structure adds, at equal bytes: the table "Codes that are learned" of RESULTS.md.

    python recipes/benchmarks/rounding.py --model DIR_OR_ID --dataset TRAIN_TEXT --eval-dataset TEXT ... \
        [--statistics DIR] [--results rounding.jsonl] [--auto-round PYTHON] [--rows NAME ...] [--steps 50]

Every row has the bytes of GPTQ with groups of 32 at its bits (2.5: the mean of 2 and 3), codes on asymmetric grids.
What learns or corrects errors reads 64 windows of 512 tokens of the training text. Perplexity: the first 8 windows of
1024 tokens, float32. Rows:

* AutoRound, AutoScheme: auto-round by itself, uniform bits and its own mixture of bits; run by the Python of
  `--auto-round`, which has that package installed; left out without
* uniform: every matrix dense in these bits, by error feedback (GPTQ) or learned
* bits: a mixture of dense matrices in 2, 3, 4 and 8 bits
* structures: a mixture of bits and of dense, low-rank and pivoted matrices
* same plan: the mixture of structures planned for learned codes, by error feedback; after the row that learns them

Rows go to the results as they are finished, and rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoRoundConfig, AutoTokenizer, GPTQConfig

from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer
from optimum_dobisvd.calibration.dataset import load_windows, read_text
from optimum_dobisvd.encodings.base import matrix_of
from optimum_dobisvd.evaluation.perplexity import perplexity
from optimum_dobisvd.structures.base import compressed_linears

GROUP_SIZE, NSAMPLES, SEQLEN = 32, 64, 512
BYTES_OF_BITS = {"2": 0.1632, "2.5": 0.1953, "3": 0.2274, "4": 0.2918}
"""Bytes of the matrices in GPTQ's encoding over those in 16 bits."""
BITS_A_WEIGHT = {bits: 16 * share for bits, share in BYTES_OF_BITS.items()}

# Run by a Python that has auto-round: the model's folder, the tokens, bits (or the mean bits of a mixture), steps.
AUTO_ROUND = """
import sys
import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tokens, texts, kind, bits, steps, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
rows = load_file(tokens)["ids"]
dataset = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
settings = {"iters": int(steps), "nsamples": len(rows), "seqlen": rows.shape[1], "dataset": dataset, "batch_size": 8}
if kind == "AutoScheme":
    schemes = [
        QuantizationScheme(bits=each, group_size=32, sym=False, data_type="int", act_bits=16) for each in (2, 3, 4, 8)
    ]
    settings["scheme"] = AutoScheme(
        avg_bits=float(bits), options=tuple(schemes), nsamples=16, seqlen=rows.shape[1], dataset=texts
    )
    settings["dataset"] = texts  # beside a scheme it takes no tokens
else:
    settings |= {"bits": int(bits), "group_size": 32, "sym": False, "enable_alg_ext": bits == "2"}
tokenizer = AutoTokenizer.from_pretrained(folder)
quantized = AutoRound(
    model, tokenizer=tokenizer, device_map="cpu", enable_torch_compile=False, **settings
).quantize()
quantized = quantized[0] if isinstance(quantized, tuple) else quantized
quantized.to(torch.float32).save_pretrained(out)
"""


@dataclass(frozen=True)
class Row:
    """One way to make the model smaller, at the bytes of these bits."""

    kind: str
    bits: str
    learned: bool
    steps: int = 0

    @property
    def name(self) -> str:
        """In the results; unique."""
        how = f"learned, {self.steps} steps" if self.learned else "error feedback"
        return f"{self.bits} bits, {self.kind}, {how}"

    @property
    def is_auto_round(self) -> bool:
        """Whether auto-round makes it by itself."""
        return self.kind.startswith("Auto")


def all_rows(steps: int) -> list[Row]:
    """Return the rows of the table; the default of 200 steps is for 3 bits alone."""
    rows: list[Row] = []
    for bits in BYTES_OF_BITS:
        whole = "." not in bits
        rows += [Row("AutoRound", bits, True, steps)] * whole
        rows += [Row("AutoScheme", bits, True, steps)]
        rows += [Row("uniform", bits, False), Row("uniform", bits, True, steps)] * whole
        for kind in ("bits", "structures"):
            rows += [Row(kind, bits, False), Row(kind, bits, True, steps)]
        rows += [Row("same plan", bits, False)]
    return [*rows, Row("AutoRound", "3", True, 200), Row("structures", "3", True, 200)]


def encoding_of(row: Row, windows: Tensor) -> Any:
    """Return the quantization of one of our rows, calibrated on these windows."""
    bits = round(float(row.bits) + 0.1)  # 2.5 bits: grids of 3 and their neighbors
    if row.learned:
        return AutoRoundConfig(
            bits=bits, group_size=GROUP_SIZE, sym=False, iters=row.steps, nsamples=NSAMPLES, seqlen=SEQLEN
        )
    return GPTQConfig(
        bits=bits,
        group_size=GROUP_SIZE,
        sym=False,
        desc_act=True,
        act_group_aware=False,
        damp_percent=0.01,
        dataset=list(windows),
    )


def compressed(args: argparse.Namespace, row: Row, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model of one of our rows with plain linears, and what is to be said of it."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    learned_plan = f"{args.results}.{row.bits}-bits-plan.json"
    if row.kind == "same plan":
        how: dict[str, Any] = {"plan": learned_plan}
    else:
        how = {
            "ratio": BYTES_OF_BITS[row.bits]
            + (0.0005 if row.kind == "uniform" else 0),  # which is exact, and no choice
            "structure": {"bits": "dense", "uniform": "dense"}.get(row.kind, "auto"),
            "mixed": row.kind != "uniform",
        }
    windows = load_windows(args.dataset, tokenizer, nsamples=NSAMPLES, seqlen=SEQLEN).input_ids
    config = DobiSVDConfig(
        **how,
        quantization=encoding_of(row, windows),
        dataset=args.dataset,
        nsamples=96,
        seqlen=1024,
        statistics=args.statistics,
    )
    quantizer = DobiSVDQuantizer(config)
    quantizer.quantize_model(model, tokenizer)
    report = quantizer.report
    assert report is not None
    if row.kind == "structures" and row.learned:
        model.dobisvd_plan.save(learned_plan)
    for linear in compressed_linears(model).values():
        for child, each in list(linear.named_children()):
            weight = matrix_of(each)
            bias: Any = each.bias
            plain = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
            plain.weight, plain.bias = nn.Parameter(weight), bias
            linear.set_submodule(child, plain)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype is torch.bfloat16:  # a quantized model refuses to be cast as a whole
            tensor.data = tensor.data.float()
    return model, {"ratio": report.target_bytes / report.dense_target_bytes}


def by_auto_round(args: argparse.Namespace, row: Row, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """Return auto-round's own model, unpacked."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        tokens, texts, out = (str(Path(folder) / name) for name in ("tokens.safetensors", "texts.json", "model"))
        windows = load_windows(args.dataset, tokenizer, nsamples=NSAMPLES, seqlen=SEQLEN)
        save_file({"ids": windows.input_ids.contiguous()}, tokens)
        # Read again they may be a few tokens less, and auto-round drops texts that are shorter than its windows.
        longer = load_windows(args.dataset, tokenizer, nsamples=NSAMPLES, seqlen=SEQLEN + 32)
        rows = [{"text": tokenizer.decode(window)} for window in longer.input_ids]
        Path(texts).write_text(json.dumps(rows), encoding="utf-8")
        bits = f"{BITS_A_WEIGHT[row.bits]:.3f}" if row.kind == "AutoScheme" else row.bits
        given = [args.model, tokens, texts, row.kind, bits, str(row.steps), out]
        subprocess.run([args.auto_round, "-c", AUTO_ROUND, *given], check=True)
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), {}


def main() -> None:
    """Make the rows that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True, help="training text")
    parser.add_argument("--eval-dataset", required=True, nargs="+")
    parser.add_argument("--statistics", help="folder to keep statistics in, or that has them")
    parser.add_argument("--results", default="rounding.jsonl")
    parser.add_argument("--auto-round", help="a Python with auto-round installed")
    parser.add_argument("--rows", nargs="+", help="names of rows; all of them if left out")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()

    results = Path(args.results)
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    rows = [row for row in all_rows(args.steps) if args.rows is None or row.name in args.rows]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for row in rows:
        if any(each["row"] == row.name for each in done):
            continue
        if row.is_auto_round and args.auto_round is None:
            print(f"left out: {row.name} (name a Python that has auto-round with --auto-round)")
            continue
        begin = time.perf_counter()
        model, said = (by_auto_round if row.is_auto_round else compressed)(args, row, tokenizer)
        minutes = (time.perf_counter() - begin) / 60
        found = [
            perplexity(model, tokenizer, read_text(text, "test"), seqlen=1024, windows=8) for text in args.eval_dataset
        ]
        done.append({"row": row.name, **said, "perplexity": found, "minutes": minutes})
        with results.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
    print("| row | bytes of 16 bits | perplexity | minutes |\n|---|---|---|---|")
    for each in done:
        size = f"{each['ratio']:.4f}" if "ratio" in each else "–"
        texts = " / ".join(f"{value:.1f}" for value in each["perplexity"])
        print(f"| {each['row']} | {size} | {texts} | {each['minutes']:.0f} |")


if __name__ == "__main__":
    main()
