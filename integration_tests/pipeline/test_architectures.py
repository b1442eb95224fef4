"""Models that are no list of blocks behind a text: compressed whole, saved, and loaded elsewhere bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from integration_tests.fresh_processes import run_python
from integration_tests.statistics.tiny_model_statistics import assert_gram_close
from integration_tests.tiny_architectures import image_text_batches, tiny_architecture
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer
from optimum_dobisvd.calibration.loss import NextTokenLoss
from optimum_dobisvd.calibration.model_inputs import SampleIds
from optimum_dobisvd.commands.checkpoint_report import report_from_files
from optimum_dobisvd.pipeline.collect import collect
from optimum_dobisvd.pipeline.validate import prepare
from optimum_dobisvd.statistics.fingerprint import fingerprint
from optimum_dobisvd.statistics.store import full_gram

HALF = 8


def spoken() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_features": torch.randn(1, 8, 32, generator=generator),
            "labels": torch.randint(3, 300, (1, 6), generator=generator),
        }
        for _ in range(6)
    ]


def dataset_for(name: str) -> Any:
    if name in ("clip", "llava", "qwen2_vl", "gemma3"):
        return image_text_batches(name, 6)
    if name == "vit":
        return [
            {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(n))} for n in range(3)
        ]
    return spoken() if name == "whisper" else tokens(6, 2 * HALF)


def inputs_for(name: str) -> dict[str, Tensor]:
    if name in ("t5", "bart"):
        return {"input_ids": tokens(2, 8), "labels": tokens(2, 6, seed=1)}
    return dataset_for(name)[0] if isinstance(dataset_for(name), list) else {"input_ids": tokens(2, 8)}


def compressed(name: str, **settings: Any) -> Any:
    config = {"method": "svd_llm_v2", "ratio": 0.6, "dataset": dataset_for(name), "nsamples": 6, **settings}
    return DobiSVDQuantizer(DobiSVDConfig(**config)).quantize_model(tiny_architecture(name))


RELOAD = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
for class_name, folder, code in json.loads(sys.argv[1]):
    auto = getattr(transformers, class_name)
    model = auto.from_pretrained(folder, **({"trust_remote_code": True} if code else {})).eval()
    with torch.no_grad():
        save_file({"logits": model(**load_file(f"{folder}/inputs.st")).logits.contiguous()}, f"{folder}/logits.st")
"""
CASES = [
    ("t5", "AutoModelForSeq2SeqLM", {"method": "global"}),
    ("bart", "AutoModelForSeq2SeqLM", {"method": "global", "quantization": "int8"}),
    ("whisper", "AutoModelForSpeechSeq2Seq", {"method": "global"}),
    ("vit", "AutoModelForImageClassification", {}),
    ("llava", "AutoModelForImageTextToText", {"method": "global"}),
    ("qwen2_vl", "AutoModelForImageTextToText", {"method": "global", "nontext_modules": True}),
    ("gemma3", "AutoModelForImageTextToText", {"nontext_modules": True}),
    ("falcon", "AutoModelForCausalLM", {"method": "global"}),
    ("mamba", "AutoModelForCausalLM", {}),
    ("jamba", "AutoModelForCausalLM", {}),
]


