"""The pictures: real PNGs of a sensible size, for every architecture's names; not drawn for lack of matplotlib."""

import builtins
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integration_tests.report.made_up_reports import EXPERTS, GPT2, LLAMA, NEOX, OPT, Kind, made_up
from optimum_dobisvd.report.pictures import errors_picture, formats_picture, ranks_picture
from optimum_dobisvd.report.report import CompressionReport
from optimum_dobisvd.report.write import write_beside, write_pictures

CASES = [(LLAMA, 1), (LLAMA, 30), (LLAMA, 80), (GPT2, 48), (NEOX, 6), (OPT, 24), (EXPERTS, 5)]


def pixels(path: Path) -> np.ndarray:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    from matplotlib.image import imread

    return imread(path)


@pytest.mark.parametrize(("kinds", "layers"), CASES)
@pytest.mark.parametrize("draw", [ranks_picture, errors_picture, formats_picture])
def test_a_picture_is_drawn(tmp_path: Path, draw: Any, kinds: list[Kind], layers: int) -> None:
    report = made_up(kinds, layers, dense=[kinds[0][0].format(l=0)])
    path = draw(report, tmp_path / "new" / "picture.png")
    image = pixels(path)
    height, width = image.shape[:2]
    assert 300 < height < 2000
    assert 900 < width < 3000
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50, "nearly empty"
    assert [found.name for found in path.parent.iterdir()] == ["picture.png"]


def test_more_layers_are_more_columns_and_no_numbers_too_small_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    texts: list[str] = []
    original = Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **k: (texts.append(s), original(self, x, y, s, **k))[1])
    few = made_up(LLAMA, 30, dense=["model.layers.3.mlp.up_proj"])
    ranks_picture(few, tmp_path / "few.png")
    expected = sorted(str(module.rank) for module in few.modules if module.rank is not None)
    assert sorted(text for text in texts if text.isdigit()) == expected
    texts.clear()
    ranks_picture(made_up(LLAMA, 80), tmp_path / "many.png")
    assert not [text for text in texts if text.isdigit()]


def test_equal_values_and_a_single_one_are_no_trouble(tmp_path: Path) -> None:
    report = made_up([("layers.{l}.proj", 8, 8)], layers=1)
    assert pixels(ranks_picture(report, tmp_path / "one.png")).size
    assert pixels(errors_picture(report, tmp_path / "one.png")).size
    all_dense = made_up(LLAMA, 2, dense=[name.format(l=layer) for name, _, _ in LLAMA for layer in range(2)])
    assert pixels(ranks_picture(all_dense, tmp_path / "dense.png")).size


def test_no_errors_no_picture_of_them(tmp_path: Path) -> None:
    report = made_up(errors=False)
    with pytest.raises(ValueError, match="holds no errors"):
        errors_picture(report, tmp_path / "errors.png")
    assert [path.name for path in write_pictures(tmp_path, report)] == ["dobisvd_formats.png", "dobisvd_ranks.png"]


def test_a_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"optimum-dobisvd\[plots\]"):
        ranks_picture(made_up(), tmp_path / "ranks.png")
    assert not list(tmp_path.iterdir())


def test_write_beside_writes_everything_or_all_but_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from optimum_dobisvd.allocation.plan import Plan, PlannedModule

    report = made_up()
    modules = {module.name: PlannedModule(module.structure, module.encoding, module.rank) for module in report.modules}
    plan = Plan(modules, "m", 0.8, "a")
    texts = ["dobisvd_plan.json", "dobisvd_report.json"]
    drawings = ["dobisvd_formats.png", "dobisvd_ranks.png", "dobisvd_errors.png"]
    assert [path.name for path in write_beside(tmp_path / "all", plan, report)] == texts + drawings
    assert [path.name for path in write_beside(tmp_path / "some", plan, report, pictures=False)] == texts
    monkeypatch.setattr("optimum_dobisvd.report.write.matplotlib_is_installed", lambda: False)
    with caplog.at_level(logging.INFO, logger="optimum_dobisvd"):
        assert [path.name for path in write_beside(tmp_path / "without", plan, report)] == texts
    assert "optimum-dobisvd[plots]" in caplog.text
    assert Plan.load(tmp_path / "all" / texts[0]) == plan
    assert CompressionReport.load(tmp_path / "without") == report
