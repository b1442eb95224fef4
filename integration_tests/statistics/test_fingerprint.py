"""Statistics are used for the weights, the configuration and the tokens they were collected with, and no others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from tokenizers.processors import TemplateProcessing

from integration_tests.tiny_models import tiny
from optimum_dobisvd.calibration.dataset import CalibrationWindows, load_windows
from optimum_dobisvd.statistics import fingerprint as fingerprint_module
from optimum_dobisvd.statistics.fingerprint import differing_fields, fingerprint, weights_sha256
from optimum_dobisvd.statistics.store import StatisticsStore

TEXTS = [
    f"Letter {number}: the cat sat on the mat, and the dog ran over the hill of the republic." for number in range(9)
]
SETTINGS: dict[str, Any] = {"nsamples": 4, "seqlen": 16, "seed": 0}


def identity(model: Any, windows: CalibrationWindows) -> dict[str, Any]:
    return json.loads(json.dumps(fingerprint(model, windows)))  # as a store on disk gives it back


def refusal(tmp_path: Path, stored: dict[str, Any], current: dict[str, Any]) -> str:
    StatisticsStore(stored, ["0"], tmp_path)
    with pytest.raises(ValueError, match="do not belong to this run") as error:
        StatisticsStore(current, ["0"], tmp_path)
    return str(error.value)


def test_the_same_model_and_windows_fit(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = tiny("llama")
    one, other = (fingerprint(tiny("llama"), load_windows(TEXTS, tiny_tokenizer, **SETTINGS)) for _ in range(2))
    StatisticsStore(one, ["0"], tmp_path)
    StatisticsStore(other, ["0"], tmp_path)
    model.config.use_cache = False
    model.config.pad_token_id = 7
    model.config.name_or_path = "elsewhere"
    assert differing_fields(one, identity(model, load_windows(TEXTS, tiny_tokenizer, **SETTINGS))) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"seed": 1}, "seed: 0 in the store, 1 now"), ({"seqlen": 15}, "seqlen: 16 "), ({"nsamples": 3}, "nsamples: 4 ")],
)
def test_other_settings_are_named(tmp_path: Path, tiny_tokenizer: Any, changes: dict[str, int], words: str) -> None:
    model = tiny("llama")
    stored = fingerprint(model, load_windows(TEXTS, tiny_tokenizer, **SETTINGS))
    message = refusal(tmp_path, stored, fingerprint(model, load_windows(TEXTS, tiny_tokenizer, **SETTINGS | changes)))
    assert words in message
    assert "weights" not in message
    assert "another folder" in message


def test_other_text_is_named(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = tiny("llama")
    path = tmp_path / "other.txt"
    path.write_text("\n\n".join(TEXTS[1:]))
    stored = fingerprint(model, load_windows(TEXTS, tiny_tokenizer, **SETTINGS))
    message = refusal(tmp_path / "s", stored, fingerprint(model, load_windows(path, tiny_tokenizer, **SETTINGS)))
    assert "dataset: 'texts' in the store, 'other.txt' now" in message


def test_another_tokenizer_is_named(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = tiny("llama")
    stored = fingerprint(model, load_windows(TEXTS, tiny_tokenizer, **SETTINGS))
    other = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<eos>")
    other.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    message = refusal(tmp_path, stored, fingerprint(model, load_windows(TEXTS, other, **SETTINGS)))
    assert "tokenizer: {" in message
    assert "seed" not in message


def test_other_weights_are_named(tmp_path: Path, tiny_tokenizer: Any) -> None:
    windows = load_windows(TEXTS, tiny_tokenizer, **SETTINGS)
    model = tiny("llama")
    stored = fingerprint(model, windows)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 4] += 1e-3
    message = refusal(tmp_path, stored, fingerprint(model, windows))
    assert "weights: '" in message
    assert "tokens" not in message


def test_another_dtype_is_named(tmp_path: Path, tiny_tokenizer: Any) -> None:
    windows = load_windows(TEXTS, tiny_tokenizer, **SETTINGS)
    message = refusal(
        tmp_path, fingerprint(tiny("llama"), windows), fingerprint(tiny("llama", dtype=torch.bfloat16), windows)
    )
    assert "dtype: 'torch.float32' in the store, 'torch.bfloat16' now" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm_eps": 1e-2}, "config.rms_norm_eps: 1e-06 in the store, 0.01 now"),
        ({"hidden_act": "gelu"}, "config.hidden_act: 'silu' in the store, 'gelu' now"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "config.rope_parameters.rope_theta: 10000.0 in the store, 500000.0 now",
        ),
    ],
)
def test_the_same_weights_under_another_configuration_are_named(
    tmp_path: Path, tiny_tokenizer: Any, changes: dict[str, Any], words: str
) -> None:
    """Another rotary base or norm changes every activation and not one weight."""
    windows = load_windows(TEXTS, tiny_tokenizer, **SETTINGS)
    one, other = tiny("llama"), tiny("llama", **changes)
    assert weights_sha256(one) == weights_sha256(other)
    assert words in refusal(tmp_path, fingerprint(one, windows), fingerprint(other, windows))


def test_a_configuration_key_of_a_newer_transformers_is_no_difference(tiny_tokenizer: Any) -> None:
    stored = identity(tiny("llama"), load_windows(TEXTS, tiny_tokenizer, **SETTINGS))
    current = json.loads(json.dumps(stored))
    current["config"]["brand_new_option"] = None
    assert differing_fields(stored, current) == []
    current["config"]["head_dim"] = {"was": "a number"}
    assert differing_fields(stored, current) == ["config.head_dim: 8 in the store, {'was': 'a number'} now"]


def test_saved_buffers_count_as_weights() -> None:
    models = [tiny("llama") for _ in range(3)]
    for model, value in zip(models, (1.0, 1.0, 2.0), strict=True):
        model.model.layers[0].register_buffer("gain", torch.tensor(value))
        model.model.layers[0].register_buffer("scratch", torch.rand(3), persistent=False)
    one, same, other = map(weights_sha256, models)
    assert one == same != other


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_where_the_weights_lie_does_not_matter(tmp_path: Path, offload: str) -> None:
    model = tiny("gpt2")
    expected = weights_sha256(model)
    if offload == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.transformer.h[0].mlp.c_fc.weight.device.type == "meta"
    assert weights_sha256(model) == expected


def test_weights_in_memory_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved by accelerate, they would come back from a GPU as new parameters, tied ones untied."""
    model = tiny("llama_tied")
    expected = weights_sha256(model)

    def moved(*_: object, **__: object) -> None:
        raise AssertionError("weights were moved")

    monkeypatch.setattr(fingerprint_module, "align_module_device", moved)
    assert weights_sha256(model) == expected
