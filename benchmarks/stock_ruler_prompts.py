"""Prompts of lm-eval's own RULER tasks, built by lm-eval's own code: a file a (task, length), one JSON object a line.

A file is one that ``--task jsonl:FILE`` reads. Its prompts are lm-eval's at ``--tasks TASK --metadata
'{"max_seq_lengths": [LENGTH]}'``, the first so many. RULER draws them from the process's global generators, so a cell
depends on everything that was drawn before it: each gets a process of its own, seeded as ``simple_evaluate`` does. It
draws 500 of a cell one after another, whatever the limit; those behind the last one wanted are not drawn here.
"""

import argparse
import hashlib
import json
import lzma
import os
import platform
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError

TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""Those whose text needs no download."""
NEED_ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
"""Their haystack is a data set of the hub (``baber/paul_graham_essays``)."""
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
RANDOM_SEED, NUMPY_SEED = 0, 1234
"""``simple_evaluate``'s defaults."""
MANIFEST = "manifest.json"
PACKAGES = ("lm_eval", "wonderwords", "numpy", "scipy", "datasets", "transformers", "tokenizers")


def file_name(task: str, nominal_tokens: int) -> str:
    """Return what the file of a cell is called."""
    return f"{task}-{nominal_tokens}.jsonl.xz"


def build(options: argparse.Namespace) -> None:
    """Write the files that are missing, several cells at a time, and the manifest that names them all."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    wanted = [(task, length) for length in sorted(options.length) for task in options.task]
    left = [cell for cell in wanted if not (out / file_name(*cell)).exists()]
    cells = [describe(path) for path in sorted(out.glob("*.jsonl.xz"))]
    write_manifest(out, options.tokenizer, cells)
    if not left:
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["LOCAL_RANK"] = "1"  # rank 0 would try to download punkt, which essays alone need
    # Before the fork, for all cells: it sorts seven million pairs of words on import. The import of nltk in it draws
    # once from the global generator: a process that imports nltk after the seed gets other prompts from the same seed.
    import lm_eval.tasks.ruler.prepare_niah  # noqa: F401
    import transformers.models.auto.tokenization_auto  # noqa: F401

    asked = [(task, length, options.samples, str(options.tokenizer), out) for task, length in left]
    with get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        for note in pool.imap_unordered(_cell, asked):
            print(json.dumps(note), flush=True)
            cells.append(note)
            write_manifest(out, options.tokenizer, cells)  # each time: a folder can be used while it grows


def cut(folder: Path, out: Path, *, samples: int) -> None:
    """Write the first prompts of every file of a folder to another one: less to carry.

    Raises:
        SystemExit: a file has fewer.
    """
    out.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(folder)
    for cell in manifest["cells"]:
        lines = lzma.decompress((folder / cell["file"]).read_bytes()).splitlines(keepends=True)
        if len(lines) < samples:
            raise SystemExit(f"{cell['file']} has {len(lines)} prompts, and {samples} are asked for.")
        (out / cell["file"]).write_bytes(lzma.compress(b"".join(lines[:samples])))
    manifest["cells"] = [describe(out / cell["file"]) for cell in manifest["cells"]]
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def write_manifest(folder: Path, tokenizer: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """Write what the files of a folder are: their cells, hashes and token lengths, and what made them."""
    values = {
        "lm_eval": version("lm_eval"),
        "random_seed": RANDOM_SEED,
        "numpy_seed": NUMPY_SEED,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "cells": sorted(cells, key=lambda cell: (cell["nominal_tokens"], TASKS.index(cell["task"]))),
    }
    (folder / MANIFEST).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def describe(path: Path) -> dict[str, Any]:
    """Return the manifest's line of a file."""
    raw = lzma.decompress(path.read_bytes())
    metas = [json.loads(line)["meta"] for line in raw.splitlines()]
    tokens = [meta["prompt_tokens"] for meta in metas]
    first = metas[0]
    return {
        "file": path.name,
        "task": first["task"],
        "nominal_tokens": first["nominal_tokens"],
        "n": len(metas),
        "max_new_tokens": first["max_new_tokens"],
        "prompt_tokens": {"min": min(tokens), "mean": round(sum(tokens) / len(tokens), 1), "max": max(tokens)},
        "sha256": hashlib.sha256(raw).hexdigest(),
        "compressed_bytes": path.stat().st_size,
    }


