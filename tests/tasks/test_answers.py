"""Where an answer ends."""

import pytest

from kvscope.tasks.answers import answer_of, stop_index


@pytest.mark.parametrize(
    ("text", "stop", "answer"),
    [
        ("Paris\nmore", ("\n",), "Paris"),
        ("\n\nParis", ("\n",), "Paris"),
        (" \n Paris\nmore", ("\n",), "Paris"),
        ("\u2028\t\r\n Paris \n", ("\n",), "Paris"),
        ("\n\nParis\n\nLyon", ("\n\n",), "Paris"),
        ("\nParis is\nnice\n\nLyon", ("\n\n",), "Paris is\nnice"),
        (" a b", (" ",), "a"),
        ("Paris", ("\n",), "Paris"),
        ("", ("\n",), ""),
        ("\n \n", ("\n",), ""),
        ("Paris\nmore", (), "Paris\nmore"),
        # A stop string that says something ends the answer wherever it stands.
        ("Question: next", ("Question:",), ""),
        ("\n\nQuestion: next", ("\nQuestion:",), ""),
        ("\nParis\nQuestion: next", ("\nQuestion:", "more"), "Paris"),
        ("Paris</s> more </s>", ("more", "</s>"), "Paris"),
        ("aab", ("ab",), "a"),
        ("Paris \ufffd", ("\n",), "Paris \ufffd"),
    ],
)
def test_white_space_before_an_answer_does_not_end_it(text: str, stop: tuple[str, ...], answer: str) -> None:
    assert answer_of(text, stop) == answer


def test_the_first_of_several_stop_strings_decides() -> None:
    assert stop_index("one two three", ("three", "two", "four")) == 4
    assert stop_index("one two three", ("four",)) is None
