"""Hashes of large files: read once, read again when anything about the file changed, whatever the cache holds."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvscope.harness.engine import file_hashes
from kvscope.harness.engine.file_hashes import cache_path, file_sha256s


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "SETTLED_NS", -1)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_file_is_read_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a", b"one")
    reads: list[str] = []
    real = hashlib.file_digest
    monkeypatch.setattr(
        file_hashes.hashlib, "file_digest", lambda file, name: (reads.append(name), real(file, name))[1]
    )
    assert file_sha256s([path]) == file_sha256s([path]) == [sha(b"one")]
    assert len(reads) == 1
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_sha256s([path]) == [sha(b"two")], "size and mtime are the same, the bytes are not"
    other = written(tmp_path / "b", b"six")
    os.replace(other, path)
    assert file_sha256s([path]) == [sha(b"six")]
    assert len(reads) == 3


def test_a_file_that_just_changed_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "SETTLED_NS", 10**18)
    file_sha256s([written(tmp_path / "a", b"one")])
    assert not cache_path().exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "[[[", '{"1:2": 5}', '{"1:2": ["x", "y"]}', "\0" * 100, "[" * 100_000])
def test_a_damaged_cache_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    path = written(tmp_path / "a", b"one")
    cache_path().parent.mkdir(parents=True)
    cache_path().write_text(text)
    assert file_sha256s([path]) == [sha(b"one")]
    assert len(json.loads(cache_path().read_text())) == 1


@pytest.mark.parametrize("there", ["file where a folder should be", "folder where the file should be"])
def test_a_cache_that_cannot_be_written_is_as_good_as_none(tmp_path: Path, there: str) -> None:
    if there.startswith("file"):
        cache_path().parent.parent.mkdir()
        cache_path().parent.write_text("")
    else:
        (cache_path() / "x").mkdir(parents=True)
    assert file_sha256s([written(tmp_path / "a", b"one")]) == [sha(b"one")]


def test_writers_at_the_same_time_leave_a_whole_cache(tmp_path: Path) -> None:
    paths = [written(tmp_path / f"file{i}", b"%d" % i) for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda path: file_sha256s([path])[0], paths))
    assert found == [sha(b"%d" % i) for i in range(40)]
    assert json.loads(cache_path().read_text())
    assert [path.name for path in cache_path().parent.iterdir()] == [cache_path().name]
