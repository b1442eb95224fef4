"""Learned ranks: the budget holds at every step, the best ones are kept, and a killed run goes on."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from integration_tests.allocation.samples import random_spectra
from optimum_dobisvd.allocation import Override, PlannedModule, Target, global_prices, uniform
from optimum_dobisvd.allocation.budget import open_budget
from optimum_dobisvd.allocation.plan import planned_bytes
from optimum_dobisvd.allocation.prices import allocate_by_worth
from optimum_dobisvd.calibration.loss import NotFiniteError
from optimum_dobisvd.learning.adam import AdamMover
from optimum_dobisvd.learning.curve import TrainingCurve
from optimum_dobisvd.learning.directions import DirectionMover
from optimum_dobisvd.learning.settings import RankTraining
from optimum_dobisvd.learning.training import RankLearner

SHAPES = {"q": (64, 64), "v": (16, 64), "up": (96, 64)}
TARGETS = [Target(f"layers.{i}.{kind}", *shape, 2) for i in range(4) for kind, shape in SHAPES.items()]
BATCH = (torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool))


class Bowl:
    """A loss that is the sum of every matrix's weight times the spectrum it loses, in place of a model."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)
        self.linears = dict.fromkeys(weights)
        self.calls: list[dict[str, float | None]] = []
        self.placed: dict[str, PlannedModule] = {}
        self.fail_at: int | None = None
        self.fail: BaseException | None = None
        self.slope = -1.0

    def count(self, name: str) -> int:
        return next(min(t.out_features, t.in_features) for t in TARGETS if t.name == name)

    def value(self, ranks: Mapping[str, float | None]) -> float:
        return sum(w * (1 - (ranks[n] or 1e9) / self.count(n)) ** 2 for n, w in self.weights.items() if ranks[n])

    def loss_and_slopes(
        self, ranks: Mapping[str, float | None], betas: Mapping[str, float], ids: Tensor, mask: Tensor
    ) -> tuple[float, dict[str, float]]:
        if self.fail is not None and len(self.calls) == self.fail_at:
            raise self.fail
        self.calls.append(dict(ranks))
        found = {
            n: 2 * self.slope * self.weights[n] * (1 - rank / self.count(n)) / self.count(n)
            for n, rank in ranks.items()
            if rank is not None
        }
        return self.value(ranks), found

    def put(self, planned: Mapping[str, PlannedModule]) -> None:
        self.placed = dict(planned)

    def loss(self, batches: Any) -> float:
        return self.value({name: module.rank for name, module in self.placed.items()})


def bowl(seed: int = 0) -> Bowl:
    generator = torch.Generator().manual_seed(seed)
    return Bowl({t.name: float(10 ** (2 * torch.rand(1, generator=generator) - 1)) for t in TARGETS})


def learner(
    model: Bowl, ratio: float = 0.5, journal: Path | None = None, start: Any = None, **settings: Any
) -> RankLearner:
    budget = open_budget(TARGETS, ratio, storage="plain")
    begin = start or uniform(open_budget(TARGETS, ratio, storage="plain"))
    training = RankTraining(**settings)
    mover = AdamMover(model, budget, begin, training)
    return RankLearner(model, mover, begin, training, mode="test", journal=journal)  # type: ignore[arg-type]


