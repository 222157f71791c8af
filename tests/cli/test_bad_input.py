"""Bad input: each kind is one clear sentence on stderr, exit 2, and no traceback."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import pytest

from kvscope import cli
from kvscope.errors import EnvironmentProblem
from kvscope.harness.passes.process import worker_environment

Refuse = Callable[..., str]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Return a caller of the command line that demands exit 2 and one sentence, and returns it."""

    def call(*arguments: str) -> str:
        code = cli.run_cli(arguments)
        out, err = capsys.readouterr()
        assert code == 2, err
        assert out == ""
        assert err.startswith("kvscope: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err.removeprefix("kvscope: ").rstrip("\n")

    return call


@pytest.fixture
def tiny(tiny_model: str, tmp_path: Path) -> list[str]:
    """Return a good command over the tiny model, to which one bad thing is added."""
    return [
        "run", "--model", tiny_model, "-m", "dense", "--task", "niah_single_1", "-l", "512", "-n", "1",
        "--max-new-tokens", "2", "--no-footprint", "--device", "cpu", "--out", str(tmp_path / "run"), "-q",
    ]  # fmt: skip


def test_unknown_command(refuse: Refuse) -> None:
    assert refuse("rnu") == "There is no command 'rnu'. Did you mean 'run'?"


def test_unknown_option(refuse: Refuse) -> None:
    assert "No such option: --sampels" in refuse("run", "--sampels", "3")


@pytest.mark.parametrize(("arguments", "what"), [
    (("report", ""), "An argument"),
    (("reproduce", "claims", ""), "An argument"),
    (("reproduce", "lsa", "--out", ""), "--out"),
    (("reproduce", "setup", "--out="), "--out"),
    (("study", "attention-figure", "a.csv", "-o", ""), "-o"),
])  # fmt: skip
def test_an_empty_path_is_not_the_folder_one_stands_in(
    refuse: Refuse, arguments: tuple[str, ...], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refuse(*arguments) == f"{what} is '', and nothing is called so: give a value, or leave it out."
    assert not list(tmp_path.iterdir())


def test_unknown_method(refuse: Refuse, tiny: list[str]) -> None:
    assert refuse(*tiny, "-m", "recensy") == "There is no method 'recensy'. Did you mean 'recency'?"


def test_unknown_method_option(refuse: Refuse, tiny: list[str]) -> None:
    assert "Did you mean 'recency_tokens'?" in refuse(*tiny, "-m", "recency:recency_token=5")


def test_malformed_method(refuse: Refuse, tiny: list[str]) -> None:
    assert "'fraction' in method 'random:fraction' is not key=value" in refuse(*tiny, "-m", "random:fraction")


def test_wrong_type_of_a_method_option(refuse: Refuse, tiny: list[str]) -> None:
    assert "option 'fraction' expects a number, got 'half'" in refuse(*tiny, "-m", "random:fraction=half")


def test_unknown_task(refuse: Refuse, tiny: list[str]) -> None:
    assert "Did you mean 'niah_single_1'?" in refuse(*tiny, "--task", "niah_singl_1")


def test_unknown_model(refuse: Refuse, tiny: list[str]) -> None:
    assert "Did you mean 'reference'?" in refuse(*tiny, "--model", "refrence")


def test_unknown_config_key(refuse: Refuse, tiny: list[str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("sample: 3\n")
    assert refuse(*tiny, str(file)) == f"Unknown key 'sample' in {file}. Did you mean 'samples'?"
    assert "Did you mean 'seed'?" in refuse(*tiny, "--set", "seeed=3")


def test_missing_config_file(refuse: Refuse, tiny: list[str]) -> None:
    assert refuse(*tiny, "absent.yaml") == "Configuration file 'absent.yaml' does not exist."


def test_length_over_the_models_maximum(refuse: Refuse, tiny: list[str]) -> None:
    assert "Length 8,192 is over the 4,096 tokens" in refuse(*tiny, "-l", "8k")


def test_length_too_small_for_the_task(refuse: Refuse, tiny: list[str]) -> None:
    assert "too short for task 'niah_single_1': it needs at least" in refuse(*tiny, "-l", "16")


def test_length_that_is_none(refuse: Refuse, tiny: list[str]) -> None:
    text = refuse(*tiny, "-l", "4q")
    assert text.startswith("lengths_tokens in the options is '4q', expected a whole number: write tokens as 4096, 4k")


@pytest.mark.parametrize("samples", ["0", "-3"])
def test_no_samples(refuse: Refuse, tiny: list[str], samples: str) -> None:
    assert refuse(*tiny, "--samples", samples) == f"samples in the options is {samples}, expected at least 1."


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "many"], "samples in the options is 'many', expected a whole number."),
        (["--set", "samples=many"], "samples in --set is 'many', expected a whole number."),
        (["--set", "footprint=maybe"], "footprint in --set is 'maybe', expected true or false."),
        (["--dtype", "int4"], "dtype in the options is 'int4'"),
        (["--device", "tpu"], "'tpu' is not a device"),
        (["--method-from", "middle"], "'last_token' or 'question'"),
        (["--set", "samples"], "--set 'samples' is not key=value"),
    ],
)
def test_wrong_value_types(refuse: Refuse, tiny: list[str], arguments: list[str], words: str) -> None:
    assert words in refuse(*tiny, *arguments)


