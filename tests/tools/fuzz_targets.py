"""What is fuzzed: every reader of text and files that may come from anywhere, as a function of bytes.

A target may raise a ``KvscopeError`` alone, of one sentence under 2 KB. Anything else it raises is a fault.
"""

import atexit
import gzip
import lzma
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from synthetic_rows import single_rows

from kvscope.errors import KvscopeError
from kvscope.harness.passes.config import RunConfig, load_config, make_config
from kvscope.harness.passes.yaml_text import read_yaml
from kvscope.harness.served.asking import Manner, ServedPrompt, ask
from kvscope.harness.served.client import Client
from kvscope.harness.served.server import describe_server
from kvscope.methods.indexer_weights import tensor_headers
from kvscope.methods.lsa.indexer_files import FILES
from kvscope.methods.registry import create_method
from kvscope.results.frames import load_run
from kvscope.results.memory_rows import FootprintRow, MaxContextRow
from kvscope.results.reproduction import CellPlan, Reproduction, read_reproduction
from kvscope.results.rowfile import read_rows
from kvscope.results.schema import SampleRow, ThroughputRow
from kvscope.results.store import read_info
from kvscope.specs import parse_spec
from kvscope.tasks.jsonl_file import read_jsonl
from kvscope.tasks.public.longbench_v2 import Question as Choice
from kvscope.tasks.public.longmemeval import Question as Chats
from kvscope.tasks.public.mrcr import Question as Conversation
from kvscope.tasks.public.records import benchmark_records
from kvscope.tasks.public.ruler_qa_data import hotpot, squad
from kvscope.tasks.registry import create_task
from kvscope.units import parse_length

