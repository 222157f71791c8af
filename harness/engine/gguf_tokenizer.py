"""The tokenizer of a GGUF file: as transformers reads it, held against what the file itself says.

Transformers turns a file's vocabulary into one of its own tokenizers, by rules that differ from version to version. One
that splits text otherwise than the model learnt it gives answers that look like a weak model's. So the vocabulary is
asked: each piece of it has to be one token, and a prompt begins with BOS where the file says so.
"""

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError

SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"
"""What files call a SentencePiece vocabulary and byte-level BPE, whatever the model."""
_SPACE = "\u2581"
_NORMAL_TOKEN = 1
_PIECES, _MOST_SPLIT = 512, 0.05
"""Pieces that are tried, evenly over the vocabulary, and the share of them that may be several tokens: some pieces of
real vocabularies are, because merges before theirs take their parts."""
_TEXTS = ("The year 2031: 7583047 chunks.", "def f(x):\n    return x + 1\n", "Grüße, naïve café")


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer.

    Attributes:
        path: of the file.
        model: kind of vocabulary, ``llama`` (SentencePiece), ``gpt2`` (byte-level BPE), ...
        tokens: text of every token, by id.
        kinds: kind of every token (1 is a normal one); empty where the file has none.
        special: bos, eos, ... -> id.
        adds_bos: whether texts begin with BOS; None where the file does not say and its kind tells nothing, and of
            kinds whose flag is read otherwise (Gemma 4's is set, and its chat template writes BOS itself).
    """

    path: Path
    model: str
    tokens: list[str]
    kinds: list[int]
    special: dict[str, int]
    adds_bos: bool | None

    @classmethod
    def of(cls, path: Path) -> "Vocabulary | None":
        """Return a file's; None where it has none."""
        import gguf

        reader = gguf.GGUFReader(path)

        def value(key: str, default: Any = None) -> Any:
            field = reader.get_field(key)
            return default if field is None else field.contents()

        tokens = value("tokenizer.ggml.tokens")
        if not tokens:
            return None
        model = str(value("tokenizer.ggml.model", ""))
        names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        found = {name: value(f"tokenizer.ggml.{key}_token_id") for key, name in names.items()}
        return cls(
            path=path,
            model=model,
            tokens=[str(each) for each in tokens],
            kinds=[int(each) for each in value("tokenizer.ggml.token_type", [])],
            special={name: int(each) for name, each in found.items() if each is not None and each < len(tokens)},
            adds_bos=_bos_flag(model, value("tokenizer.ggml.add_bos_token")),
        )


def _bos_flag(model: str, said: Any) -> bool | None:
    if model not in (SENTENCEPIECE, BYTE_LEVEL):
        return None
    # llama.cpp begins with BOS where a SentencePiece file does not say.
    return bool(said) if said is not None else (True if model == SENTENCEPIECE else None)


def mended(tokenizer: Any, vocabulary: Vocabulary) -> Any:
    """Return a tokenizer that transformers made of a GGUF file, mended where it differs from the file.

    Raises:
        UsageError: it cannot be mended.
    """
    if _fault(tokenizer, vocabulary) is not None and vocabulary.model == SENTENCEPIECE:
        tokenizer = _of_sentencepiece(vocabulary)
    for name, token in vocabulary.special.items():
        if getattr(tokenizer, f"{name}_token_id", None) != token:
            setattr(tokenizer, f"{name}_token", vocabulary.tokens[token])
    if _bos_fault(tokenizer, vocabulary) is not None:
        tokenizer.add_bos_token = vocabulary.adds_bos
    check(tokenizer, vocabulary)
    return tokenizer


def check(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Check that a tokenizer splits text as a GGUF file's vocabulary does.

    Raises:
        UsageError: it does not.
    """
    import transformers

    fault = _fault(tokenizer, vocabulary) or _bos_fault(tokenizer, vocabulary)
    if fault is not None:
        raise UsageError(
            f"transformers {transformers.__version__} does not read the tokenizer of '{vocabulary.path}' as the file "
            f"has it: {fault}. Use a newer transformers, or give the model as a folder with its own tokenizer."
        )


def _fault(tokenizer: Any, vocabulary: Vocabulary) -> str | None:
    """Say how the splitting differs from the vocabulary; None where it does not."""
    pieces = _pieces(vocabulary, tokenizer)
    split = [piece for piece, token in pieces if _ids(tokenizer, piece) != [token]]
    if len(split) > _MOST_SPLIT * len(pieces):
        return f"{len(split)} of {len(pieces)} pieces of its vocabulary are several tokens, as {split[0]!r}"
    for text in _TEXTS:
        back = tokenizer.decode(_ids(tokenizer, text), skip_special_tokens=True)
        if _letters(back) != _letters(text):
            return f"{text!r} comes back as {back!r}"
    return None


def _letters(text: str) -> str:
    """Return what normalisation and rules about spaces leave of a text."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _bos_fault(tokenizer: Any, vocabulary: Vocabulary) -> str | None:
    adds = _adds_bos(tokenizer, vocabulary)
    if adds is None or vocabulary.adds_bos is None or adds is vocabulary.adds_bos:
        return None
    return f"texts {'begin' if adds else 'do not begin'} with {vocabulary.tokens[vocabulary.special['bos']]!r}"


def _adds_bos(tokenizer: Any, vocabulary: Vocabulary) -> bool | None:
    """Whether texts begin with BOS; None where the file names no BOS."""
    bos = vocabulary.special.get("bos")
    return None if bos is None else bool(list(tokenizer(_TEXTS[0])["input_ids"])[:1] == [bos])


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _pieces(vocabulary: Vocabulary, tokenizer: Any) -> list[tuple[str, int]]:
    """Return texts that are one token each, and their ids: words of letters behind a space, evenly over the ids."""
    space = _SPACE if vocabulary.model == SENTENCEPIECE else "\u0120"  # byte-level BPE has its own sign of a space
    words = [
        (f" {token[1:]}", index)
        for index, token in enumerate(vocabulary.tokens)
        if token[:1] == space and len(token) > 2 and token[1:].isascii() and token[1:].isalpha()
        and (not vocabulary.kinds or vocabulary.kinds[index] == _NORMAL_TOKEN)
    ]  # fmt: skip
    step = max(1, len(words) // _PIECES)
    chosen = words[::step]
    if vocabulary.model != SENTENCEPIECE or not chosen:
        return chosen
    # Where a space is put before a text, the piece itself brings none.
    first, token = chosen[0]
    is_prefixed = _ids(tokenizer, first.strip())[:1] == [token]
    return [(word.strip() if is_prefixed else word, index) for word, index in chosen]


def _of_sentencepiece(vocabulary: Vocabulary) -> Any:
    """Return a tokenizer of a SentencePiece vocabulary without merges: they are those of its pieces, in their order.

    Of Gemma's vocabulary the scores tell no order; the place does, as in every one that is BPE: a piece stands behind
    what it is merged from. Tokens of several spaces are stored as such, and looked up by the sign for one.
    """
    from transformers.models.gemma.tokenization_gemma import GemmaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    spelled = [_SPACE * len(each) if " " in each and not each.strip() else each for each in vocabulary.tokens]
    ids = {each: index for index, each in enumerate(spelled)}
    merges = generate_merges(ids, {each: -index for index, each in enumerate(spelled)})
    special = {f"{name}_token": vocabulary.tokens[index] for name, index in vocabulary.special.items()}
    return GemmaTokenizer(vocab=ids, merges=merges, **special)
