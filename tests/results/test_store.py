"""The append-only store: resume, torn lines, locks, and the sentence a user gets when a folder cannot be used."""

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from full_disk import no_file_over
from synthetic_rows import KINDS, Rows, demo_rows, footprint_row, sample_row

from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.results.continuing import identity_differences
from kvscope.results.rowfile import append_lines
from kvscope.results.run_schema import RunInfo
from kvscope.results.schema import SampleRow
from kvscope.results.store import RunStore


@pytest.fixture(scope="module")
def rows() -> Rows:
    return demo_rows()


def filled(folder: Path, rows: Rows, *, count: int = 6) -> Path:
    samples, footprints, info = rows
    with RunStore.create(folder, info) as store:
        for row in samples[:count]:
            store.append_sample(row)
        store.append_footprint(footprints[0])
    return folder


def renamed(info: RunInfo, **identity: object) -> RunInfo:
    return info.model_copy(update={"identity": {**info.identity, **identity}})


def test_rows_survive_in_order(tmp_path: Path, rows: Rows) -> None:
    samples, footprints, info = rows
    with RunStore.open(filled(tmp_path / "run", rows)) as store:
        assert store.samples() == samples[:6]
        assert store.footprints() == footprints[:1]
        assert store.info == info
        assert {row.key for row in store.samples()} == {row.key for row in samples[:6]}
        assert {row.key for row in store.footprints()} == {footprints[0].key}
        assert store.has_sample(samples[0].key)
        assert not store.has_sample(samples[6].key)
        assert store.footprint_rows.has(footprints[0].key)
        assert store.messages == []


def test_a_row_is_on_disk_when_append_returns(tmp_path: Path, rows: Rows) -> None:
    samples, _, info = rows
    with RunStore.create(tmp_path, info) as store:
        store.append_sample(samples[0])
        with RunStore.open(tmp_path) as reader:
            assert reader.samples() == samples[:1]


def test_resume_continues_where_it_stopped(tmp_path: Path, rows: Rows) -> None:
    samples, _, info = rows
    filled(tmp_path, rows)
    with RunStore.create(tmp_path, info) as store:
        for row in samples[:10]:
            if not store.has_sample(row.key):
                store.append_sample(row)
        assert store.samples() == samples[:10]


def test_the_same_cell_is_never_written_twice(tmp_path: Path, rows: Rows) -> None:
    samples, footprints, info = rows
    filled(tmp_path, rows)
    with RunStore.create(tmp_path, info) as store:
        with pytest.raises(ValueError, match="already holds"):
            store.append_sample(samples[0])
        with pytest.raises(ValueError, match="already holds"):
            store.append_footprint(footprints[0])


def test_a_reader_cannot_write(tmp_path: Path, rows: Rows) -> None:
    samples, _, _ = rows
    with (
        RunStore.open(filled(tmp_path, rows)) as store,
        pytest.raises(ValueError, match="opened for reading"),
    ):
        store.append_sample(samples[9])