@pytest.mark.parametrize("with_package", [True, False])
def test_another_process_loads_them_bit_for_bit(tmp_path: Path, with_package: bool) -> None:
    expected = {}
    for name, _, settings in CASES:
        model, inputs = compressed(name, **settings), inputs_for(name)
        with torch.no_grad():
            expected[name] = model(**inputs).logits
        model.save_pretrained(tmp_path / name)
        save_file({key: value.contiguous() for key, value in inputs.items()}, tmp_path / name / "inputs.st")
        report = report_from_files(tmp_path / name)
        assert {row.name for row in report.modules} == {row.name for row in model.dobisvd_report.modules}
    jobs = [(auto, str(tmp_path / name), not with_package) for name, auto, _ in CASES]
    done = run_python(RELOAD, json.dumps(jobs), without_package_in=None if with_package else tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, wanted in expected.items():
        assert torch.equal(load_file(tmp_path / name / "logits.st")["logits"], wanted), name


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_loss_of_an_encoder_decoder_is_its_own(name: str) -> None:
    """The first half of a window is read, the second one predicted."""
    model, ids = tiny_architecture(name), tokens(3, 2 * HALF)
    loss = NextTokenLoss()
    with torch.no_grad():
        loss.of(model, ids, torch.ones_like(ids, dtype=torch.bool))
        own = model(input_ids=ids[:, :HALF], labels=ids[:, HALF:].contiguous()).loss
    assert loss.tokens == 3 * HALF
    assert loss.total / loss.tokens == pytest.approx(float(own), rel=1e-6)


def test_the_loss_of_a_batch_is_that_of_its_labels() -> None:
    model, batch = tiny_architecture("llava"), image_text_batches("llava", 1)[0]
    labels = batch["input_ids"].clone()
    labels[:, :5] = -100
    loss, unlabeled = NextTokenLoss(), NextTokenLoss()
    mask = torch.ones_like(labels, dtype=torch.bool)
    with torch.no_grad():
        loss.of(model, SampleIds.of({**batch, "labels": labels}), mask)
        unlabeled.of(model, SampleIds.of(batch), mask)
        own = model(**batch, labels=labels).loss
    assert loss.total / loss.tokens == pytest.approx(float(own), rel=1e-6)
    assert unlabeled.total == pytest.approx(loss.total)  # stand-ins of an image are nothing to predict


def reference(model: Any, names: Any, batches: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Inputs and outputs of every linear while the model runs as a user runs it, gradients of its own summed loss."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name in names:

        def note(_module: Any, args: Any, output: Tensor, name: str = name) -> None:
            if output.requires_grad:
                output.retain_grad()
            seen[name] += [args[0].detach().flatten(0, -2).double(), output]

        handles.append(model.get_submodule(name).register_forward_hook(note))
    for batch in batches:
        labels = batch["labels"]
        counted = labels if model.config.is_encoder_decoder else labels[:, 1:]
        (model(**batch).loss * int((counted != -100).sum())).backward()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("name", "nontext"), [("t5", False), ("bart", False), ("llava", False), ("gemma3", True)])
def test_statistics_are_those_of_the_model_as_it_runs(name: str, nontext: bool) -> None:
    model, dataset = tiny_architecture(name), dataset_for(name)
    if isinstance(dataset, list):
        for batch in dataset:
            batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == 5, -100)
        batches = dataset
    else:
        batches = [{"input_ids": ids[:, :HALF], "labels": ids[:, HALF:].contiguous()} for ids in dataset.split(2)]
    config = DobiSVDConfig(
        method="global", ratio=0.6, dataset=dataset, nsamples=6, gradient_nsamples=6, nontext_modules=nontext
    )
    job = prepare(model, config)
    assert job.windows is not None
    store = collect(model, job, job.windows, fingerprint(model, job.windows))
    seen = reference(model, job.layout.linears, batches)
    for block in job.layout.blocks:
        statistics, gradients = store.block(block), store.gradients(block)
        for linear, key in statistics.input_key.items():
            x = torch.cat(seen[linear][::2])
            assert_gram_close(full_gram(statistics.inputs[key]), x.T @ x, 1e-4)
            g = torch.cat([output.grad.flatten(0, -2).double() for output in seen[linear][1::2]])
            assert_gram_close(full_gram(gradients[linear]), g.T @ g, 1e-3)


@pytest.mark.parametrize("name", ["t5", "gemma3"])
def test_blocks_are_quantized_one_after_the_other(name: str) -> None:
    model = compressed(name, method="global", ratio=0.2, quantization="gptq4_g32", min_coverage=0.1)
    encodings = {row.encoding for row in model.dobisvd_report.modules}
    assert "gptq4_g32" in encodings
    with torch.no_grad():
        assert bool(torch.isfinite(model(**inputs_for(name)).logits).all())


