"""The settings of the rank training: what is refused, and that they survive JSON."""

import json
from typing import Any

import pytest

from optimum_dobisvd import DobiSVDConfig
from optimum_dobisvd.allocation.rank_training import RankTraining


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
        ({"optimizer": "prices"}, "training: optimizer is 'adam' or 'importance', got 'prices'"),
    ],
)
def test_impossible_settings_name_the_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        RankTraining.from_dict(values)


def test_settings_survive_json() -> None:
    settings = RankTraining(steps=7, width=(0.2, 0.05), seqlen=64)
    assert RankTraining.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_the_config_refuses_impossible_settings() -> None:
    with pytest.raises(ValueError, match="training: unknown key 'stepz'"):
        DobiSVDConfig(allocation="dobi_fixed_basis", training={"stepz": 3})
    with pytest.raises(ValueError, match="training is set, and allocation 'global' learns nothing"):
        DobiSVDConfig(training={"steps": 3})
    with pytest.raises(ValueError, match="optimizer 'importance' corrects the importance scores of kfac's directions"):
        DobiSVDConfig(method="dobi", training={"optimizer": "importance"})
    with pytest.raises(ValueError, match="optimizer 'importance' corrects the importance scores of kfac's directions"):
        DobiSVDConfig(factorization="svd_llm", allocation="dobi_fixed_basis", training={"optimizer": "importance"})
    for name, value in {"learning_rate": 0.1, "width": (0.1, 0.1)}.items():
        with pytest.raises(ValueError, match=f"{name} is a setting of optimizer 'adam'"):
            DobiSVDConfig(allocation="dobi_fixed_basis", training={name: value})
    with pytest.raises(ValueError, match="fisher is 'empirical' or 'sampled'"):
        DobiSVDConfig(fisher="true")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient_nsamples must be at least 1"):
        DobiSVDConfig(gradient_nsamples=0)
