"""Which runs of 13 words stand in lm-eval's own prompts: hashes of them, and how they are made anew.

Their texts are not kept here. ``python tests/reference_model/stock_ngrams.py`` writes the file anew from the installed
lm_eval (``VERSION``): every string of its RULER tasks, and the prompts and descriptions of its tasks of long contexts
and reading. Names, numbers and UUIDs count as one word, ``#``; a run that holds fewer than six other words says nothing
and is left out.
"""

import ast
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

N_WORDS = 13
LEAST_WORDS = 6
VERSION = "0.4.13"
FILE = Path(__file__).parent / "stock_13grams.txt"
FOLDERS = (
    "ruler", "longbench", "longbench2", "longproc", "babi", "babilong", "scrolls", "qasper", "squadv2",
    "squad_completion", "coqa", "drop", "triviaqa", "nq_open", "lambada", "fda", "swde", "race", "quac",
)  # fmt: skip
_SLOT = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{\w*\}|[0-9a-f]{8}-[0-9a-f-]+|\b[A-Z]{3,}\b|\b\d+\b|\b\w+-\w+\b", re.DOTALL)


def words_of(text: str) -> list[str]:
    """Return a text's words in lower case; what fills a slot is ``#``."""
    return re.findall(r"[a-z0-9']+|#", _SLOT.sub(" # ", text).lower())


def grams(text: str) -> Iterator[str]:
    """Yield the hash of every run of 13 words that says something."""
    words = words_of(text)
    for i in range(len(words) - N_WORDS + 1):
        run = words[i : i + N_WORDS]
        if sum(word != "#" for word in run) >= LEAST_WORDS:
            yield hashlib.sha256(" ".join(run).encode()).hexdigest()[:12]


@cache
def stock_grams() -> frozenset[str]:
    """Return the hashes that are kept."""
    lines = FILE.read_text(encoding="ascii").splitlines()
    assert lines[0] == f"# lm_eval {VERSION}"
    return frozenset(lines[1:])


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _texts(folder: Path) -> Iterator[str]:
    """Yield RULER's strings, alone and in the order they stand in, then the YAML files' prompts."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    for path in sorted((folder / "ruler").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        said = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        yield from (text * 3 for text in said)  # noise is said over and over
        yield from (a + " " + b for a, b in pairwise(said))
    for path in sorted(path for name in FOLDERS for path in (folder / name).rglob("*.y*ml")):
        if "{" not in (text := path.read_text(encoding="utf-8")) and "description" not in text:
            continue
        made = yaml.load(text, Loader=Loader)
        if isinstance(made, dict):
            for key in ("doc_to_text", "description", "gen_prefix", "fewshot_config", "doc_to_target"):
                yield from _strings(made.get(key))


def write(texts: Iterable[str]) -> None:
    """Write the hashes of some texts to the file."""
    found = sorted({gram for text in texts for gram in grams(text)})
    FILE.write_text("\n".join((f"# lm_eval {VERSION}", *found)) + "\n", encoding="ascii")


if __name__ == "__main__":
    from importlib.metadata import version

    if version("lm_eval") != VERSION:
        sys.exit(f"lm_eval {version('lm_eval')} is installed, not {VERSION}")
    from importlib.util import find_spec

    write(_texts(Path(str(find_spec("lm_eval").origin)).parent / "tasks"))  # importing it would import torch