def test_torn_last_line_at_every_byte(tmp_path: Path, rows: Rows) -> None:
    samples, _, info = rows
    path = filled(tmp_path, rows) / "samples.jsonl"
    whole = path.read_bytes()
    last_start = whole[:-1].rfind(b"\n") + 1
    for cut in [*range(last_start + 1, len(whole), 97), len(whole) - 2, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with RunStore.open(tmp_path) as reader:
            assert reader.samples() == samples[:5]
            assert "cut short" in reader.messages[0]
        assert path.read_bytes() == whole[:cut], "reading must not change the file"
        with RunStore.create(tmp_path, info) as store:
            assert store.samples() == samples[:5]
            assert store.messages == [
                f"{path}, line 6: the last line was cut short by an interruption; it was dropped, and its cell is "
                "measured again."
            ]
            store.append_sample(samples[5])
        assert path.read_bytes() == whole


def test_an_unreadable_last_line_with_newline_is_torn_too(tmp_path: Path, rows: Rows) -> None:
    samples, _, info = rows
    path = filled(tmp_path, rows) / "samples.jsonl"
    with path.open("ab") as file:
        file.write(b"\0\0\0\0{\n")
    with RunStore.create(tmp_path, info) as store:
        assert store.samples() == samples[:6]
        assert len(store.messages) == 1


def test_corrupt_line_elsewhere_is_named(tmp_path: Path, rows: Rows) -> None:
    path = filled(tmp_path, rows) / "samples.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[2][:40]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UsageError, match=r"samples\.jsonl, line 3 is corrupt .* Delete that line and run"):
        RunStore.open(tmp_path)


def test_invalid_row_is_named_with_its_field(tmp_path: Path, rows: Rows) -> None:
    path = filled(tmp_path, rows) / "samples.jsonl"
    path.write_text(path.read_text().replace('"score":1.0', '"score":7.0', 1))
    with pytest.raises(UsageError, match=r"samples\.jsonl, line 1 is not a valid row: score"):
        RunStore.open(tmp_path)


def test_newer_schema_asks_for_an_upgrade(tmp_path: Path, rows: Rows) -> None:
    path = filled(tmp_path, rows) / "footprint.jsonl"
    path.write_text(path.read_text().replace('"schema_version":1', '"schema_version":9'))
    with pytest.raises(UsageError, match=r"footprint\.jsonl, line 1 has schema version 9.*Upgrade kvscope"):
        RunStore.open(tmp_path)


def test_duplicate_lines_are_named(tmp_path: Path, rows: Rows) -> None:
    path = filled(tmp_path, rows) / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[1]]))
    with pytest.raises(UsageError, match=r"line 7 holds the same cell as line 2"):
        RunStore.open(tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"task": "fwe"}, "fwe at "),
        ({"sample": 10_000}, "sample 10000 of "),
        ({"method_label": "other"}, "method other "),
        ({"model": "other"}, "model other, where it asks for "),
    ],
)
def test_rows_of_another_run_are_refused_before_anything_is_measured(
    tmp_path: Path, rows: Rows, values: dict[str, object], words: str
) -> None:
    folder = filled(tmp_path / "run", rows)
    with (folder / "samples.jsonl").open("a") as file:
        file.write(rows[0][7].model_copy(update=values).model_dump_json() + "\n")
    with pytest.raises(UsageError, match=f"holds rows that its run.json does not ask for: {words}"):
        RunStore.create(folder, rows[2])


def test_another_configuration_names_the_keys_and_both_values(tmp_path: Path, rows: Rows) -> None:
    info = rows[2]
    filled(tmp_path, rows)
    with pytest.raises(UsageError) as caught:
        RunStore.create(tmp_path, renamed(info, seed=7, answer_nll=True))
    text = str(caught.value)
    assert "seed (there: 0, asked: 7)" in text
    assert "answer_nll (there: (absent), asked: true)" in text
    assert "samples" not in text
    assert caught.value.exit_code == 2


def test_identity_differences_reach_nested_keys() -> None:
    assert identity_differences({"a": {"b": 1, "c": [1]}}, {"a": {"b": 2, "c": [1]}}) == ["a.b (there: 1, asked: 2)"]


def test_changed_surroundings_are_noted_not_refused(tmp_path: Path, rows: Rows) -> None:
    info = rows[2]
    filled(tmp_path, rows)
    later = info.model_copy(update={"commit": "f" * 40})
    for _ in range(2):
        with RunStore.create(tmp_path, later) as store:
            assert [note.commit for note in store.info.resumptions] == ["f" * 40]
            assert store.info.commit == info.commit


def test_one_writer_at_a_time(tmp_path: Path, rows: Rows) -> None:
    info = rows[2]
    with (
        RunStore.create(tmp_path, info),
        pytest.raises(UsageError, match=rf"Another kvscope run \(process {os.getpid()}\)"),
    ):
        RunStore.create(tmp_path, info)
    RunStore.create(tmp_path, info).close()


