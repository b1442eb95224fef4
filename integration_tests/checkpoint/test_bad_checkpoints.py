"""Damaged or mixed-up checkpoints are refused from their headers, before any weight is read."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from integration_tests.checkpoint.damage import edit_config, edit_tensors
from integration_tests.checkpoint.reloading import compressed
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig
from optimum_dobisvd.model import experts

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    compressed(tiny("qwen2")).save_pretrained(tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def pivoted(tmp_path):
    compressed(tiny("qwen2"), structure="pivoted").save_pretrained(tmp_path / "pivoted")
    return tmp_path / "pivoted"


@pytest.fixture
def no_reading_later(monkeypatch):
    """Once called, any attempt to read weights fails the test: the refusal has to come first."""

    def read(*args, **kwargs):
        raise AssertionError("weights were read before the checkpoint was refused")

    return lambda: monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", read)


@pytest.fixture
def no_reading(no_reading_later):
    no_reading_later()


TENSOR_DAMAGE = {
    "missing factor": (lambda t: t.pop(f"{Q}.first.weight"), f"lacks {Q}.first.weight"),
    "missing bias": (lambda t: t.pop(f"{Q}.second.bias"), f"lacks {Q}.second.bias"),
    "wrong rank": (
        lambda t: t.update({f"{Q}.second.weight": t[f"{Q}.second.weight"][:, :-1]}),
        rf"{Q}.second.weight has shape \[32, 9\] in the checkpoint and \[32, 10\]",
    ),
    "extra factor": (
        lambda t: t.update({"lm_head.first.weight": torch.ones(2, 32)}),
        "holds lm_head.first.weight, but config.json does not list lm_head",
    ),
    "dense weight left in": (
        lambda t: t.update({f"{Q}.weight": torch.ones(32, 32)}),
        f"dense {Q}.weight beside its factors",
    ),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_damaged_tensors(folder, damage, no_reading):
    edit, message = TENSOR_DAMAGE[damage]
    edit_tensors(folder, edit)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


PERMUTATION = f"{Q}.permutation"
NO_PERMUTATION = "is no permutation of the numbers from 0 to 31: the checkpoint is damaged; copy it again"
PERMUTATION_DAMAGE = {
    "duplicate": (lambda t: t[PERMUTATION].fill_(t[PERMUTATION][0].item()), f"{PERMUTATION} in .* {NO_PERMUTATION}"),
    "out of range": (lambda t: t[PERMUTATION][3:4].fill_(32), f"{PERMUTATION} in .* {NO_PERMUTATION}"),
    "too short": (
        lambda t: t.update({PERMUTATION: t[PERMUTATION][:-1]}),
        rf"{PERMUTATION} has shape \[31\] in the checkpoint and \[32\] by config.json: .*copy both",
    ),
    "no vector": (
        lambda t: t.update({PERMUTATION: t[PERMUTATION][0]}),
        rf"{PERMUTATION} has shape \[\] in the checkpoint and \[32\] by config.json",
    ),
    "of two dimensions": (
        lambda t: t.update({PERMUTATION: t[PERMUTATION][:, None]}),
        rf"{PERMUTATION} has shape \[32, 1\] in the checkpoint",
    ),
    "wide integers": (
        lambda t: t.update({PERMUTATION: t[PERMUTATION].long()}),
        f"{PERMUTATION} is stored as I64 and must be U8: another program has rewritten .* copy the original again",
    ),
    "no integers": (
        lambda t: t.update({PERMUTATION: t[PERMUTATION].float()}),
        f"{PERMUTATION} is stored as F32 and must be U8",
    ),
    "missing": (lambda t: t.pop(PERMUTATION), f"lacks {PERMUTATION}, which config.json promises: .* copy it again"),
    "missing bias": (lambda t: t.pop(f"{Q}.bias"), f"lacks {Q}.bias"),
    "bias of a low-rank linear": (
        lambda t: t.update({f"{Q}.second.bias": t.pop(f"{Q}.bias")}),
        f"lacks {Q}.bias, which config.json promises",
    ),
    "wrong rank": (
        lambda t: t.update({f"{Q}.second.weight": t[f"{Q}.second.weight"][:-1]}),
        rf"{Q}.second.weight has shape \[20, 11\] in the checkpoint and \[21, 11\]",
    ),
}


@pytest.mark.parametrize("damage", PERMUTATION_DAMAGE)
def test_damaged_permutations(pivoted, damage, no_reading):
    edit, message = PERMUTATION_DAMAGE[damage]
    edit_tensors(pivoted, edit)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(pivoted)


RANK_4 = {"structure": "low_rank", "rank": 4, "encoding": "float"}


def as_version_1_wrote_it(config):
    config.update(format_version=1, storage="plain", dense_storage=None, inner=None)
    for key in ("structure", "quantization", "mixed"):
        del config[key]
    config["modules"] = {
        name: {"rank": entry["rank"], "storage": "plain"} for name, entry in config["modules"].items()
    }


CONFIG_DAMAGE = {
    "newer format": (lambda c: c.update(format_version=3), "format 3, .* pip install -U optimum-dobisvd"),
    "older format": (
        as_version_1_wrote_it,
        "format 1, .* never released: .*'storage' and 'inner'.* compress the model",
    ),
    "older format's number": (
        lambda c: c.update(format_version=1),
        "format 1, .* never released.* compress the model",
    ),
    "older format's keys": (
        lambda c: c.update(storage="plain"),
        "the dobi_svd quantization config has no 'storage' any more; write quantization",
    ),
    "format is no number": (lambda c: c.update(format_version="2"), "format_version must be a positive integer"),
    "format below the first": (lambda c: c.update(format_version=0), "format_version must be a positive integer"),
    "unknown key": (lambda c: c.update(ratoi=0.5), "unknown key 'ratoi'.*did you mean 'ratio'"),
    "unknown encoding": (
        lambda c: c["modules"][Q].update(encoding="int3"),
        f"{Q}: unknown encoding 'int3'.* cannot read it: upgrade .pip install -U optimum-dobisvd",
    ),
    "unknown structure": (
        lambda c: c["modules"][Q].update(structure="low_rnk"),
        f"{Q}: unknown structure 'low_rnk'.* low_rank.* cannot read it: upgrade",
    ),
    "an entry of version 1": (
        lambda c: c["modules"].update({Q: {"rank": 10, "storage": "plain"}}),
        f"{Q}: expected a structure, an encoding and perhaps a rank, got .*'storage': 'plain'",
    ),
    "no encoding": (lambda c: c["modules"][Q].pop("encoding"), f"{Q}: expected a structure, an encoding"),
    "no rank": (lambda c: c["modules"][Q].pop("rank"), f"{Q}: rank must be an integer, got None"),
    "rank is no number": (lambda c: c["modules"][Q].update(rank="9"), f"{Q}: rank must be an integer"),
    "rank zero": (lambda c: c["modules"][Q].update(rank=0), f"{Q}: rank must be at least 1"),
    "rank too large": (
        lambda c: c["modules"][Q].update(rank=33),
        f"{Q}: rank 33 .* above its largest possible rank 32",
    ),
    "no modules": (lambda c: c.update(modules={}), "holds model.* but config.json does not list model.layers"),
    "modules missing": (lambda c: c.pop("modules"), "lists no compressed modules"),
    "module of another model": (
        lambda c: c["modules"].update({"model.layers.9.self_attn.q_proj": dict(RANK_4)}),
        "model.layers.9.self_attn.q_proj, which Qwen2ForCausalLM does not have",
    ),
    "module is no linear": (
        lambda c: c["modules"].update({"model.norm": dict(RANK_4)}),
        "model.norm as compressed, and in Qwen2ForCausalLM it is a Qwen2RMSNorm",
    ),
    "unlisted module": (lambda c: c["modules"].pop(Q), f"holds {Q}.(first|second).* does not list {Q}"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_damaged_config(folder, damage, no_reading):
    edit, message = CONFIG_DAMAGE[damage]
    edit_config(folder, edit)
    with pytest.raises((ValueError, TypeError), match=message):
        AutoModelForCausalLM.from_pretrained(folder)


K = "model.layers.1.self_attn.k_proj"  # 16 outputs
PIVOTED_CONFIG_DAMAGE = {
    "all rows": (
        lambda c: c["modules"][K].update(rank=16),
        f"{K}: config.json cannot be right, structure 'pivoted' at rank 16 has all rows .* linear; copy it again",
    ),
    "rank too large": (
        lambda c: c["modules"][Q].update(rank=33),
        f"{Q}: rank 33 in config.json is above its largest possible rank 32",
    ),
    "another rank": (
        lambda c: c["modules"][Q].update(rank=12),
        rf"{Q}.first.weight has shape \[11, 32\] in the checkpoint and \[12, 32\] by config.json",
    ),
    "no rank": (lambda c: c["modules"][Q].pop("rank"), f"{Q}: rank must be an integer, got None"),
    "an encoding it does not go with": (
        lambda c: c["modules"][Q].update(encoding="remap"),
        f"{Q}: config.json cannot be right, remap is for factors that can be scaled, and structure 'pivoted' fixes",
    ),
    "misspelt": (
        lambda c: c["modules"][Q].update(structure="pivotd"),
        f"{Q}: unknown structure 'pivotd'; known: pivoted, .*cannot read it: upgrade .*, or mend config.json",
    ),
    "another structure": (
        lambda c: c["modules"][Q].update(structure="low_rank"),
        rf"{Q}.second.weight has shape \[21, 11\] in the checkpoint and \[32, 11\] by config.json",
    ),
    "unlisted": (lambda c: c["modules"].pop(Q), f"holds {Q}.* does not list {Q}"),
}


@pytest.mark.parametrize("damage", PIVOTED_CONFIG_DAMAGE)
def test_config_that_does_not_fit_the_pivots(pivoted, damage, no_reading):
    edit, message = PIVOTED_CONFIG_DAMAGE[damage]
    edit_config(pivoted, edit)
    with pytest.raises((ValueError, TypeError), match=message):
        AutoModelForCausalLM.from_pretrained(pivoted)


def test_a_permutation_of_another_structure_is_refused(folder, no_reading):
    edit_tensors(folder, lambda t: t.update({PERMUTATION: torch.arange(32, dtype=torch.uint8)}))
    with pytest.raises(ValueError, match=f"holds {PERMUTATION}, but config.json does not list {Q} as compressed that"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_shard_is_refused(folder, no_reading_later):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    no_reading_later()
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != shard.name}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shard.unlink()
    with pytest.raises(ValueError, match="the checkpoint lacks model"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_used_config_on_a_dense_checkpoint_is_refused(folder, tmp_path, no_reading):
    tiny("qwen2").save_pretrained(tmp_path / "dense")
    config = DobiSVDConfig.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])
    with pytest.raises(ValueError, match="pass a fresh DobiSVDConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)


ON_LOAD_REFUSALS = {
    "pattern that matches nothing": ({"modules_to_not_convert": ["nothing_like_this"]}, "nothing_like_this"),
    "override that matches nothing": ({"overrides": {"re:.*w_proj": {"ratio": 0.9}}}, "w_proj"),
}


@pytest.mark.parametrize("case", ON_LOAD_REFUSALS)
def test_compress_on_load_refuses_before_weights_are_read(tmp_path, case, no_reading):
    tiny("llama").save_pretrained(tmp_path / "dense")
    settings, message = ON_LOAD_REFUSALS[case]
    config = DobiSVDConfig(method="output_pca", dataset=tokens(6, 24), **settings)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)


def test_compress_on_load_refuses_a_model_it_hardly_covers(tmp_path, no_reading, monkeypatch):
    monkeypatch.setattr(experts, "candidate_layouts", lambda _module: [])  # as of experts that nobody knows
    tiny("mixtral").save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match=r"only .*% of the weights .* can be compressed.*MixtralExperts"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "moe", quantization_config=DobiSVDConfig(method="output_pca", dataset=tokens(6, 24))
        )


@pytest.mark.parametrize("ids", [torch.zeros(0, 8, dtype=torch.long), torch.ones(2, 8)])
def test_compress_on_load_refuses_bad_tokens_before_reading(tmp_path, ids, no_reading):
    tiny("llama").save_pretrained(tmp_path / "dense")
    config = DobiSVDConfig(method="output_pca", dataset=ids)
    with pytest.raises((ValueError, TypeError), match=r"empty|integer"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)


def test_compress_on_load_needs_text_and_says_so_before_reading(tmp_path, no_reading):
    tiny("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="needs calibration text"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=DobiSVDConfig(method="output_pca")
        )


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification, AutoModelForCausalLM])
def test_an_incomplete_body_is_refused_whatever_head_is_wanted(folder, auto_class, no_reading):
    edit_tensors(folder, lambda t: t.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"the checkpoint lacks .*embed_tokens.weight"):
        auto_class.from_pretrained(folder)


def test_a_new_head_may_be_untrained(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert model.score.weight.shape[0] == 3