class Terms:
    """A loss that is a sum over directions: each, while it is left out, costs its worth; and a noise on its gains.

    `worth` is `(1 - t) * linear + (1 - t)^2 * 0.6 * price`: both an open and a shut gate tell of it.
    """

    def __init__(self, spread: float = 0.5, noise: float = 0.0, seed: int = 0, by_matrix: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.spectra = {
            target.name: torch.arange(1, min(target.out_features, target.in_features) + 1, dtype=torch.float64) ** -0.4
            for target in TARGETS
        }
        self.prices = {name: spectrum.double().square() for name, spectrum in self.spectra.items()}
        self.worth = {
            name: prices * torch.randn(len(prices), generator=generator, dtype=torch.float64).mul(spread).exp()
            for name, prices in self.prices.items()
        }
        for worth in self.worth.values():
            worth *= math.exp(by_matrix * float(torch.randn(1, generator=generator)))
        self.linears = dict.fromkeys(self.worth)
        self.noise = noise
        self.calls = 0
        self.fail_at: int | None = None
        self.placed: dict[str, PlannedModule] = {}

    def count(self, name: str) -> int:
        return len(self.worth[name])

    def value(self, planned: Mapping[str, PlannedModule]) -> float:
        return sum(
            float(worth.sum() - worth[list(planned[name].kept)].sum())
            for name, worth in self.worth.items()
            if planned[name].rank is not None
        )

    def loss_and_gains(
        self, planned: Mapping[str, PlannedModule], ids: Tensor, mask: Tensor
    ) -> tuple[float, dict[str, Tensor]]:
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(self.calls)
        self.calls += 1
        gains = {}
        for name, worth in self.worth.items():
            shut = torch.ones_like(worth)
            shut[list(range(len(worth)) if planned[name].rank is None else planned[name].kept)] = 0
            curved = 0.6 * self.prices[name]
            noise = torch.randn(len(worth), generator=generator, dtype=torch.float64) * self.prices[name]
            gains[name] = worth - curved + 2 * curved * shut + self.noise * noise
        return self.value(planned), gains

    def put(self, planned: Mapping[str, PlannedModule]) -> None:
        self.placed = dict(planned)

    def loss(self, batches: Any) -> float:
        return self.value(self.placed)


def direction_learner(
    terms: Terms, ratio: float, journal: Path | None = None, storage: str = "plain", **settings: Any
) -> RankLearner:
    budget = open_budget(TARGETS, ratio, storage=storage, rank_multiple=1)
    start = global_prices(budget, terms.spectra)
    mover = DirectionMover(terms, budget, start, terms.spectra)
    return RankLearner(terms, mover, start, RankTraining(**settings), mode="test", journal=journal)  # type: ignore[arg-type]


def total_bytes(planned: Mapping[str, PlannedModule]) -> int:
    return sum(planned_bytes(target, planned[target.name]) for target in TARGETS)


DENSE = sum(target.dense_bytes for target in TARGETS)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_ranks_move_to_where_the_loss_wants_them_and_the_budget_holds_at_every_step(ratio: float) -> None:
    model = bowl()
    planned, curve = learner(model, ratio, steps=60).run([BATCH], [BATCH])
    losses = [found.loss for found in curve.evaluations]
    assert min(losses) < 0.9 * losses[0]
    assert 0.99 * ratio * DENSE <= total_bytes(planned) <= ratio * DENSE
    for step in curve.steps:
        sizes = [
            rank * (t.out_features + t.in_features) * 2
            for rank, name in zip(step.ranks, curve.names, strict=True)
            for t in TARGETS
            if t.name == name
        ]
        assert sum(sizes) == pytest.approx(int(ratio * DENSE), rel=1e-6)


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("ratio", [0.4, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_directions_that_are_worth_more_than_their_price_are_found(seed: int, ratio: float, noise: float) -> None:
    terms = Terms(noise=noise, seed=seed)
    budget = open_budget(TARGETS, ratio, storage="plain")
    begin = terms.value(global_prices(budget, terms.spectra))
    best = terms.value(allocate_by_worth(budget, terms.worth))
    planned, curve = direction_learner(terms, ratio, steps=30, patience=99).run([BATCH], [BATCH])
    assert best < 0.97 * begin
    assert terms.value(planned) - best < (0.5 if noise else 0.25) * (begin - best)
    assert total_bytes(planned) <= ratio * DENSE
    assert curve.kept == [planned[name].rank for name in curve.names]


@pytest.mark.parametrize("seed", range(3))
def test_prices_that_are_off_by_a_factor_of_the_matrix_are_put_right(seed: int) -> None:
    terms = Terms(spread=0.0, by_matrix=1.0, seed=seed)
    budget = open_budget(TARGETS, 0.6, storage="plain")
    begin = terms.value(global_prices(budget, terms.spectra))
    best = terms.value(allocate_by_worth(budget, terms.worth))
    planned, _ = direction_learner(terms, 0.6, steps=30, patience=99).run([BATCH], [BATCH])
    assert best < 0.9 * begin
    assert terms.value(planned) - best < 0.25 * (begin - best)


def test_a_matrix_that_was_dense_by_mistake_becomes_low_rank() -> None:
    terms = Terms(spread=0.0)
    start = global_prices(open_budget(TARGETS, 0.8, storage="plain"), terms.spectra)
    wrong = next(name for name, module in start.items() if module.rank is None)
    terms.worth[wrong] *= 0.05
    learner = direction_learner(terms, 0.8, steps=20, patience=99)
    learner.run([BATCH], [BATCH])
    assert learner._mover.planned()[wrong].rank is not None


def test_batches_that_say_that_nothing_is_worth_keeping_end_the_training() -> None:
    terms = Terms()
    terms.worth = {name: -worth for name, worth in terms.worth.items()}
    _, curve = direction_learner(terms, 0.5, steps=20, patience=99).run([BATCH], [BATCH])
    assert curve.stopped is not None
    assert curve.stopped.startswith("step 5: by 5 batches in a row the directions at the border")


def test_leading_directions_are_not_bartered_away_whatever_the_gains_say() -> None:
    """Gains are of one direction each: without a bound leading ones fall out together, and a real model breaks."""
    terms = Terms(spread=3.0)
    learner = direction_learner(terms, 0.5, steps=10, patience=99)
    learner.run([BATCH], [BATCH])
    low = [module for module in learner._mover.planned().values() if module.rank is not None]
    assert any(module.directions is not None for module in low)
    # Prices fall as i^-0.8; worths stray from them by e^0.5 either way, so no place beyond e^(1 / 0.8) = 3.49 times.
    assert all(set(range(int(0.28 * len(module.kept)))) <= set(module.kept) for module in low)


def test_noise_alone_moves_next_to_nothing() -> None:
    terms = Terms(spread=0.0, noise=2.0)
    start = terms.value(global_prices(open_budget(TARGETS, 0.5, storage="plain"), terms.spectra))
    learner = direction_learner(terms, 0.5, steps=20, patience=99)
    learner.run([BATCH], [BATCH])
    assert terms.value(learner._mover.planned()) < 1.05 * start


def test_the_scale_of_the_gains_does_not_matter() -> None:
    found = []
    for scale in (1.0, 64.0):
        terms = Terms()
        gains = terms.loss_and_gains
        terms.loss_and_gains = lambda *a, gains=gains, scale=scale: (  # type: ignore[method-assign, misc]
            1.0,
            {name: scale * each for name, each in gains(*a)[1].items()},
        )
        terms.spectra = {name: scale**0.5 * spectrum for name, spectrum in terms.spectra.items()}
        found.append(direction_learner(terms, 0.5, steps=6, evaluate_every=6).run([BATCH], [BATCH])[0])
    assert found[0] == found[1]


def test_the_best_ranks_on_the_held_out_windows_are_kept_the_start_among_them() -> None:
    model = bowl()
    model.slope = 1.0  # uphill: every step makes it worse
    planned, curve = learner(model, 0.5, steps=30, evaluate_every=4, patience=3).run([BATCH], [BATCH])
    assert planned == uniform(open_budget(TARGETS, 0.5, storage="plain"))
    assert curve.best == 0
    assert len(curve.steps) == 12
    assert curve.stopped == "no gain on the held-out windows in 3 evaluations"


def test_matrices_that_start_dense_stay_dense_and_are_paid_for() -> None:
    spectra = random_spectra(TARGETS, 0)
    spectra["layers.0.q"] = 1e6 * torch.ones(64, dtype=torch.float64)
    start = global_prices(open_budget(TARGETS, 0.6, storage="plain"), spectra)
    assert start["layers.0.q"].rank is None
    model = bowl()
    planned, curve = learner(model, 0.6, start=start, steps=20).run([BATCH], [BATCH])
    assert planned["layers.0.q"] == PlannedModule(None, "dense")
    place = curve.names.index("layers.0.q")
    assert all(step.ranks[place] is None for step in curve.steps)
    assert all(call["layers.0.q"] is None for call in model.calls)
    assert total_bytes(planned) <= 0.6 * DENSE


def test_overridden_matrices_are_left_alone() -> None:
    overrides = {"layers.1.up": Override(rank=5), "layers.2.up": Override(dense=True)}
    budget = open_budget(TARGETS, 0.5, storage="plain", overrides=overrides)
    start = uniform(open_budget(TARGETS, 0.5, storage="plain", overrides=overrides))
    model = bowl()
    settings = RankTraining(steps=10)
    mover = AdamMover(model, budget, start, settings)
    planned, curve = RankLearner(model, mover, start, settings, mode="test").run([BATCH], [BATCH])  # type: ignore[arg-type]
    assert planned["layers.1.up"] == PlannedModule(5, "plain")
    assert planned["layers.2.up"] == PlannedModule(None, "dense")
    assert not {"layers.1.up", "layers.2.up"} & set(curve.names)
    assert total_bytes(planned) <= 0.5 * DENSE


@pytest.mark.parametrize("killed", [1, 4, 7])
def test_a_killed_training_goes_on_and_ends_alike(tmp_path: Path, killed: int) -> None:
    settings = {"steps": 10, "evaluate_every": 3}
    whole = learner(bowl(), **settings).run([BATCH], [BATCH])
    model = bowl()
    model.fail_at, model.fail = killed, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        learner(model, journal=tmp_path / "j", **settings).run([BATCH], [BATCH])
    model = bowl()
    resumed = learner(model, journal=tmp_path / "j", **settings).run([BATCH], [BATCH])
    assert len(model.calls) == 10 - killed
    assert resumed[0] == whole[0]
    assert resumed[1].to_dict() == whole[1].to_dict()


@pytest.mark.parametrize("killed", [1, 4, 7])
@pytest.mark.parametrize(("storage", "ratio"), [("plain", 0.6), ("remap", 0.6), ("int8", 0.45)])
def test_a_killed_choice_of_directions_goes_on_and_ends_alike(
    tmp_path: Path, storage: str, ratio: float, killed: int
) -> None:
    settings = {"storage": storage, "steps": 10, "evaluate_every": 3}
    whole = direction_learner(Terms(noise=1.0), ratio, **settings).run([BATCH], [BATCH])
    terms = Terms(noise=1.0)
    terms.fail_at = killed
    with pytest.raises(KeyboardInterrupt):
        direction_learner(terms, ratio, tmp_path / "j", **settings).run([BATCH], [BATCH])
    terms = Terms(noise=1.0)
    terms.calls = killed  # the noise goes on where it was
    resumed = direction_learner(terms, ratio, tmp_path / "j", **settings).run([BATCH], [BATCH])
    assert terms.calls == 10
    forms = {module.storage for module in whole[0].values()}
    assert forms >= ({"int8", "dense_int8"} if storage == "int8" else {storage})
    assert total_bytes(whole[0]) <= ratio * DENSE
    assert resumed[0] == whole[0]
    assert resumed[1].to_dict() == whole[1].to_dict()


def test_a_loss_that_turns_nan_ends_the_training_with_the_last_good_ranks() -> None:
    model = bowl()
    model.fail_at, model.fail = 7, NotFiniteError("the loss is nan after 0 tokens of text")
    planned, curve = learner(model, steps=20, evaluate_every=3).run([BATCH], [BATCH])
    assert curve.stopped is not None
    assert curve.stopped.startswith("step 8: the loss is nan")
    assert len(curve.steps) == 7
    assert curve.best == 6
    assert planned != uniform(open_budget(TARGETS, 0.5, storage="plain"))
    assert curve.kept == [planned[name].rank for name in curve.names]


def test_a_loss_that_is_nan_on_the_held_out_windows_only_ends_it_too(tmp_path: Path) -> None:
    model = bowl()
    judged: list[float] = []

    def loss(batches: Any) -> float:
        judged.append(model.value({name: module.rank for name, module in model.placed.items()}))
        if len(judged) == 3:
            raise NotFiniteError("the loss is nan after 7 tokens of text")
        return judged[-1]

    model.loss = loss  # type: ignore[method-assign]
    planned, curve = learner(model, journal=tmp_path / "j", steps=20, evaluate_every=3).run([BATCH], [BATCH])
    assert curve.stopped == "on the held-out windows after step 6: the loss is nan after 7 tokens of text"
    assert (len(curve.steps), curve.best) == (6, 3)
    again, _ = learner(bowl(), journal=tmp_path / "j", steps=20, evaluate_every=3).run([BATCH], [BATCH])
    assert again == planned


def test_an_error_that_is_no_such_thing_is_not_swallowed() -> None:
    model = bowl()
    model.fail_at, model.fail = 2, ValueError("something else")
    with pytest.raises(ValueError, match="something else"):
        learner(model, steps=5).run([BATCH], [BATCH])


@pytest.mark.parametrize("seed", range(20))
def test_adam_never_unmakes_a_dense_matrix(seed: int) -> None:
    spectra = random_spectra(TARGETS, seed)
    for name in list(spectra)[::4]:
        spectra[name] = 1e6 * torch.ones_like(spectra[name])
    start = global_prices(open_budget(TARGETS, 0.7, storage="plain"), spectra)
    dense = [name for name, module in start.items() if module.rank is None]
    planned, _ = learner(bowl(seed), 0.7, start=start, steps=9, evaluate_every=1, patience=99).run([BATCH], [BATCH])
    assert dense
    assert all(planned[name].rank is None for name in dense)


def test_a_gradient_that_is_nan_names_the_matrix() -> None:
    model = bowl()
    model.weights["layers.2.v"] = float("nan")
    model.value = lambda ranks: 1.0  # type: ignore[method-assign]
    _, curve = learner(model, steps=5).run([BATCH], [BATCH])
    assert curve.stopped == "step 1: the gradient of the rank of layers.2.v is not finite"


def test_no_gradient_at_all_is_an_error() -> None:
    model = bowl()
    model.slope = 0.0
    with pytest.raises(ValueError, match="step 1: no rank has a gradient"):
        learner(model, steps=5).run([BATCH], [BATCH])


def test_nothing_to_learn_is_an_error() -> None:
    start = {target.name: PlannedModule(None, "dense") for target in TARGETS}
    with pytest.raises(ValueError, match="no matrix has a rank to learn"):
        learner(bowl(), 1.0, start=start)


@pytest.mark.parametrize("damage", ["", "{}", '{"shares": []}'])
def test_a_damaged_journal_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "j").write_text(damage)
    with pytest.raises(ValueError, match=r"j is damaged .*delete it to train from the start"):
        learner(bowl(), journal=tmp_path / "j")


def test_the_curve_survives_its_file(tmp_path: Path) -> None:
    _, curve = learner(bowl(), steps=4, evaluate_every=2).run([BATCH], [BATCH])
    curve.save(tmp_path)
    assert TrainingCurve.load(tmp_path) == curve
    assert TrainingCurve.load(tmp_path / "elsewhere") is None
    (tmp_path / "dobisvd_training.json").write_text(json.dumps({"mode": "x"}))
    with pytest.raises(ValueError, match=r"dobisvd_training.json is damaged"):
        TrainingCurve.load(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "training: steps must be at least 1"),
        ({"steps": 2.5}, "training: steps must be an integer"),
        ({"learning_rate": 0}, "training: learning_rate is a share"),
        ({"width": 0.1}, "training: width is a pair"),
        ({"width": [0.1, 2]}, "training: width is a share"),
        ({"seqlen": 1}, "training: seqlen must be at least 2"),
        ({"step": 3}, "training: unknown key 'step'; known keys: optimizer, steps"),
    ],
)
def test_impossible_settings_name_the_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        RankTraining.from_dict(values)


def test_settings_survive_json() -> None:
    settings = RankTraining(steps=7, width=(0.2, 0.05), seqlen=64)
    assert RankTraining.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
