"""Dense against dense in two runs: what differs between them, how far answers do, and what cannot be compared."""

from pathlib import Path

import pytest
from synthetic_rows import make_rows

from kvscope import cli
from kvscope.results.store import RunStore


def write(folder: Path, *, changed: int = 0, seed: int = 0, length: int = 2048, **values: object) -> Path:
    samples, _, info = make_rows(
        ["dense", "recency"], tasks=("niah_single_1", "vt"), lengths=(length,), samples=40, footprint_lengths=()
    )
    with RunStore.create(folder, info) as store:
        store.begin()
        for row in samples:
            update = dict(values)
            if row.method == "dense" and row.task == "vt" and row.sample < changed:
                update["score"] = 0.0
            if seed:
                update["prompt_sha256"] = f"{seed:064x}"
            store.sample_rows.append(row.model_copy(update=update))
    return folder


def test_two_precisions_and_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "fp32", dtype="float32", batch=1)
    second = write(tmp_path / "bf16", dtype="bfloat16", batch=8, changed=3)
    assert cli.run_cli(["study", "noise-floor", str(first), str(second)]) == 0
    text = capsys.readouterr().out
    assert "batch: 1 against 8" in text
    assert "dtype: float32 against bfloat16" in text
    assert "device" not in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if "%)" in line}
    assert "3 (3.8 %)" in " ".join(lines["all"])
    assert "0 (0.0 %)" in " ".join(lines["niah_single_1"])
    assert "-7.5 [" in " ".join(lines["vt"])
    assert lines["vt"][-1] == "inconclusive"


def test_the_same_run_again_moves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "run")
    assert cli.run_cli(["study", "noise-floor", str(folder), str(folder), "--method", "dense"]) == 0
    text = capsys.readouterr().out
    assert "nothing that rows say of how they were computed differs" in text
    assert text.count("+0.0 [") == 3


def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other, long = (
        write(tmp_path / "one"),
        write(tmp_path / "other", seed=7),
        write(tmp_path / "long", length=4096),
    )
    for words, sentence in (
        ([str(first), str(other)], "answered different prompts"),
        ([str(first), str(long)], "have no prompt in common"),
        ([str(first), str(first), "-m", "quest"], "holds no answer of 'quest'; its methods are dense, recency"),
        ([str(first), str(tmp_path / "none")], "none"),
    ):
        assert cli.run_cli(["study", "noise-floor", *words]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