def tokenizer_sha256(folder: Path) -> str:
    """Return the hash of a tokenizer's file."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def _cell(asked: tuple[str, int, int, str, Path]) -> dict[str, Any]:
    """Write one cell's file; the process is its own, so what is set here stays here."""
    task, nominal_tokens, n, tokenizer, out = asked
    log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, sys.stdout.fileno())  # RULER prints each length that it tries
    os.dup2(log, sys.stderr.fileno())  # and draws a bar
    lines = [json.dumps(line) for line in stock_lines(task, nominal_tokens, n, tokenizer=tokenizer)]
    path = out / file_name(task, nominal_tokens)
    raw = "".join(f"{line}\n" for line in lines).encode()
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(lzma.compress(raw))
    unfinished.rename(path)
    return describe(path)


def stock_lines(task: str, nominal_tokens: int, n: int, *, tokenizer: str) -> Iterator[dict[str, Any]]:
    """Yield the first ``n`` prompts of a cell, as lines of a jsonl task. Seeds this process's global generators.

    Args:
        task: a name of ``TASKS``.
        nominal_tokens: ``max_seq_lengths``; prompts are shorter, or a few tokens longer (fwe).
        tokenizer: folder whose tokenizer sizes the prompts.
    """
    import lm_eval.tasks
    import numpy as np
    from transformers import AutoTokenizer

    random.seed(RANDOM_SEED)
    np.random.seed(NUMPY_SEED)  # RULER's vt draws its values from it
    metadata = {"pretrained": tokenizer, "tokenizer": tokenizer, "max_seq_lengths": [nominal_tokens]}
    ruler = Path(lm_eval.tasks.__file__).parent / "ruler"
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(ruler), metadata=metadata)
    with _drawing_first(n):
        stock = manager.load([task])["tasks"][task]
    stock.build_all_requests(limit=n, rank=0, world_size=1)
    encode = AutoTokenizer.from_pretrained(tokenizer)
    for index, request in enumerate(stock.instances):
        prompt, settings = request.args
        _require_plain(task, settings)
        yield {
            "id": index,
            "prompt": prompt,
            "answers": list(request.doc["outputs"]),
            "meta": {
                "task": task,
                "nominal_tokens": nominal_tokens,
                "max_length": request.doc["max_length"],
                "max_new_tokens": settings["max_gen_toks"],
                "prompt_tokens": len(encode(prompt)["input_ids"]),
            },
        }


@contextmanager
def _drawing_first(n: int) -> Iterator[None]:
    """Let RULER's loops over prompts, which are those with a bar, end after ``n``."""
    import lm_eval.tasks.ruler.prepare_niah as needles
    import tqdm

    bar = tqdm.tqdm
    # The modules of the other tasks take it from the package, as they are loaded.
    tqdm.tqdm = needles.tqdm = lambda prompts, **_: islice(prompts, n)
    try:
        yield
    finally:
        tqdm.tqdm = needles.tqdm = bar


def _require_plain(task: str, settings: Mapping[str, Any]) -> None:
    """Refuse generation settings that ``answer`` would not have: a later lm-eval's."""
    rest = {key: value for key, value in settings.items() if key != "max_gen_toks"}
    if rest != {"do_sample": False, "temperature": 0.0, "until": []}:
        raise ValueError(f"{task} asks for {rest}; this script answers greedily, to the end of text or the last token.")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a folder's manifest.

    Raises:
        UsageError: it has none, or one that is not whole.
    """
    try:
        found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} has no whole {MANIFEST}: give a folder that `prompts` or `cut` wrote.") from error
    return found


def chosen(manifest: Mapping[str, Any], tasks: Sequence[str], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Return the cells of some tasks and lengths (none named: all), shortest first.

    Raises:
        SystemExit: one that is named is not there.
    """
    cells = [
        cell
        for cell in manifest["cells"]
        if (not tasks or cell["task"] in tasks) and (not lengths or cell["nominal_tokens"] in lengths)
    ]
    there = {(cell["task"], cell["nominal_tokens"]) for cell in cells}
    for task in tasks:
        for length in lengths:
            if (task, length) not in there:
                raise SystemExit(f"There are no prompts of {task} at {length}: build them with `prompts`.")
    return cells


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a cell's file."""
    return [json.loads(line) for line in lzma.decompress(path.read_bytes()).splitlines()]
