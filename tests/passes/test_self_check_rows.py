"""The self-check in a run: who makes it, what rows say of it, and what a difference does."""

import pytest
from in_process import run_here
from tiny import MakeConfig

import kvscope
from kvscope.errors import UsageError
from kvscope.harness.engine import self_check as module
from kvscope.harness.engine.self_check import SelfCheck


def _run(config):
    return kvscope.run(config, progress=False)


def test_rows_of_every_pass_say_that_the_check_passed(small: MakeConfig, monkeypatch, one_thread) -> None:
    run_here(monkeypatch)
    found = _run(small(footprint=True, footprint_decode_tokens=2, methods=["dense"]))
    assert list(found.samples["self_check"]) == ["passed", "passed"]
    assert list(found.footprint["self_check"]) == ["passed"]


def test_a_check_that_was_left_out_stands_in_the_rows(small: MakeConfig, monkeypatch, one_thread) -> None:
    run_here(monkeypatch)
    monkeypatch.setattr(module, "self_check", None)  # nobody calls it
    found = _run(small(footprint=True, footprint_decode_tokens=2, methods=["dense"], self_check=False))
    assert set(found.samples["self_check"]) == set(found.footprint["self_check"]) == {"skipped"}


def test_a_run_without_an_accuracy_process_has_none(small: MakeConfig, monkeypatch, one_thread) -> None:
    run_here(monkeypatch)
    search = {"throughput": True, "tasks": (), "max_batch": 1, "footprint_decode_tokens": 2, "footprint": True}
    found = _run(small(methods=["dense"], **search))
    assert list(found.throughput["self_check"]) == ["not_run"]


def test_a_difference_ends_the_run_before_a_row(small: MakeConfig, monkeypatch, one_thread) -> None:
    monkeypatch.setattr(module, "_checked", lambda _: SelfCheck(difference=0.28, tolerance=1e-3, n_tokens=146))
    with pytest.raises(UsageError, match=r"differ from its own forward by 0\.28 of their size"):
        _run(small())


def test_a_folder_goes_on_with_and_without_the_check(small: MakeConfig) -> None:
    assert small(self_check=False).identity() == small().identity()
