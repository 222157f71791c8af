"""The doctor's findings, each way round."""

import json
from pathlib import Path

import pytest

from kvscope.cli import run_cli
from kvscope.harness.info import doctor
from kvscope.harness.info.doctor import Check, failed, run_checks


def test_every_check_answers_and_every_trouble_says_how_to_mend_it(tmp_path: Path) -> None:
    checks = run_checks(tmp_path / "not" / "there")
    assert len({check.name for check in checks}) == len(checks) == 11
    for check in checks:
        assert check.finding
        assert check.status == "ok" or check.mend


def test_json_holds_every_check_and_the_code_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Check(name="a", status="ok", finding="b"), Check(name="c", status="fail", finding="d", mend="e")]
    monkeypatch.setattr(doctor, "run_checks", lambda folder: checks)
    assert run_cli(["doctor", "--json"]) == 3
    assert [Check(**each) for each in json.loads(capsys.readouterr().out)] == checks


def test_only_a_fail_fails() -> None:
    assert not failed([Check(name="a", status="warn", finding="b", mend="c")])
    assert failed([Check(name="a", status="fail", finding="b", mend="c")])


def test_a_missing_package_fails_or_warns_by_need() -> None:
    assert doctor.check_package("x", "no-such-distribution", needed=True).status == "fail"
    assert doctor.check_package("x", "no-such-distribution", needed=False).status == "warn"


def test_a_missing_reference_model_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kvscope.harness.engine import names

    monkeypatch.setattr(names, "REFERENCE_MODEL_FOLDER", tmp_path)
    check = doctor.check_reference_model()
    assert check.status == "fail"
    assert "config.json" in check.finding
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    assert "weights" in doctor.check_reference_model().finding
    (tmp_path / "model.safetensors").write_bytes(b"0" * 2_000_000)
    assert doctor.check_reference_model() == Check(name="reference model", status="ok", finding="2 MB of weights")


def test_a_folder_that_cannot_be_written_fails() -> None:
    check = doctor.check_writable(Path("/proc/kvscope"))
    assert check.status == "fail"
    assert "--out" in check.mend


def test_an_old_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_PYTHON", (99, 0))
    assert doctor.check_python().status == "fail"


def test_little_disk_or_memory_warns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "MIN_DISK_BYTES", 2**60)
    monkeypatch.setattr(doctor, "MIN_MEMORY_BYTES", 2**60)
    assert doctor.check_disk(tmp_path).status == "warn"
    assert doctor.check_memory().status == "warn"
