"""When decoding stops: end-of-sequence tokens, stop strings over one token or several, the length."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvscope.harness.engine.answer_end import AnswerEnd

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


def steps(ids: list[int], stop: tuple[str, ...]) -> tuple[int, str | None]:
    """Return after how many of these tokens the answer ends, and why."""
    loaded: Any = SimpleNamespace(tokenizer=Tokenizer(), eos_ids=frozenset({EOS}))
    end = AnswerEnd(loaded, stop_strings=stop)
    for n in range(1, len(ids) + 1):
        ended = end.reason(ids[:n], max_new_tokens=len(ids))
        if ended is not None:
            return n, ended
    raise AssertionError("the length ends every answer")


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
