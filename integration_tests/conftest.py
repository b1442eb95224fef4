"""Fixtures that several test folders share."""

import os

# Before anything reads them: tiny models gain nothing from threads, and two test processes on two cores lose by them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["DOBISVD_SPEEDS"] = ""  # no test depends on what another one measured, nor on the user's own file
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)

# How long an example takes says how busy the machine is, not whether it is right. Continuous integration draws the
# same examples every time, so that a failure there is the change's own; everyone else's runs go on searching.
hypothesis.settings.register_profile("untimed", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("untimed")

TOKENIZER_TEXT = [
    "The cat sat on the mat while the dog ran over the hill.",
    "A low-rank factor keeps what the layer does to its inputs, not what the weights look like.",
    "In 1790 the president spoke to both houses about the state of the young republic.",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a real model first: they take minutes, and one begun last would leave the other process idle."""
    items.sort(key=lambda item: item.get_closest_marker("real_model") is None)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens, made here: any text can be encoded, and no hub is needed."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TOKENIZER_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
