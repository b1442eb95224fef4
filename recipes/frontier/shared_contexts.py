"""lm-eval with each question read once: its answers follow it side by side in the same sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm.auto import tqdm

_PACK = 512  # tokens of one sequence; attention over other questions is masked, and computed all the same
_TOLERANCE = 0.01  # nats of one answer, between two ways to compute it


@dataclass(frozen=True)
class _Question:
    """A context and its continuations, by their places in the list of requests."""

    context: list[int]
    answers: list[tuple[int, list[int]]]

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(answer) - 1 for _, answer in self.answers)


class SharedContextLM(HFLM):
    """`HFLM` for multiple choice in fewer tokens: the same log-likelihoods but for rounding.

    A sequence holds several questions, and after each one its answers; a token sees its own answer and the question
    before it, nothing else, and has the position it would have alone. Logits are computed for answers only.
    The model must take masks of four dimensions and positions, as Llama and its kin do: a few answers are evaluated
    in lm-eval's own way, too, and RuntimeError tells of a model for which the two differ.
    """

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
        questions, too_long = _grouped(requests, self.max_length)
        found: dict[int, tuple[float, bool]] = {}
        if too_long:  # lm-eval cuts their contexts from the left, each for its answer
            alone = super()._loglikelihood_tokens([requests[index] for index in too_long], disable_tqdm, override_bs)
            found.update(zip(too_long, alone, strict=True))
        packs = list(_packed(questions, _PACK))
        size = max(1, int(self.batch_size) // 4)
        batches = [packs[start : start + size] for start in range(0, len(packs), size)]
        with tqdm(total=len(requests), desc="Evaluating answers", disable=disable_tqdm) as bar:
            for number, batch in enumerate(batches):
                evaluated = self._evaluate(batch)
                if number == 0:
                    self._check(requests, evaluated)
                found.update(evaluated)
                bar.update(len(evaluated))
        return [found[index] for index in range(len(requests))]

    def _check(self, requests: Any, evaluated: dict[int, tuple[float, bool]]) -> None:
        """Evaluate a few answers of the first batch, which has the longest questions, in lm-eval's own way, too."""
        some = sorted(evaluated)[:4]
        for index, (alone, _) in zip(
            some, super()._loglikelihood_tokens([requests[index] for index in some], True), strict=True
        ):
            packed = evaluated[index][0]
            if not math.isclose(alone, packed, rel_tol=1e-3, abs_tol=_TOLERANCE):
                raise RuntimeError(
                    f"{type(self.model).__name__} gives an answer {packed:.4f} nats beside other answers and "
                    f"{alone:.4f} alone: it does not follow masks and positions; evaluate it by HFLM"
                )

    @torch.no_grad()
    def _evaluate(self, packs: Sequence[list[_Question]]) -> dict[int, tuple[float, bool]]:
        """Return the log-likelihood of every answer in these sequences, and whether it is the greedy one."""
        batch = _Batch(packs)
        device = self.device
        head = self.model.get_output_embeddings()
        rows, places = (torch.tensor(each, device=device) for each in (batch.rows, batch.places))
        wanted = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][rows, places][None],))
        try:
            logits = self.model(
                input_ids=batch.ids.to(device),
                position_ids=batch.positions.to(device),
                attention_mask=_additive(batch.seen, self.model.dtype).to(device),
                use_cache=False,
            ).logits[0]
        finally:
            wanted.remove()
        targets = torch.tensor(batch.targets, device=device)
        log_likelihoods = -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        greedy = logits.argmax(-1) == targets
        found, start = {}, 0
        for index, length in batch.answers:
            part = slice(start, start + length)
            found[index] = (float(log_likelihoods[part].sum()), bool(greedy[part].all()))
            start += length
        return found


class _Batch:
    """Sequences of questions as tensors: token `ids` and `positions`, `B x T`, and `seen`, `B x T x T`.

    `rows`, `places` and `targets` tell for every token of every answer which output predicts it, in the order of
    `answers`: (request, number of tokens).
    """

    def __init__(self, packs: Sequence[list[_Question]]) -> None:
        length = max(sum(question.length for question in pack) for pack in packs)
        self.ids = torch.zeros(len(packs), length, dtype=torch.int64)
        self.positions = torch.zeros(len(packs), length, dtype=torch.int64)
        # Padding sees itself: a row that sees nothing would be NaN.
        self.seen = torch.eye(length, dtype=torch.bool).repeat(len(packs), 1, 1)
        self.rows: list[int] = []
        self.places: list[int] = []
        self.targets: list[int] = []
        self.answers: list[tuple[int, int]] = []
        for row, pack in enumerate(packs):
            start = 0
            for question in pack:
                self._put(row, start, question)
                start += question.length

    def _put(self, row: int, start: int, question: _Question) -> None:
        context = slice(start, start + len(question.context))
        self._segment(row, context, question.context, 0)
        at = context.stop
        for index, answer in question.answers:
            own = slice(at, at + len(answer) - 1)
            self._segment(row, own, answer[:-1], len(question.context))
            self.seen[row, own, context] = True
            self.rows += [row] * len(answer)
            self.places += [context.stop - 1, *range(own.start, own.stop)]
            self.targets += answer
            self.answers.append((index, len(answer)))
            at = own.stop

    def _segment(self, row: int, where: slice, ids: list[int], first_position: int) -> None:
        number = len(ids)
        self.ids[row, where] = torch.tensor(ids, dtype=torch.int64)
        self.positions[row, where] = torch.arange(first_position, first_position + number)
        self.seen[row, where, where] = torch.ones(number, number, dtype=torch.bool).tril()


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask that every implementation of attention adds, `B x 1 x T x T`."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _grouped(requests: Any, max_length: int) -> tuple[list[_Question], list[int]]:
    """Return requests by context, and those that are longer than the model reads."""
    questions: dict[tuple[int, ...], _Question] = {}
    too_long = []
    for index, (_, context, answer) in enumerate(requests):
        if len(context) + len(answer) > max_length + 1:
            too_long.append(index)
        else:
            questions.setdefault(tuple(context), _Question(context, [])).answers.append((index, answer))
    return list(questions.values()), too_long


def _packed(questions: Sequence[_Question], size: int) -> Iterator[list[_Question]]:
    """Pack questions into sequences of at most `size` tokens, longest first; a longer one is alone in its own."""
    packs: list[tuple[int, list[_Question]]] = []
    for question in sorted(questions, key=lambda each: -each.length):
        for number, (used, pack) in enumerate(packs):
            if used + question.length <= size:
                pack.append(question)
                packs[number] = (used + question.length, pack)
                break
        else:
            packs.append((question.length, [question]))
    return (pack for _, pack in packs)
