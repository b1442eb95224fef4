"""Tokens a second of compressed checkpoints beside the dense model, served by vLLM.

    python recipes/benchmarks/vllm_throughput.py DENSE COMPRESSED [COMPRESSED ...] [--eager] [--rounds 3] [--json FILE]

To be run with the Python of an environment that has vLLM and this package (`make test-vllm` makes one, `.venv-vllm`).
Every turn is a process of its own, which loads one model, warms it up and measures every batch several times; in every
round each model has its turn, and the dense one two, each round beginning with another. What is printed are medians
over the rounds; what the two turns of the dense model differ by is noise.

`generated` are new tokens a second, prompts included in the time; `decode` is one step, all requests of the batch
together, in ms: what is left of the time when that of the prompts alone is taken off. Times dense in brackets.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

AGAIN = "again"
MARK = "MEASURED "


def main() -> None:
    arguments = parsed()
    if arguments.turn:
        print(MARK + json.dumps(one_turn(arguments)), flush=True)
        return
    rows = [*arguments.models, AGAIN]
    found: dict[str, list[list[dict[str, float]]]] = defaultdict(list)
    for number in range(arguments.rounds):
        for row in rows[number % len(rows) :] + rows[: number % len(rows)]:
            found[row].append(in_a_process(arguments.models[0] if row == AGAIN else row))
            print(f"round {number + 1} of {arguments.rounds}: {row}", file=sys.stderr)
    results = {row: medians(turns) for row, turns in found.items()}
    print_table(results, rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"arguments": sys.argv[1:], "rows": results}, indent=2) + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="the dense model, then compressed ones: folders or ids"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of every prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="in every turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of one process on a CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_process(model: str) -> list[dict[str, float]]:
    """Measure one model in a process of its own, with the options of this one."""
    arguments = parsed()
    options = [each for each in sys.argv[1:] if each not in arguments.models]
    command = [sys.executable, __file__, model, *options, "--turn"]
    threads = {"OMP_NUM_THREADS": str(arguments.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # Else the engine is a process of its own, and both turn round while they wait: on few cores for each other's.
    threads["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
    done = subprocess.run(command, env={**os.environ, **threads, **quiet}, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if line is None:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    measured: list[dict[str, float]] = json.loads(line.removeprefix(MARK))
    return measured


def one_turn(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Return, for every batch, the batch, tokens a second and milliseconds of a step."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        arguments.models[0],
        dtype=arguments.dtype,
        enforce_eager=arguments.eager,
        max_model_len=arguments.prompt + arguments.new,
        max_num_seqs=max(arguments.batch),
        max_num_batched_tokens=max(2048, arguments.prompt + arguments.new),
        enable_prefix_caching=False,
    )

    def seconds(batch: int, new: int) -> float:
        prompts: Any = [
            {"prompt_token_ids": [5 + (7 * index + 13 * place) % 200 for place in range(arguments.prompt)]}
            for index in range(batch)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    found = []
    for batch in arguments.batch:
        seconds(batch, arguments.new)
        whole = statistics.median(seconds(batch, arguments.new) for _ in range(arguments.repeats))
        prompts_alone = statistics.median(seconds(batch, 1) for _ in range(arguments.repeats))
        step = 1e3 * (whole - prompts_alone) / (arguments.new - 1)
        found.append(
            {"batch": batch, "generated": batch * arguments.new / whole, "decode": step, "first": prompts_alone}
        )
    return found


def medians(turns: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Return the medians over the turns of every number of every batch."""
    return [
        {key: statistics.median(each[key] for each in same) for key in same[0]} for same in zip(*turns, strict=True)
    ]


def print_table(results: dict[str, list[dict[str, float]]], rows: list[str]) -> None:
    dense = results[rows[0]]
    print(f"{'model':40} {'batch':>5} {'generated/s':>16} {'decode, ms':>16} {'prompts, s':>16}")
    for row in rows:
        name = f"{rows[0]} {AGAIN}" if row == AGAIN else row
        for found, beside in zip(results[row], dense, strict=True):
            faster = [
                f"{found[key]:8.3g} ({ratio:.2f})"
                for key, ratio in (
                    ("generated", found["generated"] / beside["generated"]),
                    ("decode", beside["decode"] / found["decode"]),
                    ("first", beside["first"] / found["first"]),
                )
            ]
            print(f"{name[-40:]:40} {found['batch']:5.0f} " + " ".join(f"{each:>16}" for each in faster))
    noise = max(
        max(one[key], other[key]) / min(one[key], other[key]) - 1
        for one, other in zip(dense, results[AGAIN], strict=True)
        for key in ("generated", "decode")
    )
    print(f"noise {noise:.1%}" + (": too much to tell, repeat on an idle machine" if noise > 0.05 else ""))


if __name__ == "__main__":
    main()
