"""When decoding stops: end-of-sequence tokens, stop strings over one token or several, the length."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer as Tokenizer_
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvscope.harness.engine.answer_end import AnswerEnd
from kvscope.tasks.answers import stop_index

EOS, TURN = 0, 1
PIECES = [
    b"<eos>",
    b"<turn>",
    b"\n",
    b"\n\n",
    b"Par",
    b"is",
    b"Paris\nmo",
    b"ST",
    b"OP",
    "é".encode()[:1],
    "é".encode()[1:],
    b" ",
]
_, _, NEWLINE, TWO, PAR, IS, HELD, ST, OP, FIRST, SECOND, SPACE = range(len(PIECES))


class Tokenizer:
    """Bytes for each token; the first two are special."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        kept = [PIECES[token] for token in ids if not (skip_special_tokens and token in (EOS, TURN))]
        return b"".join(kept).decode(errors="replace")


def slowly(loaded: Any, ids: list[int], stop: tuple[str, ...]) -> tuple[int, str | None]:
    """The same by the definition: the whole text, written at every token."""
    for n in range(1, len(ids) + 1):
        if ids[n - 1] in loaded.eos_ids:
            return n, "eos"
        text = loaded.tokenizer.decode(ids[:n], skip_special_tokens=True)
        if stop_index(text, stop) is not None:
            return n, "stop"
    return len(ids), "length"


def quickly(loaded: Any, ids: list[int], stop: tuple[str, ...]) -> tuple[int, str | None]:
    end = AnswerEnd(loaded, stop_strings=stop)
    for n in range(1, len(ids) + 1):
        ended = end.reason(ids[:n], max_new_tokens=len(ids))
        if ended is not None:
            return n, ended
    raise AssertionError("the length ends every answer")


TEXTS = ["Paris\n", "a b  c", "né", "日本語", " \n\n", "STOP", "Q: 5.", "end", "🙂", "\t", "x"]


def byte_level() -> Any:
    """As Llama 3's and Qwen's: tokens are bytes of words with their spaces."""
    tokenizer = Tokenizer_(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<eos>", "<turn>"]
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def sentence_piece() -> Any:
    """As Llama 2's, Mistral's and Gemma's: pieces with ▁ for spaces, bytes for what has none."""
    pieces = ["<eos>", "<turn>", "<unk>", *(f"<0x{n:02X}>" for n in range(256))]
    pieces += ["▁", "▁a", "▁Paris", "a", "b", "S", "T", "O", "P", "ST", "OP", "▁▁", "é", "n", ":", ".", "▁Q"]
    tokenizer = Tokenizer_(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>",
                                     byte_fallback=True))  # fmt: skip
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level, sentence_piece])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    own = request.param()
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>", additional_special_tokens=["<turn>"])


STOPS = [("\n",), ("\n\n", "STOP"), ("OP",), ("é",), ("本",), (" b",), ("a ",), (" ",), ("🙂",), ("Q:", ".")]


@pytest.mark.parametrize("stop", STOPS, ids=repr)
def test_every_end_is_that_of_the_whole_text(tokenizer: Any, stop: tuple[str, ...]) -> None:
    """Random tokens, so that characters break anywhere."""
    loaded: Any = SimpleNamespace(tokenizer=tokenizer, eos_ids=frozenset({0}))
    dice = random.Random(7)
    likely = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in [*TEXTS, *stop]]
    ends = []
    for _ in range(150):
        ids: list[int] = []
        while len(ids) < 12:
            ids += dice.choice(likely) if dice.random() < 0.7 else [dice.randrange(1, len(tokenizer))]
        ends.append(slowly(loaded, ids, stop))
        assert quickly(loaded, ids, stop) == ends[-1], tokenizer.convert_ids_to_tokens(ids)
    assert len(set(ends)) > 2


def test_texts_are_written_where_they_can_have_ended_alone() -> None:
    """A sequence's 200 tokens are not written 200 times."""
    written: list[int] = []

    class Counting(Tokenizer):
        def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
            written.append(len(ids))
            return super().decode(ids, skip_special_tokens=skip_special_tokens)

    loaded: Any = SimpleNamespace(tokenizer=Counting(), eos_ids=frozenset({EOS}))
    ids = [PAR, IS, SPACE] * 66 + [TWO, PAR]
    assert quickly(loaded, ids, ("\n",)) == (199, "stop")
    assert written == [1, 1, 1, 1, 199]


def steps(ids: list[int], stop: tuple[str, ...]) -> tuple[int, str | None]:
    """Return after how many of these tokens the answer ends, and why."""
    loaded: Any = SimpleNamespace(tokenizer=Tokenizer(), eos_ids=frozenset({EOS}))
    return quickly(loaded, ids, stop)


@pytest.mark.parametrize(
    ("ids", "stop", "ends"),
    [
        ([TWO, PAR, IS], ("\n",), (3, "length")),
        ([NEWLINE, SPACE, PAR, IS, NEWLINE, PAR], ("\n",), (5, "stop")),
        ([HELD, PAR], ("\n",), (1, "stop")),
        ([NEWLINE, PAR, ST, OP, PAR], ("STOP",), (4, "stop")),
        ([ST, OP, PAR], ("STOP",), (2, "stop")),
        ([PAR, NEWLINE, NEWLINE, PAR], ("\n\n",), (3, "stop")),
        ([NEWLINE, NEWLINE, PAR, TWO], ("\n\n",), (4, "stop")),
        ([PAR, FIRST, SECOND, PAR], ("é",), (3, "stop")),
        ([PAR, FIRST], ("\n",), (2, "length")),
        ([EOS, PAR], ("\n",), (1, "eos")),
        ([NEWLINE, EOS, PAR], ("\n",), (2, "eos")),
        ([PAR, TURN, PAR], ("<turn>",), (2, "stop")),
        ([PAR, TURN, PAR], ("\n",), (3, "length")),
        ([NEWLINE, NEWLINE, NEWLINE], ("\n",), (3, "length")),
    ],
)
def test_an_answer_ends_where_it_should(ids: list[int], stop: tuple[str, ...], ends: tuple[int, str]) -> None:
    assert steps(ids, stop) == ends
