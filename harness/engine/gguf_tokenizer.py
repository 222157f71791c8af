"""The tokenizer of a GGUF file: as transformers reads it, held against what the file itself says.

Transformers turns a file's vocabulary into one of its own tokenizers, by rules that differ from version to version. One
that splits text otherwise than the model learnt it gives answers that look like a weak model's. So the vocabulary is
asked: each piece of it has to be one token, and a prompt begins with BOS, or a space, where the file says so.
"""

import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError

SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"
"""What files call a SentencePiece vocabulary and byte-level BPE, whatever the model."""
_SPACE = "\u2581"
_NORMAL_TOKEN, _CONTROL_TOKEN, _USERS_TOKEN = 1, 3, 4
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
        adds_space: whether a space is put before texts; None where the file does not say, and of other kinds than
            SentencePiece.
    """

    path: Path
    model: str
    tokens: list[str]
    kinds: list[int]
    special: dict[str, int]
    adds_bos: bool | None
    adds_space: bool | None = None

    @classmethod
    def of(cls, path: Path) -> "Vocabulary | None":
        """Return a file's; None where it has none.

        Raises:
            UsageError: one of its special tokens is outside it.
        """
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
        special = {}
        for key, name in names.items():
            token = value(f"tokenizer.ggml.{key}_token_id")
            if token is None:
                continue
            if not 0 <= int(token) < len(tokens):
                raise UsageError(
                    f"The GGUF file '{path}' names token {token} as its {key}_token_id, and has {len(tokens)} tokens: "
                    "take another file, or give the model as a folder with its own tokenizer."
                )
            special[name] = int(token)
        space = value("tokenizer.ggml.add_space_prefix") if model == SENTENCEPIECE else None
        return cls(
            path=path,
            model=model,
            tokens=[str(each) for each in tokens],
            kinds=[int(each) for each in value("tokenizer.ggml.token_type", [])],
            special=special,
            adds_bos=_bos_flag(model, value("tokenizer.ggml.add_bos_token")),
            adds_space=None if space is None else bool(space),
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
    if vocabulary.model == SENTENCEPIECE and (_fault(tokenizer, vocabulary) or _space_fault(tokenizer, vocabulary)):
        template = getattr(tokenizer, "chat_template", None)
        if vocabulary.adds_space is None:
            vocabulary = replace(vocabulary, adds_space=_adds_space(tokenizer, vocabulary))
        tokenizer = _of_sentencepiece(vocabulary)
        tokenizer.chat_template = template
    _keep_whole(tokenizer, vocabulary)
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

    fault = _fault(tokenizer, vocabulary) or _space_fault(tokenizer, vocabulary) or _bos_fault(tokenizer, vocabulary)
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
        if not _is_spelled(text, vocabulary):
            continue
        back = tokenizer.decode(_ids(tokenizer, text), skip_special_tokens=True)
        if _letters(back) != _letters(text):
            return f"{text!r} comes back as {back!r}"
    return None


def _is_spelled(text: str, vocabulary: Vocabulary) -> bool:
    """Whether a vocabulary has every character of a text, or every byte; small ones and those of one script do not."""
    from tokenizers import pre_tokenizers

    known = set(vocabulary.tokens)
    if "<0x41>" in known:
        return True
    letters = "".join(text.split())
    if vocabulary.model == BYTE_LEVEL:
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(letters)
        letters = "".join(part for part, _ in split)
    return known.issuperset(letters)


def _letters(text: str) -> str:
    """Return what normalisation and rules about spaces leave of a text."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _bos_fault(tokenizer: Any, vocabulary: Vocabulary) -> str | None:
    adds = _adds_bos(tokenizer, vocabulary)
    if adds is None or vocabulary.adds_bos is None or adds is vocabulary.adds_bos:
        return None
    return f"texts {'begin' if adds else 'do not begin'} with {vocabulary.tokens[vocabulary.special['bos']]!r}"


def _space_fault(tokenizer: Any, vocabulary: Vocabulary) -> str | None:
    adds = None if vocabulary.adds_space is None else _adds_space(tokenizer, vocabulary)
    if adds is None or adds is vocabulary.adds_space:
        return None
    return f"a space is {'' if adds else 'not '}put before texts"


def _adds_space(tokenizer: Any, vocabulary: Vocabulary) -> bool | None:
    """Whether texts begin with a space that is not theirs; None where no piece tells."""
    words = _words(vocabulary)
    if not words:
        return None
    first = tokenizer.convert_ids_to_tokens(_ids(tokenizer, words[0][0].strip())[:1])
    return bool(first) and str(first[0]).startswith(_SPACE)


def _adds_bos(tokenizer: Any, vocabulary: Vocabulary) -> bool | None:
    """Whether texts begin with BOS; None where the file names no BOS."""
    bos = vocabulary.special.get("bos")
    return None if bos is None else bool(list(tokenizer(_TEXTS[0])["input_ids"])[:1] == [bos])


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _pieces(vocabulary: Vocabulary, tokenizer: Any) -> list[tuple[str, int]]:
    """Return texts that are one token each, and their ids: words of letters behind a space, evenly over the ids."""
    words = _words(vocabulary)
    chosen = words[:: max(1, len(words) // _PIECES)]
    if vocabulary.model == SENTENCEPIECE and _adds_space(tokenizer, vocabulary):
        return [(word.strip(), index) for word, index in chosen]  # the space is put before it
    return chosen


def _words(vocabulary: Vocabulary) -> list[tuple[str, int]]:
    """Return all words of ASCII letters behind a space, and their ids; of a vocabulary without one those of others."""
    from tokenizers import decoders

    space = _SPACE if vocabulary.model == SENTENCEPIECE else "\u0120"  # byte-level BPE has its own sign of a space
    bytes_of = decoders.ByteLevel()
    found = []
    for index, token in enumerate(vocabulary.tokens):
        if token[:1] != space or (vocabulary.kinds and vocabulary.kinds[index] != _NORMAL_TOKEN):
            continue
        word = bytes_of.decode([token[1:]]) if vocabulary.model == BYTE_LEVEL else token[1:]
        if len(word) > 1 and word.isalpha():
            found.append((f" {word}", index))
    return [each for each in found if each[0].isascii()] or found


def _keep_whole(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Have tokens that a file calls control tokens, or its user's, be found in texts before these are split."""
    from tokenizers import AddedToken

    added, known = tokenizer.added_tokens_decoder, tokenizer.get_vocab()
    special, plain = [], []
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=False)):
        # One that the tokenizer spells otherwise would be a token more than the model has.
        if index in added or not token or known.get(token) != index:
            continue
        if kind == _CONTROL_TOKEN:
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USERS_TOKEN:
            plain.append(AddedToken(token, normalized=False, special=False))
    if special:
        tokenizer.add_tokens(special, special_tokens=True)
    if plain:
        tokenizer.add_tokens(plain)


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
    # What is left out gets the class's own name, a token more than the model has.
    names = ("bos", "eos", "unk", "pad", "mask")
    told = {**({"mask": ids["<mask>"]} if "<mask>" in ids else {}), **vocabulary.special}
    special = {f"{name}_token": vocabulary.tokens[told[name]] if name in told else None for name in names}
    return GemmaTokenizer(vocab=ids, merges=merges, **special)
