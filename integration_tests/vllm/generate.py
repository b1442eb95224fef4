"""A program that has vLLM generate greedily: `python generate.py FOLDER JSON_OF_TOKEN_IDS JSON_OF_OPTIONS`."""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    folder, prompts, options = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), json.loads(sys.argv[3])
    tokens = options.pop("max_tokens")
    small = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 256, "dtype": "float32"}
    llm = LLM(folder, skip_tokenizer_init=True, **{**small, **options})
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    print("TOKENS", json.dumps([list(each.outputs[0].token_ids) for each in found]))
