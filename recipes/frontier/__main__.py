"""The frontier: what every way to make a model smaller costs and gives, in one table and one picture.

    python -m recipes.frontier --model DIR_OR_ID --dataset TRAIN_TEXT --eval-dataset TEXT TEXT --data-dir TASK_FILES

Run from the checkout. Every row is one checkpoint (`rows.py`), measured as it is and healed: bytes on disk and in
memory, perplexity of the texts, mean accuracy of eight tasks, milliseconds per token. Each is a process of its own
and appends its figures to results.jsonl; figures that are there with the same settings are not taken again, so a
killed run goes on where it was. Ends with frontier.md and frontier.png in the folder of the results.

`--rows` and `--steps` do a part. Speeds want a quiet machine: do them last, `--steps speed`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from .results import Results
from .rows import ROWS, Row, row_named
from .settings import Settings

STEPS = ("sizes", "perplexity", "accuracy", "speed")
_HERE = Path(__file__).parent


def main(argv: list[str]) -> int:
    """Do what is missing, a process for each row and state; returns 1 if one failed."""
    arguments = _arguments(argv)
    settings = _settings(arguments)
    results = Results(arguments.results, settings)
    if arguments.one is not None:
        name, state, *steps = arguments.one
        _measure(row_named(name), state == "healed", steps, settings, results)
        return 0
    failed = []
    for row, healed, steps in _missing(arguments, results):
        if in_new_process([*argv, "--one", row.name, "healed" if healed else "plain", *steps]):
            failed.append(f"{row.name}{' healed' if healed else ''}")
            print(f"FAILED {failed[-1]}", flush=True)
    from .show import draw, write_table

    results = Results(arguments.results, settings)
    write_table(results, settings, arguments.results.parent / "frontier.md")
    draw(results, settings, arguments.results.parent / "frontier.png")
    print("\n".join([f"{len(results.lines)} figures in {arguments.results}", *(f"failed: {each}" for each in failed)]))
    return 1 if failed else 0


def _missing(arguments: argparse.Namespace, results: Results) -> Iterator[tuple[Row, bool, list[str]]]:
    """Yield steps still to be done: first those of all rows as they are, so that a part of a run is of use."""
    rows = [row_named(name) for name in arguments.rows] if arguments.rows else list(ROWS)
    states = [state == "healed" for state in arguments.states]
    for healed in states:
        for row in rows:
            steps = [step for step in arguments.steps if results.found(row, healed, step) is None]
            if steps:
                yield row, healed, steps


def _measure(row: Row, healed: bool, steps: list[str], settings: Settings, results: Results) -> None:
    """Make what is measured, if it is not there, and measure it."""
    from .make import base_model, checkpoint_of, heal, is_made, make
    from .measure import MEASURES, speeds

    work = Path(settings.work).resolve()  # an adapter names the folder of the checkpoint below it
    for needed in _needed(row):
        if not is_made(needed, work, settings):
            results.add(needed, False, "make", _timed(partial(make, needed, work, settings)))
    folder = checkpoint_of(row, work, healed)
    if healed and not is_made(row, work, settings, healed=True):
        if steps == ["speed"]:
            # Longer training gives other values in the same encoding, which take the same time.
            briefly = replace(settings, heal_steps=1)
            if not is_made(row, work, briefly, healed=True):
                heal(row, work, briefly)
        else:
            results.add(row, True, "make", _timed(partial(heal, row, work, settings)))
    for step in steps:
        if step == "speed":
            found = speeds(folder, Path(base_model(row.base, work, settings)), settings)
        else:
            found = MEASURES[step](folder, settings)
        results.add(row, healed, step, found)
        print(f"{row.name}{' healed' if healed else ''}: {step} {json.dumps(found)[:300]}", flush=True)


def _needed(row: Row) -> list[Row]:
    """Return the rows whose checkpoints this one needs, its own last."""
    below = row.options.get("on")
    return [*([row_named(below)] if below else []), row]


def _timed(call: Callable[[], None]) -> dict[str, Any]:
    started = time.perf_counter()
    call()
    return {"seconds": round(time.perf_counter() - started)}


def in_new_process(argv: list[str]) -> int:
    """Run `main` with memory of its own; returns the exit status."""
    return subprocess.run([sys.executable, "-m", "recipes.frontier", *argv]).returncode


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True, help="train text, to calibrate and to heal on")
    parser.add_argument("--eval-dataset", nargs="+", required=True, help="texts to evaluate on")
    parser.add_argument("--data-dir", required=True, help="the tasks' files, see recipes/README.md")
    parser.add_argument("--work", default="frontier-work", help="checkpoints")
    parser.add_argument("--statistics", help="of an earlier run on the same text")
    parser.add_argument("--device", default="cpu", help="where to compute, e.g. cuda (default: cpu)")
    parser.add_argument("--results", type=Path, default=_HERE / "results.jsonl")
    parser.add_argument("--rows", nargs="+", help="by name; default all")
    parser.add_argument("--states", nargs="+", choices=("plain", "healed"), default=("plain", "healed"))
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=STEPS)
    numbers = parser.add_argument_group("numbers", "what they are: recipes/frontier/settings.py")
    for field in fields(Settings):
        if isinstance(field.default, int | float):
            numbers.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _settings(arguments: argparse.Namespace) -> Settings:
    names = {field.name for field in fields(Settings)}
    values = {name: value for name, value in vars(arguments).items() if name in names}
    return Settings(**{**values, "eval_dataset": tuple(arguments.eval_dataset)})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