def test_a_refused_opening_releases_the_lock(tmp_path: Path, rows: Rows) -> None:
    info = rows[2]
    filled(tmp_path, rows)
    with pytest.raises(UsageError, match="another configuration"):
        RunStore.create(tmp_path, renamed(info, seed=7))
    RunStore.create(tmp_path, info).close()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere/run"])
def test_unusable_folders(tmp_path: Path, rows: Rows, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--out"):
        RunStore.create(tmp_path / place, rows[2])


def test_folder_without_write_permission(tmp_path: Path, rows: Rows) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everywhere (root)")
    with pytest.raises(UsageError, match="cannot be written"):
        RunStore.create(locked, rows[2])


def test_folders_that_hold_no_run(tmp_path: Path, rows: Rows) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        RunStore.open(tmp_path / "absent")
    with pytest.raises(UsageError, match="holds no run"):
        RunStore.open(tmp_path)
    filled(tmp_path, rows)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UsageError, match=r"run\.json is corrupt"):
        RunStore.open(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UsageError, match=r"holds samples\.jsonl but no run\.json"):
        RunStore.create(tmp_path, rows[2])


def test_full_disk_leaves_whole_rows_only(tmp_path: Path, rows: Rows) -> None:
    samples, _, info = rows
    with RunStore.create(tmp_path, info) as store:
        store.append_sample(samples[0])
        size = (tmp_path / "samples.jsonl").stat().st_size
        with no_file_over(size + 100), pytest.raises(EnvironmentProblem, match="Could not write a row"):
            store.append_sample(samples[1])
        assert (tmp_path / "samples.jsonl").stat().st_size == size
        store.append_sample(samples[1])
    assert RunStore.open(tmp_path).samples() == samples[:2]


WRITER = """
import sys
from synthetic_rows import demo_rows
from kvscope.results.store import RunStore
samples, footprints, info = demo_rows()
with RunStore.create(sys.argv[1], info) as store:
    print("open", flush=True)
    missing = [row for row in samples if not store.has_sample(row.key)]
    for row in missing[:int(sys.argv[2])]:
        store.append_sample(row)
        print("row", flush=True)
    if len(missing) > int(sys.argv[2]):
        sys.stdin.read()  # to be killed: a slow killer finds rows missing, too
"""


def test_killed_writers_lose_and_repeat_nothing(tmp_path: Path, rows: Rows) -> None:
    samples: list[SampleRow] = rows[0]
    chance = random.Random(0)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    seen, most = 0, len(samples) // 6
    for attempt in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(most if attempt < 5 else len(samples))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        said = 0
        if attempt < 5:
            kill_after = chance.randrange(most)
            while said < kill_after:
                assert writer.stdout.readline() == "row\n"
                said += 1
            writer.kill()
        # Not communicate(): with two pipes it reads the descriptor itself, past lines that readline has buffered.
        said += writer.stdout.read().count("row\n")
        assert writer.stdin is not None
        writer.stdin.close()
        writer.stdout.close()
        writer.wait()
        now = RunStore.open(tmp_path).samples()
        assert now == samples[: len(now)]
        assert seen + said <= len(now) <= seen + said + 1, "only the row that was being written may be there unsaid"
        seen = len(now)
    assert seen == len(samples)


def test_rows_of_two_kinds_do_not_mix(tmp_path: Path, rows: Rows) -> None:
    with RunStore.create(tmp_path, rows[2]) as store:
        store.append_sample(sample_row(KINDS["dense"], task="niah_single_1", length=1024, sample=0))
        store.append_footprint(footprint_row(KINDS["dense"], length=1024))
    (tmp_path / "footprint.jsonl").write_bytes((tmp_path / "samples.jsonl").read_bytes())
    with pytest.raises(UsageError, match=r"footprint\.jsonl, line 1 is not a valid row"):
        RunStore.open(tmp_path)