def test_a_folder_that_holds_another_configuration(
    refuse: Refuse, tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cli, "print_report", lambda folder, run: None)
        assert cli.run_cli(tiny) == 0
    capsys.readouterr()
    text = refuse(*tiny, "--seed", "5")
    assert "holds another configuration" in text
    assert "seed (there: 0, asked: 5)" in text


def test_no_folder(refuse: Refuse, tiny: list[str]) -> None:
    at = tiny.index("--out")
    assert refuse(*tiny[:at], *tiny[at + 2 :]).startswith("Say where the results go: --out DIR")


def test_an_unwritable_folder(refuse: Refuse, tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refuse(*tiny, "--out", "/proc/kvscope/run")
    assert "is a file, not a folder" in refuse(*tiny, "--out", str(tmp_path / "file"))


def test_a_corrupt_result_file(
    refuse: Refuse,
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cli, "print_report", lambda folder, run: None)
        assert cli.run_cli(tiny) == 0
    capsys.readouterr()
    rows = tmp_path / "run" / "samples.jsonl"
    good = rows.read_text()
    rows.write_text("{ not json\n" + good)
    for command in (tiny, ["report", str(tmp_path / "run")]):
        assert "samples.jsonl, line 1 is corrupt" in refuse(*command)
    rows.write_text(good)
    (tmp_path / "run" / "run.json").write_text("{")
    assert "run.json is corrupt" in refuse("report", str(tmp_path / "run"))


def test_a_torn_last_line_is_told_once(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: a test's log handlers would swallow a second message."""
    monkeypatch.setattr(cli, "print_report", lambda folder, run: None)
    assert cli.run_cli(tiny) == 0
    rows = tmp_path / "run" / "samples.jsonl"
    good = rows.read_text()
    for command in (["report", str(tmp_path / "run")], tiny[:-1]):
        rows.write_text(good + good[:40])
        done = fresh.run(["-m", "kvscope.cli", *command], env=worker_environment())
        assert done.returncode == 0
        assert done.stderr.count("cut short") == 1, done.stderr
    assert rows.read_text() == good


def test_a_missing_data_file(refuse: Refuse, tiny: list[str]) -> None:
    assert "/no/essays.txt" in refuse(*tiny, "--task", "niah_single_2:data=/no/essays.txt")


def test_a_report_of_nothing(refuse: Refuse, tmp_path: Path) -> None:
    assert "does not exist" in refuse("report", str(tmp_path / "absent"))
    assert "holds no run" in refuse("report", str(tmp_path))


def test_unknown_names_to_list_and_show(refuse: Refuse) -> None:
    assert refuse("list", "method") == "There is nothing to list under 'method'. Did you mean 'methods'?"
    assert refuse("show", "densee") == "No method, task or model is named 'densee'. Did you mean 'dense'?"


def raises(error: BaseException) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (EnvironmentProblem("The disk is full."), 3, "kvscope: The disk is full."),
        (
            RuntimeError("can't start new thread"),
            3,
            "kvscope: memory ran out (RuntimeError: can't start new thread); free some, or allow this process more.",
        ),
        (KeyboardInterrupt(), 130, "kvscope: interrupted; every finished row is kept, and the same command continues."),
    ],
)
def test_other_endings_have_their_own_code(
    error: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from kvscope.harness.passes import sweep

    monkeypatch.setattr(sweep, "run", raises(error))
    assert cli.run_cli(["run", "--out", "x"]) == code
    assert capsys.readouterr().err == words + "\n"


ENDS_SLOWLY = """
import signal, sys, threading, time
from kvscope import cli
from kvscope.harness.passes import sweep
def interrupted(*args, **options):
    raise KeyboardInterrupt
sweep.run = interrupted
def waits_at_the_end():
    while signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
        time.sleep(0.01)
    print("ending", file=sys.stderr, flush=True)
    time.sleep(600)
threading.Thread(target=waits_at_the_end).start()
sys.argv[1:] = ["run", "--out", "x"]
cli.main()
"""


def test_a_second_interrupt_ends_it_at_once_and_without_a_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ENDS_SLOWLY], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("kvscope: interrupted")
    assert process.stderr.readline() == "ending\n"
    process.send_signal(signal.SIGINT)
    process.wait()
    assert (process.returncode, process.stderr.read()) == (-signal.SIGINT, "")
