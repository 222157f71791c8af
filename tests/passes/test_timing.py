"""What stands beside a time: spread and load."""

import os

import pytest

from kvscope.harness.passes.timing import host_load, spread_s


def test_the_spread_of_eleven_steps_is_that_of_the_second_and_the_tenth() -> None:
    assert spread_s([float(step) for step in reversed(range(11))]) == (1.0, 9.0)


def test_equal_steps_and_a_single_one_have_no_spread() -> None:
    assert spread_s([0.3] * 4) == spread_s([0.3]) == (0.3, 0.3)


def test_a_system_that_tells_no_load_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (2.5, 9.0, 9.0), raising=False)
    assert host_load()["load_1min"] == 2.5
    monkeypatch.delattr(os, "getloadavg")
    assert host_load()["load_1min"] is None
