"""A GGUF file's tokenizer as transformers reads it: held against the file's vocabulary, mended or refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvscope.errors import UsageError
from kvscope.harness.engine import gguf_tokenizer
from kvscope.harness.engine.gguf_tokenizer import Vocabulary, check, mended

SPACE = "\u2581"
WORDS = ("the", "year", "chunks", "return", "cafe", "model")
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def vocabulary(**changes: Any) -> Vocabulary:
    """A SentencePiece vocabulary as Gemma's files have it: characters, then every beginning of a word."""
    characters = sorted({*"".join(WORDS), *"abcdefghijklmnopqrstuvwxyz0123456789TheGrüßnïvé.:,()+=", "\n", SPACE})
    pieces = [f"{SPACE}{word[:n]}" for n in range(1, 8) for word in WORDS if n <= len(word)]
    tokens = [*SPECIAL, *characters, *dict.fromkeys(pieces), "  "]
    plain = Vocabulary(
        path=Path("some.gguf"), model="llama", tokens=tokens, kinds=[3] * 4 + [1] * (len(tokens) - 4),
        special={"bos": 2, "eos": 1, "unk": 3, "pad": 0}, adds_bos=True,
    )  # fmt: skip
    return replace(plain, **changes)


def by_characters(told: Vocabulary) -> PreTrainedTokenizerFast:
    """What transformers 5.17 makes of Gemma's files: a Unigram model whose scores prefer characters, without BOS."""
    scores = [(token, 0.0 if len(token) == 1 else -10.0 * index) for index, token in enumerate(told.tokens)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>", unk_token="<unk>", pad_token="<pad>"
    )


@pytest.fixture
def told() -> Vocabulary:
    return vocabulary()


def test_a_vocabulary_that_came_out_as_characters_is_mended(told: Vocabulary, tmp_path: Path) -> None:
    stock = by_characters(told)
    assert len(stock("the year", add_special_tokens=False)["input_ids"]) > 2
    with pytest.raises(UsageError, match=r"pieces of its vocabulary are several tokens, as ' th'"):
        check(stock, told)

    right = mended(stock, told)
    piece = {token: index for index, token in enumerate(told.tokens)}
    expected = [2, piece[f"{SPACE}the"], piece[f"{SPACE}year"], piece[f"{SPACE}chunks"]]
    assert right(" the year chunks")["input_ids"] == expected
    assert (right.bos_token_id, right.eos_token_id, right.pad_token_id) == (2, 1, 0)

    right.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(str(tmp_path))
    check(again, told)
    assert again(" the year chunks")["input_ids"] == expected


def test_the_ids_of_end_and_padding_are_the_files(told: Vocabulary) -> None:
    right = gguf_tokenizer._of_sentencepiece(told)
    right.add_bos_token = True
    right.eos_token = "<bos>"
    right.pad_token = None
    assert mended(right, told) is right
    assert (right.eos_token_id, right.pad_token_id) == (1, 0)


def test_bos_is_put_before_texts_where_the_file_says_so_and_nowhere_else(told: Vocabulary) -> None:
    with_bos = mended(gguf_tokenizer._of_sentencepiece(told), told)
    assert with_bos(" the")["input_ids"][0] == 2
    without = replace(told, adds_bos=False)
    with pytest.raises(UsageError, match="texts begin with '<bos>'"):
        check(with_bos, without)
    assert mended(with_bos, without)(" the")["input_ids"][0] != 2


@pytest.mark.parametrize(
    ("model", "said", "adds"),
    [
        ("llama", None, True),
        ("llama", False, False),
        ("gpt2", None, None),
        ("gpt2", True, True),
        ("gemma4", True, None),
    ],
)
def test_what_a_file_says_of_bos(model: str, said: bool | None, adds: bool | None) -> None:
    assert gguf_tokenizer._bos_flag(model, said) is adds


def test_a_tokenizer_that_drops_spaces_and_signs_of_width_is_none_the_worse(told: Vocabulary) -> None:
    right = mended(gguf_tokenizer._of_sentencepiece(told), told)
    right.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), SPACE)]
    )
    check(right, told)


def test_what_cannot_be_mended_is_one_sentence(told: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(told, model="plamo2")
    piece = (" the", told.tokens.index(f"{SPACE}the"))
    monkeypatch.setattr(gguf_tokenizer, "_pieces", lambda told, tokenizer: [piece])
    with pytest.raises(UsageError, match=r"does not read the tokenizer of 'some.gguf'.* Use a newer transformers"):
        mended(by_characters(told), other)


def test_tokens_of_control_stay_whole_and_the_chat_template_stays_behind(told: Vocabulary, tmp_path: Path) -> None:
    turn, users = len(told.tokens), len(told.tokens) + 1
    told = replace(told, tokens=[*told.tokens, "<turn>", "<think>"], kinds=[*told.kinds, 3, 4])
    stock = by_characters(told)
    stock.chat_template = "{{ messages }}"
    mended(stock, told).save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(str(tmp_path))
    piece = told.tokens.index(f"{SPACE}the")
    assert again("<turn> the<think> the", add_special_tokens=False)["input_ids"] == [turn, piece, users, piece]
    assert again.decode([turn, piece], skip_special_tokens=True) == " the"
    assert again.chat_template == "{{ messages }}"


def test_mending_adds_no_token_that_the_model_lacks(told: Vocabulary) -> None:
    told = replace(told, special={"bos": 2, "eos": 1})
    right = mended(by_characters(told), told)
    assert len(right) == len(told.tokens)
    assert (right.pad_token, right.unk_token, right.mask_token) == (None, None, None)


@pytest.mark.parametrize("known", ["the year", "год"])
def test_a_vocabulary_of_few_letters_is_asked_for_what_it_has(told: Vocabulary, known: str) -> None:
    words = known.split()
    tokens = [*SPECIAL, *sorted({*"".join(words), SPACE})]
    tokens += [f"{SPACE}{word[:n]}" for word in words for n in range(1, 1 + len(word))]
    tokens = list(dict.fromkeys(tokens))
    small = replace(told, tokens=tokens, kinds=[3] * 4 + [1] * (len(tokens) - 4))
    right = gguf_tokenizer._of_sentencepiece(small)
    assert mended(right, small) is right
    with pytest.raises(UsageError, match=r"pieces of its vocabulary are several tokens"):
        check(by_characters(small), small)


def test_a_space_before_texts_is_the_files(told: Vocabulary) -> None:
    without = gguf_tokenizer._of_sentencepiece(told)
    with pytest.raises(UsageError, match="a space is not put before texts"):
        mended(without, replace(told, adds_space=True))
    spaced = gguf_tokenizer._of_sentencepiece(told)
    spaced.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    piece = told.tokens.index(f"{SPACE}the")
    assert mended(spaced, told)("the")["input_ids"] == [2, piece]
    right = mended(spaced, replace(told, adds_space=False))
    assert right("the")["input_ids"] != [2, piece]
    assert right(" the")["input_ids"] == [2, piece]


def test_byte_tokens_and_blanks_survive_mending(told: Vocabulary) -> None:
    tokens = [*told.tokens, *(f"<0x{byte:02X}>" for byte in range(256))]
    told = replace(told, tokens=tokens, kinds=[*told.kinds, *[6] * 256])
    right = mended(by_characters(told), told)
    for text in ("the\n\tyear", "a  b   c\r\n", "日本 😀 год"):
        assert right.decode(right(text)["input_ids"], skip_special_tokens=True) == text
