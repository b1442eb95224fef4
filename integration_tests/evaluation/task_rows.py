"""Rows in the formats of the eight tasks' data sets, few and short, drawn from a handful of words."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

WORDS = ("the", "cat", "sat", "on", "mat", "while", "dog", "ran", "over", "hill", "state", "of", "union", "spoke")
ROWS = 8
FILES = {
    "piqa": "piqa_valid.jsonl",
    "hellaswag": "hellaswag_val.jsonl.gz",
    "winogrande": "winogrande_xl_valid.jsonl",
    "arc_easy": "arc_easy_test.jsonl",
    "arc_challenge": "arc_challenge_test.jsonl",
    "openbookqa": "openbookqa_test.jsonl",
    "mathqa": "mathqa_test.jsonl",
    "boolq": "boolq_valid.jsonl",
}


def write_rows(folder: Path) -> None:
    """All eight files, HellaSwag's as its task's `process_docs` leaves it."""
    for task, file in FILES.items():
        write_jsonl(folder / file, processed_hellaswag() if task == "hellaswag" else rows_of(task))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def rows_of(task: str) -> list[dict[str, Any]]:
    """The rows of a task as the hub has them."""
    draw = random.Random(task)
    return [_row(task, draw) for _ in range(ROWS)]


def processed_hellaswag() -> list[dict[str, Any]]:
    from datasets import Dataset
    from lm_eval.tasks.hellaswag.utils import process_docs

    rows = process_docs(Dataset.from_list(rows_of("hellaswag")))
    return [{key: row[key] for key in ("query", "choices", "label")} for row in rows]


def _row(task: str, draw: random.Random) -> dict[str, Any]:
    if task == "piqa":
        return {"goal": _words(draw), "sol1": _words(draw), "sol2": _words(draw), "label": draw.randrange(2)}
    if task == "hellaswag":
        endings = [f"{_words(draw)} [title] {_words(draw)}  ." for _ in range(4)]
        context = {"ctx_a": _words(draw), "ctx_b": _words(draw), "activity_label": "Running [header]"}
        return {**context, "endings": endings, "label": str(draw.randrange(4))}
    if task == "winogrande":
        sentence = f'{_words(draw)}, isn\'t _ "{_words(draw)}".'
        return {"sentence": sentence, "option1": "Ann's", "option2": _words(draw), "answer": draw.choice("12")}
    if task == "mathqa":
        options = f"a ) {_words(draw)} , b ) rs . 1 , 200 , c ) 3 / 4 , d ) {_words(draw)} , e ) none of these"
        return {"Problem": _words(draw), "options": options, "correct": draw.choice("abcde")}
    if task == "boolq":
        return {"passage": _words(draw), "question": _words(draw), "label": draw.randrange(2)}
    labels = draw.choice([["A", "B", "C", "D"], ["1", "2", "3", "4"]])
    choices = {"text": [_words(draw) for _ in labels], "label": labels}
    question = "question_stem" if task == "openbookqa" else "question"
    return {question: _words(draw), "choices": choices, "answerKey": draw.choice(labels)}


def _words(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(2, 5)))
