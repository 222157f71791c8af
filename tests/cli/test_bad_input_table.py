"""Bad input of every kind, one by one: ``plan`` and ``run`` say the same one sentence, and nothing is written."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvscope
from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.passes.config import config_keys, make_config

MOST_CHARACTERS = 2048
DIGITS = "9" * 400
ANCHORS = (
    "[&a [x,x,x,x,x,x,x,x,x],&b [*a,*a,*a,*a,*a,*a,*a,*a,*a],&c [*b,*b,*b,*b,*b,*b,*b,*b,*b],"
    "&d [*c,*c,*c,*c,*c,*c,*c,*c,*c],[*d,*d,*d,*d,*d,*d,*d,*d,*d]]"
)

MODELS = [
    "m" * 300, "~nobodyx/x", "~nobodyx", "a\0b", "./a\0b", "/" + "x" * 300, "a/" + "b" * 300, "", " ", "./\udc80x",
    "{here}/file", "./" + "a/" * 3000, "a\nb/c", "{here}/folder", "preset:nosuch", "{here}/fifo", "a/b/c",
]  # fmt: skip
OPTIONS = [
    ("--time-limit", "inf"), ("--time-limit", "nan"), ("--time-limit", "0"), ("--time-limit", "-1"),
    ("--time-limit", "1e400"), ("--gpu-budget", DIGITS), ("--gpu-budget", "1XiB"), ("--gpu-budget", "-1"),
    ("--samples", str(10**23)), ("--samples", "2000000"), ("--samples", "1.5"), ("--samples", "1" * 5000),
    ("--seed", "-1"), ("--seed", str(2**63)), ("--seed", "0x10"), ("-l", DIGITS), ("-l", "0"), ("-l", "-5"),
    ("-l", "1e3"), ("-l", ""), ("--device", "cuda:-1"), ("--device", f"cuda:{DIGITS}"), ("--device", "tpu"),
    ("--device", "cuda:99"), ("--device", ""), ("--dtype", "float8"), ("--kv", "none"), ("--max-new-tokens", "0"),
    ("--method-from", ""),
    ("--sweep", "dense"), ("--sweep", "random.seed=2001-13-45"), ("--sweep", "dense.a=[[["), ("--sweep", ".=,"),
    ("--footprint-length", "x"), ("--batch", "0"), ("--batch", "x"), ("--batch", "1.5"), ("--batch", "1000000"),
]  # fmt: skip
SETS = [
    "seed=2001-13-45", "samples=" + "[" * 1000, f"samples={ANCHORS}", "samples=nan", "samples=1e23", "samples=[1,2]",
    "samples=true", f"seed={2**70}", "gpu_budget_bytes=inf", "footprint=[]", "methods=5", "tasks=5", "methods={}",
    "tasks={name: 5}", "methods=[[dense]]", "lengths_tokens={a: 1}", "model=[a]", "device=5", "out=[a]", "dtype=[1]",
    "answer_nll=5", "method_from=5", "page_tokens=0", "page_tokens=7", "prefill_chunk_tokens=-1", "max_new_tokens=1e9",
    "footprint_timeout_s=nan", "find_max_resolution=2", "max_batch=0", f"max_batch={DIGITS}",
    "footprint_decode_tokens=1", "kv=x", "decode_graph=x", "=5", "a", "samples=&a [*a]",
    "samples=!!python/name:os.system", "x=1", "samples=!!timestamp 2001-99-99", "samples={a: 1, a: 2}", "samples=\t",
    "samples=\"\\ud800\"", "samples=%", "out=\"a\\0b\"", "model=\"\"",
]  # fmt: skip
METHODS = [
    "random:fraction=nan", "random:fraction=1e400", f"random:seed={DIGITS}", "random:seed=2001-01-01",
    "lsa:threshold=inf", "recency:recency_tokens=-1", "quest:budget_tokens=1", "lsa:indexer=~nobodyx/x",
    "lsa:indexer=" + "x" * 300, "lsa:indexer=/dev/null", "dsa:indexer={here}/folder", "lsa:indexer=a\0b",
    "dsa:selection=nosuch,indexer=x", ":", "dense:", "dense:x", "x:y:z", "os:system", "os.path:join", "nosuch.mod:Cls",
    f"recency:budget_bytes=9{DIGITS}", "sliding_window:window=0", "lsa:chunk_tokens=0", f"lsa:tau={10**20}",
    "random:fraction=0.1,fraction=0.2", "recency:a\nb=1", "\udc80", "dense" * 2000,
]  # fmt: skip
TASKS = [
    "niah_multikey_2:data=5", "niah_single_1:data=5", "jsonl:{here}/folder", "jsonl:{here}/fifo", "jsonl:~nobodyx/f",
    "jsonl:" + "x" * 300, "jsonl:{here}/latin.txt", "jsonl:{here}/empty.txt", "jsonl:/dev/zero", "niah_single_2",
    *(f"niah_single_2:data={path}" for path in (
        "{here}/latin.txt", "{here}/folder", "{here}/fifo", "{here}/nothing.txt", "{here}/empty.txt",
        "{here}/blank.txt", "a\0b", "~nobodyx/e.txt", "x" * 300, "/dev/null", "/dev/zero", "{here}/utf16.txt",
        "{here}/one_word.txt", "{here}/file/under", "{here}/list.json", "{here}/number.json", "{here}/loop",
    )),
    "long_qa:types=nosuch", "os:system",
]  # fmt: skip
FILES = [
    "{here}/folder", "{here}/fifo", "{here}/binary.yaml", "{here}/huge.yaml", "{here}/list.yaml", "{here}/tag.yaml",
    "{here}/tabs.yaml", "{here}/loop", "~nobodyx/x.yaml", "x" * 300, "/dev/zero", "a\0b", "{here}/nothing.yaml",
]  # fmt: skip
OUTS = [
    "{here}/file/x/y",
    "{here}/file",
    "a\0b",
    "{here}/" + "o" * 300,
    "~nobodyx/x",
    "{here}/fifo",
    "",
    "\udc80",
    "/proc/x",
    "/sys/x/y",
]

CASES: list[list[str]] = [
    *(["--model", model] for model in MODELS),
    *(list(pair) for pair in OPTIONS),
    *(["--set", item] for item in SETS),
    *(["-m", method] for method in METHODS),
    *(["-t", task] for task in TASKS),
    *([file] for file in FILES),
    *(["--out", out] for out in OUTS),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of files that are none of what is wanted."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to(folder / "loop")
    contents = {
        "file": b"x", "latin.txt": b"caf\xe9 " * 5000, "empty.txt": b"", "blank.txt": b" \n" * 100,
        "utf16.txt": "essay text ".encode("utf-16") * 100, "one_word.txt": b"x" * 50_000, "list.json": b"[1]",
        "number.json": b'{"text": 5}', "binary.yaml": b"\x00\x01\xff", "huge.yaml": b"a: b\n" * 400_000,
        "list.yaml": b"- a\n", "tag.yaml": b"a: !!python/object:os.system x\n", "tabs.yaml": b"a:\n\t- b",
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def tried(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, list[str]], str]]:
    """Return a caller of a command over the tiny model that demands exit 2, one short sentence and nothing written."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    good = ["--model", tiny_model, "-m", "dense", "-n", "1", "--max-new-tokens", "2", "--no-footprint"]

    def call(command: str, bad: list[str]) -> str:
        out = [] if "--out" in bad else ["--out", str(tmp_path / "run")]
        rest = [*([] if "-t" in bad else ["-t", "niah_single_1"]), *([] if "-l" in bad else ["-l", "512"])]
        device = [] if "--device" in bad else ["--device", "cpu"]
        code = cli.run_cli([command, *good, *out, *rest, *device, *bad])
        printed, told = capsys.readouterr()
        assert code == 2, told[:MOST_CHARACTERS]
        assert printed == ""
        assert told.startswith("kvscope: ")
        assert told.count("\n") == 1
        assert len(told) <= MOST_CHARACTERS
        assert "Traceback" not in told
        assert list(tmp_path.iterdir()) == [], "nothing is written"
        return told

    yield call
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: repr(" ".join(bad))[1:41])
def test_plan_and_run_refuse_it_in_the_same_sentence(
    bad: list[str], here: Path, tried: Callable[[str, list[str]], str]
) -> None:
    arguments = [item.replace("{here}", str(here)) for item in bad]
    assert tried("plan", arguments) == tried("run", arguments)


