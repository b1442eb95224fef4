"""Compression at load calibrates with the tokenizer that lies beside the weights, wherever those were found."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from integration_tests.tiny_models import tiny
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer
from optimum_dobisvd.calibration.dataset import tokenizer_identity

TEXTS = [f"Document {i}: the cat counted {i * i} mice.\nIt rained." for i in range(60)]
OLD, NEW = "0" * 40, "1" * 40


@pytest.fixture
def other_tokenizer() -> PreTrainedTokenizerFast:
    """As many tokens as `tiny_tokenizer` has, of another text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich " * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def config(**settings: Any) -> DobiSVDConfig:
    return DobiSVDConfig(
        **{"method": "svd_llm", "ratio": 0.6, "dataset": TEXTS, "nsamples": 2, "seqlen": 16, **settings}
    )


def used(model: Any) -> dict[str, Any]:
    return model.dobisvd_report.dataset["tokenizer"]


def save(folder: Path, tokenizer: Any) -> Path:
    tiny("llama").save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def cache(tmp_path: Path, tiny_tokenizer: Any, other_tokenizer: Any, offline: None) -> Path:
    """A hub cache with one repository: two commits, and a subfolder in the newer one."""
    repository = tmp_path / "cache" / "models--org--name"
    save(repository / "snapshots" / OLD, other_tokenizer)
    save(repository / "snapshots" / NEW, tiny_tokenizer)
    save(repository / "snapshots" / NEW / "inner", other_tokenizer)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEW)
    (repository / "refs" / "v1").write_text(OLD)
    return tmp_path / "cache"


def test_a_subfolder_of_a_folder(tmp_path: Path, tiny_tokenizer: Any, other_tokenizer: Any) -> None:
    save(tmp_path, tiny_tokenizer)
    save(tmp_path / "inner", other_tokenizer)
    for subfolder, expected in (("inner", other_tokenizer), ("", tiny_tokenizer)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder=subfolder, quantization_config=config())
        assert used(model) == tokenizer_identity(expected)


def test_a_subfolder_without_a_tokenizer_takes_no_other(tmp_path: Path, tiny_tokenizer: Any) -> None:
    save(tmp_path, tiny_tokenizer)
    save(tmp_path / "inner", None)
    with pytest.raises(ValueError, match="could not load the tokenizer .*inner.*: pass a tokenizer"):
        AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner", quantization_config=config())
    given = config(tokenizer=tiny_tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner", quantization_config=given)
    assert used(model) == tokenizer_identity(tiny_tokenizer)


@pytest.mark.parametrize(
    ("arguments", "is_other"), [({}, False), ({"revision": "v1"}, True), ({"subfolder": "inner"}, True)]
)
def test_revision_subfolder_and_cache_of_the_hub(
    cache: Path, tiny_tokenizer: Any, other_tokenizer: Any, arguments: dict[str, Any], is_other: bool
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(
        "org/name", cache_dir=cache, local_files_only=True, quantization_config=config(), **arguments
    )
    assert used(loaded) == tokenizer_identity(other_tokenizer if is_other else tiny_tokenizer)


def test_quantization_at_load_reads_the_same_tokenizer(
    tmp_path: Path, tiny_tokenizer: Any, other_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint compressed before, its quantization still to come: the text is that of its subfolder, too."""
    from optimum_dobisvd.integrations import compress_on_load

    model = DobiSVDQuantizer(config()).quantize_model(tiny("llama"), tiny_tokenizer)
    model.save_pretrained(tmp_path / "inner")
    other_tokenizer.save_pretrained(tmp_path / "inner")
    tiny_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "inner" / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"]["quantization"] = "int8"
    path.write_text(json.dumps(values))
    seen: list[Any] = []
    monkeypatch.setattr(compress_on_load, "quantization_windows", lambda *given: seen.append(given[-1]))
    AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner")
    assert tokenizer_identity(seen[0].load()) == tokenizer_identity(other_tokenizer)


def test_a_model_in_memory_says_what_it_assumes(cache: Path, tmp_path: Path, tiny_tokenizer: Any, caplog: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained("org/name", cache_dir=cache, local_files_only=True)
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="could not load the tokenizer 'org/name'"):
        DobiSVDQuantizer(config()).quantize_model(model)  # it is in no cache that is known here
    assert "the tokenizer of 'org/name'" in caplog.text
    assert "subfolder or revision, pass its tokenizer" in caplog.text

    tiny_tokenizer.save_pretrained(tmp_path / "outer")
    save(tmp_path / "outer" / "inner", tiny_tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "outer", subfolder="inner")
    with pytest.raises(ValueError, match="no config.json in the folder.*pass the tokenizer"):
        DobiSVDQuantizer(config()).quantize_model(model)
    tiny("gemma").save_pretrained(tmp_path / "outer")
    with pytest.raises(ValueError, match="model_type is 'gemma' in its config.json and 'llama' in the model"):
        DobiSVDQuantizer(config()).quantize_model(model)
    assert DobiSVDQuantizer(config()).quantize_model(model, tiny_tokenizer) is model


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma", "gpt_neox", "gpt2"])
def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path, model_type: str) -> None:
    """transformers makes tokenizers without a vocabulary of some configurations."""
    tiny(model_type).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="could not load the tokenizer .*m'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=config())


TOKENIZER_CODE = """
from transformers import PreTrainedTokenizerFast
class Reversing(PreTrainedTokenizerFast):
    def __call__(self, text, **kwargs):
        found = super().__call__(text, **kwargs)
        found["input_ids"] = found["input_ids"][::-1]
        return found
"""


def test_code_of_a_tokenizer_is_not_left_out_silently(tmp_path: Path, tiny_tokenizer: Any, caplog: Any) -> None:
    save(tmp_path / "m", tiny_tokenizer)
    path = tmp_path / "m" / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values["auto_map"] = {"AutoTokenizer": [None, "tokenization_reversing.Reversing"]}
    path.write_text(json.dumps(values))
    (tmp_path / "m" / "tokenization_reversing.py").write_text(TOKENIZER_CODE)
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=config(), trust_remote_code=True)
    assert "has code of its own, which is not run here" in caplog.text


# --- what may stand for a tokenizer ---------------------------------------------------------------------------------


class Processor:
    """As transformers' processors are: callable, with a tokenizer inside and no vocabulary of its own."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.image_processor = tokenizer, object()

    def __call__(self, images: Any = None, text: Any = None) -> None:
        raise AssertionError("asked for images")


def test_a_processor_or_a_raw_tokenizer_is_taken(tiny_tokenizer: Any) -> None:
    expected = tokenizer_identity(tiny_tokenizer)
    for given in (Processor(tiny_tokenizer), tiny_tokenizer.backend_tokenizer):
        model = DobiSVDQuantizer(config()).quantize_model(tiny("llama"), given)
        assert used(model)["sha256"] == expected["sha256"]
    with pytest.raises(TypeError, match="expected a transformers tokenizer, its name or its path, got object"):
        DobiSVDQuantizer(config()).quantize_model(tiny("llama"), object())
