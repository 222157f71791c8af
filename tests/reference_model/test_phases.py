"""The choice of training phases: by name, with steps or seconds of their own, and what is refused."""

import pytest

from kvscope import cli
from kvscope.harness.reference_model.phases import PHASES, phases_of, seconds_of


def test_phases_are_chosen_by_name_with_steps_of_their_own():
    chosen = phases_of("p1-512,p0-128", "3,4")
    assert [(phase.name, phase.steps) for phase in chosen] == [("p1-512", 3), ("p0-128", 4)]
    assert phases_of(None, None) == PHASES
    assert seconds_of("1.5,2", chosen) == (1.5, 2.0)
    assert seconds_of(None, chosen) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--phases", "p0"], "there is no phase 'p0'. Known: p0-128"),
        (["--phases", "p0-128", "--steps", "3,4"], "is 2 numbers for 1 phases"),
        (["--phases", "p0-128", "--steps", "many"], "is not a list of numbers"),
        (["--phases", "p0-128", "--steps", "0"], "steps are whole numbers from 1 on"),
        (["--phases", "p0-128", "--seconds", "1,2"], "is 2 numbers for 1 phases"),
        (["--replicas", "0"], "--replicas"),
    ],
)
def test_a_training_that_cannot_be_is_refused_in_one_sentence(tmp_path, capsys, options, message):
    assert cli.run_cli(["backbone", "train", "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
