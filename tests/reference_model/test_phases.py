"""The choice of training phases: by name, with steps or seconds of their own, and what is refused."""

import pytest

from kvscope import cli
from kvscope.harness.reference_model.phases import PHASES, phases_of, seconds_of, steps_before


def test_phases_are_chosen_by_name_with_steps_of_their_own():
    chosen = phases_of("p1-512,p0-128", "3,4")
    assert [(phase.name, phase.steps) for phase in chosen] == [("p1-512", 3), ("p0-128", 4)]
    assert phases_of(None, None) == PHASES
    assert seconds_of("1.5,2", chosen) == (1.5, 2.0)
    assert seconds_of(None, chosen) is None


def test_a_phase_that_was_stopped_keeps_its_planned_steps():
    stopped = [{"name": "p0-128", "steps": 9, "steps_done": 9}, {"name": "p6-forms", "steps": 700, "steps_done": 41}]
    assert steps_before(stopped, "p6-forms") == (41, 700)
    assert [phase.steps for phase in phases_of("p6-forms,p7-forms-long", None, history=stopped)] == [
        700,
        PHASES[-1].steps,
    ]
    assert phases_of("p6-forms", "500", history=stopped)[0].steps == 500
    for history, name in ((stopped, "p0-128"), (stopped[:1], "p0-128"), ((), "p0-128")):
        assert steps_before(history, name) == (0, 0), "one that came to its end, or was not the last, starts anew"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--phases", "p0"], "there is no phase 'p0'. Known: p0-128"),
        (["--phases", "p0-128", "--steps", "3,4"], "is 2 numbers for 1 phases"),
        (["--phases", "p0-128", "--steps", "many"], "is not a list of numbers"),
        (["--phases", "p0-128", "--steps", "0"], "steps are whole numbers from 1 on"),
        (["--phases", "p0-128", "--seconds", "1,2"], "is 2 numbers for 1 phases"),
        (["--phases", "p0-128", "--seconds", "nan"], "a number of seconds above 0"),
        (["--phases", "p0-128", "--seconds", "inf"], "a number of seconds above 0"),
        (["--phases", "p0-128", "--seconds", "0"], "a number of seconds above 0"),
        (["--phases", "p0-128", "--seconds", "9", "--steps", "9"], "give one of them"),
        (["--max-seconds", "nan"], "give seconds from 0 on"),
        (["--max-seconds", "-1"], "give seconds from 0 on"),
        (["--resume", __file__], "has no training_state.json"),
        (["--phases", "left"], "give that folder"),
        (["--replicas", "0"], "--replicas"),
        (["--resume", "nowhere"], "has no training_state.json; name a folder that training has written"),
    ],
)
def test_a_training_that_cannot_be_is_refused_in_one_sentence(tmp_path, capsys, options, message):
    assert cli.run_cli(["backbone", "train", "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"phases": 3}'])
def test_a_training_state_that_is_not_whole_is_refused(tmp_path, capsys, text):
    (tmp_path / "training_state.json").write_text(text)
    assert cli.run_cli(["backbone", "train", "--out", str(tmp_path / "out"), "--resume", str(tmp_path)]) == 2
    assert "is not whole" in capsys.readouterr().err
