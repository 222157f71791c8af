"""Benchmarks that ``kvscope tasks fetch`` brings from the hub or their own site, into the user's cache."""

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from kvscope.errors import EnvironmentProblem, UsageError, did_you_mean
from kvscope.files import first_line, whole_file
from kvscope.paths import cache_folder


@dataclass(frozen=True)
class Source:
    """Where a benchmark's files are.

    Attributes:
        place: the dataset's id on the hub, or the address of its folder on a site of its own (``https://``).
        pattern: of the files' names; the one file's name where they are on a site.
        revision: of the dataset; None: the newest.
    """

    place: str
    pattern: str
    revision: str | None = None


SOURCES = {
    "longbench_v2": Source("zai-org/LongBench-v2", "data.json"),
    "longmemeval_s": Source("xiaowu0162/longmemeval-cleaned", "longmemeval_s*.json"),
    "longmemeval_m": Source("xiaowu0162/longmemeval-cleaned", "longmemeval_m*.json"),
    "mrcr": Source("openai/mrcr", "*needle*.parquet"),
    # Both as lm-eval has them: HotpotQA's own host is gone.
    "ruler_qa_squad": Source("https://rajpurkar.github.io/SQuAD-explorer/dataset", "dev-v2.0.json"),
    "ruler_qa_hotpot": Source(
        "namlh2004/hotpotqa",
        "hotpot_dev_distractor_v1.json",
        revision="7e54db4656209750ff487f6fdf8e39a66dba136b",
    ),
}
_TIMEOUT_S = 60


LIST_FILE = "fetched.json"
"""Names the files of a benchmark that was fetched whole: a part of them would be another benchmark."""


def fetched_folder(name: str) -> Path:
    """Return where a benchmark's files lie once they were fetched."""
    return cache_folder() / "tasks" / name


def fetched_files(name: str) -> list[Path]:
    """Return the files of a fetched benchmark, by name.

    Raises:
        UsageError: it was not fetched, or not all of it.
    """
    folder = fetched_folder(name)
    try:
        listed = json.loads((folder / LIST_FILE).read_text(encoding="utf-8"))
        found = sorted(folder / str(file) for file in listed)
    except (OSError, ValueError, TypeError):
        found = []
    if not found or not all(path.is_file() for path in found):
        raise UsageError(
            f"The data of {name} is not here{' whole' if folder.is_dir() else ''}: `kvscope tasks fetch {name}` brings "
            f"it, or give a file as {name}:data=FILE."
        )
    return found


def fetch(name: str) -> list[Path]:
    """Fetch a benchmark's files and return them.

    Raises:
        UsageError: no such benchmark.
        EnvironmentProblem: the hub or site cannot be reached, or has no such files.
    """
    if name not in SOURCES:
        raise UsageError(f"There is no benchmark '{name}' to fetch.{did_you_mean(name, SOURCES)}")
    source, folder = SOURCES[name], fetched_folder(name)
    try:
        wanted = _from_site(source, folder) if source.place.startswith("https://") else _from_hub(source, folder)
        if wanted:
            with whole_file(folder / LIST_FILE) as path:
                path.write_text(json.dumps(wanted), encoding="utf-8")
    except Exception as error:
        raise EnvironmentProblem(
            f"{name} cannot be fetched from {_said(source)} into '{folder}' ({first_line(error)}): check "
            f"the network, or give a file as {name}:data=FILE."
        ) from error
    if not wanted:
        raise EnvironmentProblem(f"The dataset {source.place} has no file {source.pattern} any more.")
    return fetched_files(name)


def _said(source: Source) -> str:
    return source.place if source.place.startswith("https://") else f"the dataset {source.place}"


def _from_hub(source: Source, folder: Path) -> list[str]:
    from huggingface_hub import HfApi, hf_hub_download

    files = HfApi().list_repo_files(source.place, repo_type="dataset", revision=source.revision)
    wanted = [file for file in files if fnmatch(file.rpartition("/")[2], source.pattern)]
    for file in wanted:
        hf_hub_download(source.place, file, repo_type="dataset", local_dir=folder, revision=source.revision)
    return wanted


def _from_site(source: Source, folder: Path) -> list[str]:
    import requests

    reply = requests.get(f"{source.place}/{source.pattern}", timeout=_TIMEOUT_S)
    reply.raise_for_status()
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / source.pattern) as path:
        path.write_bytes(reply.content)
    return [source.pattern]