WRONG: list[Any] = [
    object(), [[1]], {"a": 1}, b"x", 5.5, float("nan"), float("inf"), 10**400, -1, "", "\0", "\udc80", [None], set(),
    "x" * 100_000, [b"x"], ["a"] * 5000, {"name": object()}, [{"name": "dense", "x": object()}], range(3), 3 + 4j,
]  # fmt: skip


@pytest.mark.parametrize("key", config_keys())
def test_a_value_of_any_type_is_read_or_refused_in_a_sentence(key: str) -> None:
    told = []
    for value in WRONG:
        try:
            make_config({key: value})
        except UsageError as error:
            told.append(str(error))
    assert len(told) >= len(WRONG) // 2
    assert [text for text in told if "\n" in text or len(text) > MOST_CHARACTERS] == []


@pytest.mark.parametrize(
    ("config", "out", "words"),
    [
        (None, "run", "The configuration is None, expected a mapping"),
        (5, "run", "The configuration is 5, expected a mapping"),
        ("reference", "run", "expected a mapping"),
        ([], "run", "expected a mapping"),
        (kvscope.RunConfig, "run", "expected a mapping"),
        ({5: 1}, "run", "Unknown key 5"),
        ({}, 5, "out is 5, expected a path."),
        ({}, b"run", "out is b'run', expected a path."),
        ({}, "a\0b", "no path holds a NUL character"),
        ({}, "", "Say where the results go"),
        ({"out": 5}, None, "out in the configuration is 5, expected text."),
        ({"out": "o" * 300}, None, "is too long to be a path"),
    ],
)
def test_run_from_python_refuses_it_in_a_sentence(
    config: Any, out: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        kvscope.run(config, out=out, progress=False)
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"samples": "x"}, "samples in RunConfig is 'x', expected a whole number"),
        ({"sample": 5}, "Unknown key 'sample' in RunConfig. Did you mean 'samples'?"),
        ({"methods": 5}, "methods in RunConfig is 5"),
        ({"device": "tpu"}, "device: 'tpu' is not a device"),
        ({"tasks": ["a", "a"]}, "'a' is given twice"),
    ],
)
def test_a_configuration_made_in_python_is_refused_in_a_sentence(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        kvscope.RunConfig(**values)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", [5, None, b"x", [], "", "a\0b", "x" * 300, "~nobodyx/run", "/dev/null"])
def test_load_run_refuses_it_in_a_sentence(folder: Any) -> None:
    with pytest.raises(UsageError) as caught:
        kvscope.load_run(folder)
    assert "\n" not in str(caught.value)
