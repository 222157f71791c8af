"""The reference model's tokenizer: byte-level BPE with three-digit groups and, inside UUIDs, pairs of hex digits.

Values become few tokens from a large set: a 7-digit number is three tokens, a UUID sixteen pairs and four dashes. It is
trained on half of the training-split words, so evaluation keys are spelled like the other half: in pieces.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvscope.files import first_line, whole_file, writing
from kvscope.harness.reference_model import documents_long_qa_templates, templates_ruler
from kvscope.harness.reference_model.templates import all_static_text
from kvscope.tasks import prose
from kvscope.tasks.draws import Draws
from kvscope.tasks.words import words

VOCAB_TOKENS = 8192
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>"]
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

_HEX2 = "[0-9a-f]{2}"
_LAST_GROUP = "|".join(f"-[0-9a-f]{{4}}-[0-9a-f]{{{n}}}" for n in range(2, 14, 2))
# First match wins: UUID parts, then words with their leading mark, digit groups, punctuation, white space.
_SPLIT = "|".join(
    (
        r"\s(?=[0-9a-f]{8}-[0-9a-f]{4}-)",
        rf"{_HEX2}(?=(?:{_HEX2}){{0,3}}-[0-9a-f]{{4}})",
        rf"{_HEX2}(?<={_LAST_GROUP})",
        r"-(?=[0-9a-f]{4}-)",
        r"-(?=[0-9a-f]{12}(?![0-9a-zA-Z]))",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def _corpus(seed: int) -> Iterator[str]:
    """Yield the training text: every digit group and hex pair often enough to become one token, words, prose."""
    draws = Draws("tokenizer", seed)
    groups = [f"{n:03d}" for n in range(1000)] + [f"{n:02d}" for n in range(100)]
    for _ in range(400):
        yield " ".join(groups)
        yield " ".join(draws.uuid() for _ in range(150))
    lists = words("train")
    # Every second word only: the rest is spelled in pieces during training, as every evaluation key will be.
    adjectives, nouns = lists.adjectives[::2], lists.nouns[::2]
    for _ in range(10):
        for noun in nouns:
            yield f"the {draws.pick(adjectives)} {noun} and {draws.pick(adjectives)}-{noun}"
    for _ in range(2000):
        yield prose.line(draws)
    for _ in range(400):
        yield all_static_text()
        yield documents_long_qa_templates.static_text()
        yield templates_ruler.static_text()
        yield templates_ruler.random_text(draws)


def train_tokenizer(*, seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same seed and ``tokenizers`` release give the same file."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_TOKENS,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(seed), trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
        padding_side="left",
    )


def save_tokenizer(folder: Path, *, seed: int = 0) -> PreTrainedTokenizerFast:
    """Train and write ``tokenizer.json`` and its config into ``folder``."""
    tokenizer = train_tokenizer(seed=seed)
    write_tokenizer(tokenizer, folder)
    return tokenizer


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a tokenizer under the class name every transformers release knows.

    Raises:
        EnvironmentProblem: the disk is full, or the place cannot be written.
    """
    with writing(folder):
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # tokenizers raises a bare one
            (folder / "tokenizer.json").unlink(missing_ok=True)  # half of one would be taken for a tokenizer
            raise OSError(first_line(error)) from error
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
