"""Small tokenizers that split and join text as those of widely used models do, trained on prompts of the tasks."""

import json
from collections.abc import Callable
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.tasks.registry import create_task

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_MARK = "▁"


@cache
def corpus() -> tuple[str, ...]:
    reference = AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER))
    names = ("niah_single_1", "niah_multikey_2", "niah_multivalue", "vt", "cwe", "fwe", "long_qa")
    texts = [create_task(name).build(reference, length_tokens=2048, sample=0, seed=1).text for name in names]
    return (*texts, *(text.replace("\n", "\n\n") for text in texts))


def _finished(core: Tokenizer, trainer: object, *, bos: str | None = None) -> PreTrainedTokenizerFast:
    core.train_from_iterator(corpus(), trainer)
    made = json.loads(core.to_str())
    made["added_tokens"] = [each for each in made["added_tokens"] if each["content"] not in _BYTES]  # they are text
    core = Tokenizer.from_str(json.dumps(made))
    special = {}
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
        special = {"bos_token": bos}
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **special)


def _byte_level(pre: Callable[[], object], *, vocab: int = 900, bos: str | None = None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[bos] if bos else [],
        max_token_length=16,  # or whole lines of the tasks' noise would be tokens, and prompts hundreds of kilobytes
        show_progress=False,
    )
    return _finished(core, trainer, bos=bos)


def _regex(pattern: str) -> object:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentencepiece_bpe(*, gemma: bool) -> PreTrainedTokenizerFast:
    """Spaces as marks and bytes for unknown characters; Llama 2's splits nowhere, Gemma's keeps the text's start."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    parts = [decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        core.normalizer = normalizers.Replace(" ", _MARK)
        core.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend(_MARK), normalizers.Replace(" ", _MARK)])
        parts.append(decoders.Strip(" ", 1, 0))
    core.decoder = decoders.Sequence(parts)
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<unk>", "<s>", *_BYTES],
        limit_alphabet=60,
        max_token_length=16,
        show_progress=False,
    )
    return _finished(core, trainer, bos="<s>")


def _unigram(*, scheme: str, collapses: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram())
    if collapses:  # T5: every stretch of white space is one space, and the text's ends have none
        core.normalizer = normalizers.Sequence(
            [normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.NFKC()]
        )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>"],
        unk_token="<unk>",
        show_progress=False,
        initial_alphabet=[chr(code) for code in (10, *range(33, 127))],
    )
    return _finished(core, trainer, bos="<s>")


def _lowercase() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    return _finished(core, trainer)


def words_only() -> PreTrainedTokenizerFast:
    """A vocabulary of whole words: the prompt's numbers and names are unknown to it."""
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=150, special_tokens=["<unk>"], show_progress=False)
    return _finished(core, trainer)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt2": lambda: _byte_level(lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2-prefix-space": lambda: _byte_level(lambda: pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "smollm2": lambda: _byte_level(
        lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "llama-3": lambda: _byte_level(lambda: _regex(LLAMA_3), bos="<|begin_of_text|>"),
    "qwen": lambda: _byte_level(lambda: _regex(QWEN)),
    "mistral-tekken": lambda: _byte_level(lambda: _regex(TEKKEN), bos="<s>"),
    "digits-with-newline": lambda: _byte_level(lambda: _regex(r"\d+\.?\n*|[^\d]+")),
    "bytes": lambda: _byte_level(lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), vocab=257),
    "no-split": lambda: _byte_level(lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "llama-2": lambda: _sentencepiece_bpe(gemma=False),
    "gemma": lambda: _sentencepiece_bpe(gemma=True),
    "unigram-always": lambda: _unigram(scheme="always"),
    "unigram-first": lambda: _unigram(scheme="first"),
    "unigram-t5": lambda: _unigram(scheme="always", collapses=True),
    "lowercase": _lowercase,
}
