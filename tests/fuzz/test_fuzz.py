"""A short fuzz of every reader: good inputs with changes, and bytes at random. ``make fuzz`` does the long one."""

import random

import pytest
from fuzz_targets import GOOD, SEEDS, TARGETS, check
from hypothesis import given, settings
from hypothesis import strategies as st

WORDS = (
    b"=",
    b":",
    b",",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b"\n",
    b"\x00",
    b"\xff",
    b"1e999",
    b"-1",
    b"nan",
    b"null",
    b"k",
    b"9" * 40,
)


def changed(seed: bytes, draws: random.Random) -> bytes:
    """Return a good input with a few changes, as a mutating fuzzer makes them."""
    found = bytearray(seed)
    for _ in range(draws.randint(1, 4)):
        at = draws.randint(0, len(found))
        kind = draws.randrange(5)
        if kind == 0:
            found[at:at] = draws.choice(WORDS)
        elif kind == 1:
            del found[at : at + draws.randint(1, 9)]
        elif kind == 2:
            found[at : at + 1] = bytes([draws.randrange(256)])
        elif kind == 3:
            found[at:at] = found[draws.randint(0, at) : at]
        else:
            del found[at:]
    return bytes(found)


@pytest.mark.parametrize("name", GOOD)
def test_what_is_fuzzed_begins_with_good_input(name: str) -> None:
    TARGETS[name](SEEDS[name][0])


@pytest.mark.parametrize("name", TARGETS)
def test_good_inputs_with_changes_raise_nothing_else(name: str) -> None:
    draws = random.Random(name)
    for seed in SEEDS.get(name, (b"{}",)):
        check(TARGETS[name], seed)
        for _ in range(60):
            check(TARGETS[name], changed(seed, draws))


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=40)
@given(data=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_input_raises_nothing_else(name: str, data: bytes) -> None:
    check(TARGETS[name], data)
