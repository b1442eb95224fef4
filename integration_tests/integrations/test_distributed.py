"""DistributedDataParallel on compressed models: it broadcasts buffers, integers among them."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from integration_tests.fresh_processes import run_python

STEPS = """
def descended(model):
    torch.manual_seed(0)
    ids = torch.arange(2, 26).view(2, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
"""
DISTRIBUTED = f"""
import sys, torch
from safetensors.torch import save_file
from torch import distributed
from transformers import AutoModelForCausalLM
{STEPS}
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1)
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    descended(torch.nn.parallel.DistributedDataParallel(model))
    save_file({{name: value.contiguous() for name, value in model.state_dict().items()}}, folder + sys.argv[1])
distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_parameters_are_those_of_one_process_and_permutations_stay(saved, tmp_path):
    folders = [saved("qwen2", structure=structure, intermediate_size=300) for structure in ("low_rank", "pivoted")]
    done = run_python(DISTRIBUTED, ".trained", str(tmp_path / "meeting"), *map(str, folders))
    assert done.returncode == 0, done.stderr[-3000:]
    namespace = {"torch": torch}
    exec(STEPS, namespace)
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder).train()
        before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("permutation")}
        assert {buffer.dtype for buffer in before.values()} == (
            {torch.uint8, torch.int32} if "pivoted" in folder.name else set()
        )
        namespace["descended"](model)
        found = load_file(f"{folder}.trained")
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found[name], value)
        assert all(torch.equal(found[name], value) for name, value in before.items())