def test_a_model_of_text_and_images_side_by_side(tmp_path: Path) -> None:
    model = compressed("clip", nontext_modules=True)
    assert model.dobisvd_report.coverage == 1
    assert {name.partition(".")[0] for name in model.config.quantization_config.modules} == {
        "text_model",
        "vision_model",
        "visual_projection",
        "text_projection",
    }
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs_for("clip")).logits_per_image
        found = AutoModel.from_pretrained(tmp_path).eval()(**inputs_for("clip")).logits_per_image
    torch.testing.assert_close(found, expected)  # not to the bit: nor is the dense model's own, reloaded


@pytest.mark.parametrize(
    ("name", "wanted"), [("whisper", "input_features"), ("vit", "pixel_values"), ("clip", "pixel_values")]
)
def test_text_for_a_model_that_takes_none_is_refused_in_a_sentence(name: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be calibrated on text: it takes {wanted}; pass dataset= as a list"):
        compressed(name, dataset=tokens(4, 16))


def test_a_tower_cannot_be_calibrated_on_text() -> None:
    with pytest.raises(ValueError, match="nontext_modules compresses what text does not pass through"):
        compressed("llava", dataset=tokens(4, 16), nontext_modules=True)
    model = compressed("llava", method="svd", dataset=None, nontext_modules=True)
    assert model.dobisvd_report.coverage == 1


def test_ranks_are_not_learned_on_batches() -> None:
    with pytest.raises(ValueError, match="learns ranks on text alone"):
        compressed("llava", method="dobi")


def test_rows_of_a_batch_are_taken_apart_or_refused() -> None:
    batches = image_text_batches("llava", 4)
    joined = [{key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}]
    ranks = [
        compressed("llava", dataset=dataset, nsamples=4).config.quantization_config.modules
        for dataset in (batches, joined)
    ]
    assert ranks[0] == ranks[1]
    packed = image_text_batches("qwen2_vl", 2)
    joined = [{key: torch.cat([batch[key] for batch in packed]) for key in packed[0]}]
    with pytest.raises(ValueError, match="batch 0 .* has 2 texts, and pixel_values of 32 rows"):
        compressed("qwen2_vl", dataset=joined)


@pytest.mark.parametrize("name", ["falcon", "mamba", "jamba"])
@pytest.mark.parametrize("method", ["svd_llm_v2", "global"])
def test_both_routes_give_the_same_model(tmp_path: Path, name: str, method: str) -> None:
    tiny_architecture(name).save_pretrained(tmp_path)
    config = DobiSVDConfig(method=method, ratio=0.6, dataset=tokens(6, 16), nsamples=6)
    on_load = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    loaded = DobiSVDQuantizer(config).quantize_model(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert on_load.config.quantization_config.modules == loaded.config.quantization_config.modules
    assert on_load.dobisvd_report.left_dense == loaded.dobisvd_report.left_dense
    states = on_load.state_dict(), loaded.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("method", ["svd", "svd_llm_v2", "global"])
def test_figures_of_a_compression_on_load_are_those_of_the_model(tmp_path: Path, method: str) -> None:
    dense = tiny("llama")
    dense.save_pretrained(tmp_path / "dense")
    config = DobiSVDConfig(method=method, ratio=0.6, dataset=tokens(6, 16), nsamples=6)
    on_load = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    on_load.save_pretrained(tmp_path / "out")
    for report in (on_load.dobisvd_report, report_from_files(tmp_path / "out")):
        assert report.coverage == 1
        assert report.left_dense == "nothing"
        assert report.dense_target_bytes == sum(
            4 * each.weight.numel() for name, each in dense.named_modules() if name.endswith("_proj")
        )
