"""A mirror that does not fit is told before the run, with the bytes it needs, and never left to the kernel."""

import json

import pytest
from tiny_models import loaded_model, prompt_ids

from kvscope import cli
from kvscope.errors import EnvironmentProblem
from kvscope.harness.engine import host_memory, layer_major, prefill
from kvscope.harness.passes import forecast


def test_a_prompt_is_refused_before_its_pages_are_made(monkeypatch):
    loaded = loaded_model("llama")
    need_bytes = loaded.shape.paged_kv_bytes(100)
    monkeypatch.setattr(prefill, "free_host_bytes", lambda: need_bytes - 1)
    monkeypatch.setattr(layer_major, "empty_host_pages", lambda *a, **k: pytest.fail("pages were made"))
    with pytest.raises(EnvironmentProblem) as caught:
        prefill.prefill(loaded, prompt_ids(100))
    for word in ("100 tokens", "112.0 KiB", "out of memory", "shorter length"):
        assert word in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr(prefill, "free_host_bytes", lambda: need_bytes)
    assert prefill.prefill(loaded, prompt_ids(100)).host_bytes == need_bytes


def test_a_run_says_so_first_and_its_rows_are_oom(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(forecast, "free_device_bytes", lambda device: (1000, "host memory"))
    monkeypatch.setattr(prefill, "free_host_bytes", lambda: 1000)
    command = [
        "run", "--model", tiny_model, "-m", "lsa:selection=synthetic,budget_fraction=0.5", "--task", "niah_single_1",
        "-l", "512", "-n", "1", "--max-new-tokens", "2", "--no-footprint", "--no-self-check", "--device", "cpu",
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert cli.run_cli(command) == 1
    err = capsys.readouterr().err
    first = err.index("is not expected to fit: needs about")
    assert "1000 B is free" in err
    assert first < err.index("prefill: HostMemoryShort")
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert row["status"] == "oom"
    assert "host pages" in row["reason"]


@pytest.mark.parametrize(
    ("files", "room_bytes"),
    [
        ({"memory.max": "10000", "memory.current": "4000", "memory.stat": "anon 1\ninactive_file 500\n"}, 6500),
        ({"memory.max": "10000", "memory.current": "12000", "memory.stat": ""}, 0),
        ({"memory.max": "max", "memory.current": "4000", "memory.stat": ""}, None),
        ({}, None),
    ],
)
def test_a_containers_limit_counts(tmp_path, monkeypatch, files, room_bytes):
    monkeypatch.setattr(host_memory, "_CGROUPS", ())
    machine_bytes = host_memory.free_host_bytes()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host_memory, "_CGROUPS", ((tmp_path, "memory.max", "memory.current", "inactive_file"),))
    found = host_memory.free_host_bytes()
    if room_bytes is None:
        assert found == pytest.approx(machine_bytes, rel=0.2)
    else:
        assert found == room_bytes
