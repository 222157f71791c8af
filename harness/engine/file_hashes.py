"""SHA-256 of large files, each read once: a small file in the user's cache directory remembers them.

What is remembered counts only while size, times and place of the file on its disk stay as they were. Its change time is
among them, which no program can set back. A cache that cannot be read or written is as good as none.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvscope.paths import cache_folder

CACHE_FILE = "file_hashes.json"
MOST_ENTRIES = 4096
MOST_CACHE_BYTES = 8 * 2**20
SETTLED_NS = 2_000_000_000
"""A file changed more lately than this may change again within one tick of its disk's clock: it is not remembered."""
READERS = 4

Entries = dict[str, list[str]]


def cache_path() -> Path:
    """Return where hashes are remembered."""
    return cache_folder() / CACHE_FILE


def file_sha256s(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of every file, as hex digits, in order.

    Raises:
        OSError: a file cannot be read.
    """
    known = _read_cache()
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda path: _one(path, known), paths))
    fresh = {key: [stamp, digest] for key, stamp, digest, settled in found if settled}
    if any(known.get(key) != entry for key, entry in fresh.items()):
        _remember(fresh)
    return [digest for _, _, digest, _ in found]


def _one(path: Path, known: Entries) -> tuple[str, str, str, bool]:
    """Return (key, stamp, SHA-256, whether it may be remembered) of a file."""
    with path.open("rb") as file:
        key, stamp, changed_ns = _stat(file.fileno())
        entry = known.get(key)
        if entry is not None and entry[0] == stamp:
            return key, stamp, entry[1], True
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        settled = _stat(file.fileno())[1] == stamp and time.time_ns() - changed_ns > SETTLED_NS
    return key, stamp, digest, settled


def _stat(fd: int) -> tuple[str, str, int]:
    """Return (which file, what it was like, when it last changed)."""
    found = os.fstat(fd)
    stamp = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    return f"{found.st_dev}:{found.st_ino}", stamp, max(found.st_mtime_ns, found.st_ctime_ns)


def _read_cache() -> Entries:
    """Return what is remembered; nothing where the file is not there or damaged."""
    try:
        with cache_path().open("rb") as file:
            data = json.loads(file.read(MOST_CACHE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {key: entry for key, entry in data.items() if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
        return False
    return len(entry[1]) == 64 and set(entry[1]) <= set("0123456789abcdef")


def _remember(fresh: Entries) -> None:
    """Add entries to what is there now. A reader finds the old file or the new one, whoever else writes."""
    path = cache_path()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        there = _read_cache()
        merged = {**{key: entry for key, entry in there.items() if key not in fresh}, **fresh}
        kept = dict(list(merged.items())[-MOST_ENTRIES:])
        fd, partial = tempfile.mkstemp(prefix=f"{CACHE_FILE}.", dir=path.parent)
        try:
            with os.fdopen(fd, "w", encoding="ascii") as file:
                json.dump(kept, file)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