def test_a_run_that_never_began_leaves_no_folder_of_its_own(tmp_path: Path, rows: Rows) -> None:
    _, _, info = rows
    with RunStore.create(tmp_path / "run", info):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    RunStore.create(tmp_path / "mine", info).close()
    assert (tmp_path / "mine").is_dir()  # it was the user's
    with RunStore.create(tmp_path / "run", info):
        (tmp_path / "run" / "notes.txt").write_text("mine")
    assert (tmp_path / "run" / "notes.txt").is_file()
    with RunStore.create(tmp_path / "begun", info) as store:
        store.begin()
    assert (tmp_path / "begun" / "run.json").is_file()


def test_samples_wait_for_the_disk_once_a_second_and_at_the_end_other_rows_at_once(
    tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[int] = []
    samples, footprints, info = rows
    now_s = [100.0]
    monkeypatch.setattr("kvscope.results.row_table.time.monotonic", lambda: now_s[0])
    with RunStore.create(tmp_path / "run", info) as store:
        store.begin()
        real = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (syncs.append(fd), real(fd)))

        def waits(append: Callable[[], None]) -> int:
            before = len(syncs)
            append()
            return len(syncs) - before

        opened = waits(lambda: store.append_sample(samples[0]))
        assert opened == 2  # the folder of a new file, and its first row
        assert waits(lambda: store.append_sample(samples[1])) == 0
        now_s[0] += 0.9
        assert waits(lambda: store.append_sample(samples[2])) == 0
        assert len(RunStore.open(tmp_path / "run").samples()) == 3  # whoever reads, or is killed, has them
        assert waits(lambda: store.append_footprint(footprints[0])) == 2
        assert waits(lambda: store.append_footprint(footprints[1])) == 1
        now_s[0] += 0.2
        assert waits(lambda: store.append_sample(samples[3])) == 1
        assert waits(lambda: store.append_sample(samples[4])) == 0
        assert waits(store.close) == 1
        assert waits(store.close) == 0


def test_an_interrupt_right_behind_a_write_is_no_reason_not_to_wait_for_the_disk(
    tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, _, info = rows
    store = RunStore.create(tmp_path / "run", info)
    store.begin()
    store.append_sample(samples[0])

    def interrupted(fd: int, texts: Iterable[str], *, path: Path, sync: bool) -> None:
        append_lines(fd, texts, path=path, sync=sync)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kvscope.results.row_table.append_lines", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.append_sample(samples[1])
    syncs: list[int] = []
    monkeypatch.setattr(os, "fsync", syncs.append)
    store.close()
    assert len(syncs) == 1
    assert RunStore.open(tmp_path / "run").samples() == samples[:2]


def test_a_disk_that_fails_at_the_end_is_said_and_the_folder_is_free(
    tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, _, info = rows
    store = RunStore.create(tmp_path / "run", info)
    store.begin()
    store.append_sample(samples[0])
    store.append_sample(samples[1])

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(EnvironmentProblem, match=r"Could not write a row to .*samples.jsonl.*are kept"):
            store.close()
    with RunStore.create(tmp_path / "run", info) as again:
        assert again.samples() == samples[:2]


def test_rows_at_once_have_one_sync_and_none_is_there_twice(
    tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[int] = []
    every, _, info = rows
    samples = every[:3]
    with RunStore.create(tmp_path / "run", info) as store:
        store.begin()
        real = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (syncs.append(fd), real(fd)))
        store.append_samples(samples[:2])
        assert len([fd for fd in syncs if fd == syncs[-1]]) == 1
        with pytest.raises(ValueError, match="already holds"):
            store.append_samples([samples[2], samples[2]])
        with pytest.raises(ValueError, match="already holds"):
            store.append_samples([samples[2], samples[0]])
    assert RunStore.open(tmp_path / "run").samples() == samples[:2]
