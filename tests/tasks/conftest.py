"""The reference tokenizer, and one of another family (SentencePiece-like: spaces become marks, one at the start)."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.tasks.needle import NOISE


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER))


def _trained(core: Tokenizer) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([NOISE + "\nOne of the special magic numbers for it is: 1234567.\n"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def gpt2_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's own split and no special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _trained(core)


@pytest.fixture(scope="session")
def line_joining() -> PreTrainedTokenizerFast:
    """A tokenizer without any split: its merges run across line breaks."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return _trained(core)