MOST_MESSAGE_BYTES = 2048
FOLDER = Path(tempfile.mkdtemp(prefix="kvscope-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


class FoundFaultError(AssertionError):
    """A message that nobody could read, or a value that does not read back."""


def check(target: Callable[[bytes], None], data: bytes) -> None:
    """Try one input.

    Raises:
        Exception: whatever is no error of kvscope's own.
        FoundFaultError: an error whose message is empty, of several lines, or too long.
    """
    try:
        target(data)
    except KvscopeError as error:
        text = str(error)
        if not text or "\n" in text or len(text.encode("utf-8", "surrogatepass")) > MOST_MESSAGE_BYTES:
            raise FoundFaultError(f"the message is {text[:200]!r}, {len(text):,} characters") from error


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def spec(data: bytes) -> None:
    found = parse_spec(text_of(data), kind="method")
    if parse_spec(str(found), kind="method") != found:
        raise FoundFaultError(f"{found!r} is written as {str(found)!r}, which reads otherwise")


def method(data: bytes) -> None:
    create_method(text_of(data))


def task(data: bytes) -> None:
    given = parse_spec(text_of(data), kind="task")
    if not given.is_import_path:  # it would be imported, as the command line may ask for
        create_task(given)


def length(data: bytes) -> None:
    parse_length(text_of(data))


def setting(data: bytes) -> None:
    load_config(sets=[text_of(data)], flags={"out": "run"})


def sweep(data: bytes) -> None:
    load_config(sweeps=[text_of(data)], flags={"methods": ["quest"], "out": "run"})


def yaml_file(data: bytes) -> None:
    values = read_yaml(written("run.yaml", data))
    make_config(values, source="the file")


def config(data: bytes) -> None:
    """A key of the configuration by the first byte, a value by the rest."""
    keys = sorted(RunConfig.model_fields)
    key = keys[data[0] % len(keys)] if data else "model"
    make_config({key: text_of(data[1:])})


def written(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def rows(kind: Any) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        read_rows(written("rows.jsonl", data), kind, messages=[], mend=False)

    return read


def run_json(data: bytes) -> None:
    folder = FOLDER / "run"
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_bytes(data)
    read_info(folder)


def reproduce_json(data: bytes) -> None:
    folder = FOLDER / "reproduction"
    folder.mkdir(exist_ok=True)
    (folder / "reproduce.json").write_bytes(data)
    read_reproduction(folder)


def run_folder(data: bytes) -> None:
    """A run of one row whose run.json is good."""
    folder = FOLDER / "whole"
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(RUN.model_dump_json())
    (folder / "samples.jsonl").write_bytes(data)
    load_run(folder)


def jsonl(data: bytes) -> None:
    read_jsonl(written("prompts.jsonl", data))


def packed(data: bytes) -> None:
    read_jsonl(written("prompts.jsonl.xz" if data.startswith(b"\xfd7zXZ") else "prompts.jsonl.gz", data))


def records(name: str, kind: Any) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        ending = ".parquet" if data.startswith(b"PAR1") else ".json"
        benchmark_records(name, str(written(f"data{ending}", data)), kind)

    return read


def corpus(reader: Callable[[str, str | None], Any]) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        reader("ruler_qa", str(written(f"data{'.parquet' if data.startswith(b'PAR1') else '.json'}", data)))

    return read


def indexer(data: bytes) -> None:
    folder = FOLDER / "indexer"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(data)
    FILES.read_config(folder)


def weights(data: bytes) -> None:
    tensor_headers(written("model.safetensors", data))


@cache
def _client() -> Client:
    return Client("http://127.0.0.1:9/v1", key="sk-a-key-of-many-characters", tries=1)


def server_reply(data: bytes) -> None:
    """Read a body as an answer, as a list of models, and as an error; the first byte says which."""
    import requests

    reply, client = requests.Response(), _client()
    reply.status_code, reply._content = (400 if data[:1] == b"\x01" else 200), data[1:]
    client._session.request = lambda *_, **__: reply  # type: ignore[method-assign]
    if data[:1] == b"\x02":
        describe_server(client, model=None)
        return
    manner = Manner(model="stub", form="messages" if data[:1] == b"\x03" else "text")
    answer = ask(client, manner, ServedPrompt(ids=(1,), text="a", message="a"), max_new_tokens=4)
    "".join(filter(None, (answer.text, answer.finish_reason, answer.model))).encode()


SAMPLES, FOOTPRINTS, RUN = single_rows()
REPRODUCTION = Reproduction(
    kvscope_version="0.1.0", started_utc="2026-01-01", profile="lsa", size="quick", model="reference", lsa="lsa",
    divisor=64, window_tokens=128,
    cells=(
        CellPlan(name="ruler-64k", role="ruler", paper_row="RULER 64K", lengths_tokens=(1024,), tasks=("vt",),
                 samples=2, methods={"dense": "dense", "lsa": "lsa"}, lsa_share=0.2),
    ),
)  # fmt: skip
SAMPLE_LINE = SAMPLES[0].model_dump_json().encode() + b"\n"
JSONL_LINE = b'{"prompt": "1 + 1 =", "answers": ["2"], "id": 1}\n'
TARGETS: dict[str, Callable[[bytes], None]] = {
    "spec": spec,
    "method": method,
    "task": task,
    "length": length,
    "setting": setting,
    "sweep": sweep,
    "yaml": yaml_file,
    "config": config,
    "samples": rows(SampleRow),
    "footprint": rows(FootprintRow),
    "throughput": rows(ThroughputRow),
    "max_context": rows(MaxContextRow),
    "run_json": run_json,
    "reproduce_json": reproduce_json,
    "run_folder": run_folder,
    "jsonl": jsonl,
    "packed_jsonl": packed,
    "longbench_v2": records("longbench_v2", Choice),
    "longmemeval": records("longmemeval_s", Chats),
    "mrcr": records("mrcr", Conversation),
    "ruler_qa_squad": corpus(squad),
    "ruler_qa_hotpot": corpus(hotpot),
    "indexer": indexer,
    "weights": weights,
    "server_reply": server_reply,
}
SEEDS: dict[str, tuple[bytes, ...]] = {
    "spec": (b"quest:budget_tokens=1k", b'jsonl:"a,b.jsonl",metric=f1', b"pkg.mod:Class:key=1"),
    "method": (b"lsa:tau=4,budget_fraction=0.1", b"random:fraction=0.2,seed=3", b"snapkv:budget_tokens=256"),
    "task": (b"niah_single_1", b"long_qa:types=a+b", b"jsonl:q.jsonl"),
    "length": (b"4096", b"64k", b"1M", b"1.5k"),
    "setting": (b"samples=5", b"lengths_tokens=[1k, 2k]", b"methods=[dense, {name: quest, budget_tokens: 1k}]"),
    "sweep": (b"quest.budget_tokens=256,1k", b"lsa.threshold=0.3,0.5"),
    "yaml": (
        b"model: reference\nmethods: [dense]\nlengths_tokens: [1k]\n",
        b"a: &a [1]\nb: *a\n",
        b"<<: {samples: 3}\n",
    ),
    "config": (b"\x001", b"\x05auto", b"\x1064k"),
    "samples": (SAMPLE_LINE,),
    "run_folder": (SAMPLE_LINE,),
    "footprint": (FOOTPRINTS[0].model_dump_json().encode() + b"\n",),
    "run_json": (RUN.model_dump_json().encode(),),
    "reproduce_json": (REPRODUCTION.model_dump_json().encode(),),
    "jsonl": (JSONL_LINE,),
    "packed_jsonl": (gzip.compress(JSONL_LINE, mtime=0), lzma.compress(JSONL_LINE)),
    "longbench_v2": (
        b'[{"domain": "d", "difficulty": "easy", "question": "q", "answer": "A", "context": "c", '
        b'"choice_A": "1", "choice_B": "2", "choice_C": "3", "choice_D": "4"}]',
    ),
    "longmemeval": (
        b'[{"question_id": "1", "question_type": "multi-session", "question": "q", "answer": 3, "question_date": "d", '
        b'"haystack_dates": ["d"], "haystack_session_ids": ["s"], "answer_session_ids": ["s"], '
        b'"haystack_sessions": [[{"role": "user", "content": "c"}]]}]',
    ),
    "ruler_qa_squad": (
        b'{"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": "c", "qas": [{"id": "1", '
        b'"question": "q", "answers": [{"text": "a", "answer_start": 0}], "is_impossible": false}]}]}]}',
    ),
    "ruler_qa_hotpot": (
        b'[{"_id": "1", "question": "q", "answer": "a", "context": [["t", ["s", ""]]], '
        b'"supporting_facts": [["t", 0]]}]',
    ),
    "mrcr": (
        b'{"prompt": "[{\\"role\\": \\"user\\", \\"content\\": \\"c\\"}]", "answer": "ab", '
        b'"random_string_to_prepend": "a", "n_needles": 2, "n_chars": 9}\n',
    ),
    "server_reply": (
        b'\x00{"choices": [{"text": "a\\ud83d", "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}, '
        b'"model": "stub"}',
        b'\x01{"error": {"message": "maximum context length is 8\\ud83d", "code": 400}}',
        b'\x02{"data": [{"id": "stub", "max_model_len": 4096, "aliases": ["a"]}]}',
        b'\x03{"choices": [{"message": {"content": [{"type": "text", "text": "a"}]}}]}',
        b'\x01{"detail": [{"loc": ["body", 0], "msg": "no"}]}',
        b'\x00{"error": {"message": "overloaded", "code": 502}}',
    ),
    "weights": (b'\x08\x00\x00\x00\x00\x00\x00\x00{"a": 1}',),
}
"""Inputs to begin with: good ones, or nearly."""
GOOD = (
    "spec",
    "length",
    "samples",
    "run_folder",
    "footprint",
    "run_json",
    "reproduce_json",
    "jsonl",
    "longbench_v2",
    "longmemeval",
    "mrcr",
    "ruler_qa_squad",
    "ruler_qa_hotpot",
    "server_reply",
)
"""Targets whose first input is good."""
