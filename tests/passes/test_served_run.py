"""Runs of a model behind a server: the rows, what run.json keeps, faults in the middle, and what is refused."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_server import KEY, Stub, no_pauses, stub_server

import kvscope
from kvscope import cli
from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.served.address import KEY_VARIABLE
from kvscope.results.frames import Run, records

TOO_LONG = (400, {}, json.dumps({"error": {"message": "maximum context length is 300 tokens"}}))
BROKEN = (500, {}, json.dumps({"error": {"message": "CUDA error"}}))
PROBES = 7
"""Requests of a probe of the stub as it is."""


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    no_pauses(monkeypatch)
    with stub_server() as running:
        yield running


@pytest.fixture
def asked(stub: Stub, tmp_path: Path) -> dict[str, Any]:
    """Return the keys of a small run."""
    return {
        "model": stub.url,
        "tokenizer": "reference",
        "tasks": ["niah_single_1"],
        "lengths_tokens": [320, 512],
        "samples": 3,
        "max_new_tokens": 24,
        "request_tries": 2,
        "out": str(tmp_path / "run"),
    }


def run_of(asked: dict[str, Any], **more: Any) -> Run:
    return kvscope.run({**asked, **more}, progress=False)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_rows_of_a_server(stub: Stub, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(asked)
    assert list(run.samples["score"]) == [1.0] * 6
    assert set(run.samples["method_label"]) == {"served"}
    assert list(run.samples["length_tokens"]) == [320] * 3 + [512] * 3
    row = records(run.samples)[0]
    assert (row["model"], row["device"], row["dtype"], row["saving_kind"]) == ("stub", "server", "unknown", "unknown")
    assert (row["resident_kv_bytes"], row["decode_s"], row["prefill_s"]) == (None, None, None)
    assert row["ledger_reason"] == "the model runs in a server: kvscope does not see its cache"
    # The stub leaves the stop string in the text and says that it stopped: both are kept apart.
    assert row["output"] == f" {row['targets'][0]}."
    assert row["stop_reason"] == "stop"
    served = row["served"]
    assert served["after_stop"].startswith("\nThe grass")
    assert (served["tries"], served["finish_reason"], served["prompt_tokens"]) == (1, "stop", row["prompt_tokens"])
    assert served["nvml_reason"] == "no --server-pid"
    found = run.info.environment["server"]
    assert isinstance(found, dict)
    assert (found["form"], found["repeats"], found["extra_prompt_tokens"]) == ("token_ids", True, 0)
    assert (found["context_tokens"], found["context_from"]) == (4096, "the server, max_model_len of /models")
    assert run.info.identity["model"]["url"] == stub.url
    sent = [body["prompt"] for body in stub.requests[PROBES:]]
    assert [len(ids) for ids in sent] == [296] * 3 + [488] * 3
    assert cli.run_cli(["report", asked["out"]]) == 0
    said = capsys.readouterr().out
    assert "stub on a server" in said
    assert "100.0 [43.9, 100.0]" in said
    assert "Footprint: not measured: the model runs in a server, whose cache is not seen." in said


def test_the_lengths_of_answers_decide_not_the_servers_word(stub: Stub, asked: dict[str, Any]) -> None:
    stub.answer, stub.finish_reason = (lambda text, asked: "one two three four five six seven eight nine ten"), "stop"
    run = run_of(asked, max_new_tokens=5, lengths_tokens=[320])
    assert set(run.samples["stop_reason"]) == {"length"}
    stub.answer, stub.finish_reason = (lambda text, asked: "one"), "length"
    run = run_of(asked, lengths_tokens=[320], out=asked["out"] + "2")
    assert set(run.samples["stop_reason"]) == {"eos"}


def test_the_same_rows_with_several_requests_at_a_time(stub: Stub, asked: dict[str, Any]) -> None:
    one = run_of(asked)
    several = run_of(asked, concurrency=4, out=asked["out"] + "2")
    assert several.info.environment["server"]["concurrency"] == 4
    columns = ["task", "length_tokens", "sample", "prompt_sha256", "output", "score"]
    assert one.samples[columns].equals(several.samples[columns])


def test_a_server_that_dies_in_the_middle(stub: Stub, asked: dict[str, Any]) -> None:
    folder = Path(asked["out"])
    stub.dies_after = PROBES + 2
    with pytest.raises(
        EnvironmentProblem, match=r"cannot be reached .*: 2 rows are kept, and the same command continues"
    ):
        run_of(asked)
    before = (folder / "samples.jsonl").read_bytes()
    assert len(before.splitlines()) == 2
    with pytest.raises(UsageError, match="cannot be reached"):  # still dead: the folder is as it was
        run_of(asked)
    stub.dies_after = None
    run = run_of(asked)
    assert (folder / "samples.jsonl").read_bytes().startswith(before)
    assert list(run.samples["score"]) == [1.0] * 6
    n_sent = len(stub.requests)
    run_of(asked)
    assert len(stub.requests) == n_sent + PROBES, "nothing was left to send but the probe"


def test_answers_that_are_there_when_the_server_dies_are_kept(stub: Stub, asked: dict[str, Any]) -> None:
    """Of four prompts under way together two are answered: their rows are on disk, in whatever order they came."""
    alone_and_together = 2 * 4
    stub.dies_after = PROBES + alone_and_together + 4
    with pytest.raises(EnvironmentProblem, match="4 rows are kept"):
        run_of(asked, concurrency=4)
    stub.dies_after = None
    assert list(run_of(asked, concurrency=4).samples["score"]) == [1.0] * 6


def test_prompts_that_fail_are_rows_and_are_sent_again(
    stub: Stub, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    real = stub.post
    planned: list[Any] = [*[None] * PROBES, TOO_LONG, BROKEN, BROKEN]

    def post(path: str, body: dict[str, Any]) -> Any:
        reply = planned.pop(0) if planned else None
        return real(path, body) if reply is None else reply

    stub.post = post  # type: ignore[method-assign]
    run = run_of(asked)
    assert list(run.samples["status"]) == ["failed", "failed", "ok", "ok", "ok", "ok"]
    reasons = list(run.samples["reason"].dropna())
    assert reasons == [
        "context overflow: HTTP 400: maximum context length is 300 tokens",
        "request: HTTP 500: CUDA error (2 tries)",
    ]
    assert set(run_of(asked).samples["status"]) == {"ok"}


def test_a_prompt_that_the_server_cuts_has_no_answer(stub: Stub, asked: dict[str, Any]) -> None:
    stub.cut_from = 400
    run = run_of(asked)
    assert list(run.samples["status"]) == ["ok"] * 3 + ["failed"] * 3
    assert "the server counts 400 tokens where the prompt has 488" in run.samples["reason"].iloc[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda reply: reply.update(model="org/stand-in"), "was asked for 'stub' and answers as 'org/stand-in'"),
        (lambda reply: reply["usage"].update(completion_tokens=500), "gives 500 tokens where 24 are asked for"),
        (lambda reply: reply["choices"][0].update(finish_reason="abort"), "broke the answer off: 'abort'"),
    ],
    ids=["a model that stands in", "more tokens than asked for", "an aborted answer"],
)
def test_an_answer_that_is_none_is_not_scored(stub: Stub, asked: dict[str, Any], change: Any, said: str) -> None:
    """The probe saw nothing of it: a gateway falls back, or an engine aborts, in the middle of a run."""
    real, n_asked = stub.post, [0]

    def post(path: str, body: dict[str, Any]) -> Any:
        n_asked[0] += 1
        status, headers, text = real(path, body)  # type: ignore[misc]
        reply = json.loads(text)
        if n_asked[0] == PROBES + 1:
            change(reply)
        return status, headers, json.dumps(reply)

    stub.post = post  # type: ignore[method-assign]
    run = run_of(asked, lengths_tokens=[320])
    assert list(run.samples["status"]) == ["failed", "ok", "ok"]
    assert said in run.samples["reason"].iloc[0]
    assert list(run_of(asked, lengths_tokens=[320]).samples["status"]) == ["ok"] * 3, "it is sent again"


def test_a_broken_server_ends_the_run(stub: Stub, asked: dict[str, Any]) -> None:
    real, planned = stub.post, [None] * PROBES

    def post(path: str, body: dict[str, Any]) -> Any:
        return planned.pop() or real(path, body) if planned else BROKEN

    stub.post = post  # type: ignore[method-assign]
    with pytest.raises(EnvironmentProblem, match="left 3 prompts one after another without an answer, the last with"):
        run_of(asked)
    assert len(stub.requests) == PROBES
    del stub.post  # type: ignore[method-assign]
    assert set(run_of(asked).samples["status"]) == {"ok"}


def test_a_key_is_sent_and_kept_nowhere(
    stub: Stub, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stub.key = KEY
    command = ["run", "--model", stub.url, "--tokenizer", "reference", "-t", "niah_single_1", "-l", "320", "-n", "2",
               "--max-new-tokens", "8", "--no-report", "--out", asked["out"]]  # fmt: skip
    assert cli.run_cli(command) == UsageError.exit_code
    assert not Path(asked["out"]).exists()
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    real, planned = stub.post, [*[None] * PROBES, (400, {}, json.dumps({"error": {"message": f"{KEY} is over quota"}}))]

    def post(path: str, body: dict[str, Any]) -> Any:
        reply = planned.pop(0) if planned else None
        return real(path, body) if reply is None else reply

    stub.post = post  # type: ignore[method-assign]
    assert cli.run_cli(command) == cli.EXIT_CELLS_FAILED
    said = capfd.readouterr()
    assert "*** is over quota" in said.err
    assert KEY not in said.out + said.err
    for path in Path(asked["out"]).rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in stub.headers[1:])


def test_another_server_does_not_continue_a_folder(stub: Stub, asked: dict[str, Any]) -> None:
    run_of(asked, lengths_tokens=[320])
    stub.token_ids = False
    with pytest.raises(UsageError, match=r"model\.form \(there: \"token_ids\", asked: \"text\"\)"):
        run_of(asked, lengths_tokens=[320])
    with pytest.raises(UsageError, match=r"it differs in: .*seed"):
        run_of(asked, lengths_tokens=[320], seed=1)


def test_runs_of_servers_are_compared_and_shown(
    stub: Stub, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_of(asked, lengths_tokens=[320])
    stub.answer = lambda text, asked: " no idea"
    other = run_of(asked, lengths_tokens=[320], out=asked["out"] + "2")
    assert cli.run_cli(["compare", str(first.folder), str(other.folder)]) == 0
    said = capsys.readouterr().out
    assert "100.0  0.0" in said
    assert "Bytes of answers are not compared: the model runs in a server, whose cache is not seen." in said
    assert cli.run_cli(["samples", str(first.folder), "--prompt", "--limit", "1"]) == 0
    assert f"is: {first.samples['targets'][0][0]}." in capsys.readouterr().out


def test_more_of_the_same_continues_a_folder(stub: Stub, asked: dict[str, Any]) -> None:
    run_of(asked, lengths_tokens=[320], samples=1)
    run = run_of(asked, concurrency=2, request_timeout_s=5.0)
    assert len(run.samples) == 6
    assert run.info.lengths_tokens == (320, 512)


def test_the_plan_asks_for_no_answer(stub: Stub, asked: dict[str, Any]) -> None:
    text = make_plan(make_config(asked)).text()
    assert f"stub at {stub.url} (tests): completions requests, at most 4,096 tokens (the server, max_model_len" in text
    assert "6 prompts to send: 2,496 tokens, answers included" in text
    assert stub.requests == []


BAD = {
    "no server": ({"model": "http://127.0.0.1:9/v1"}, r"cannot be reached \(Connection refused\): start it"),
    "a wrong path": ({"model": "{host}/v2"}, "no path of an OpenAI-compatible server"),
    "an unknown name": ({"served_model": "stubb"}, r"has no model 'stubb'\. Did you mean 'stub'\?"),
    "no tokenizer": ({"tokenizer": None}, "tokenizer: prompts of an exact length need"),
    "a tokenizer that is none": ({"tokenizer": "nothing-here"}, "There is no model 'nothing-here'"),
    "methods": ({"methods": ["dense"]}, "a server has one method, its own"),
    "a footprint": ({"footprint": True}, "cannot measure the cache of a server"),
    "throughput": ({"throughput": True, "tasks": []}, r"throughput: it is about a model that kvscope runs itself"),
    "a dtype": ({"dtype": "float16"}, "dtype: it is about a model that kvscope runs itself"),
    "likelihoods": ({"answer_nll": True}, "answer_nll: it is about a model that kvscope runs itself"),
    "too long": ({"lengths_tokens": [8192]}, "Length 8,192 is over the 4,096 tokens"),
    "more than the server says": ({"server_context_tokens": 9000}, "the server takes 4,096 tokens"),
    "chat without a template": ({"api": "chat"}, "give the template with --chat-template FILE"),
    "no such process": ({"server_pid": 2**22 + 1}, "there is no process"),
    "a secret": ({"model": "http://me:word@127.0.0.1/v1"}, "holds a user, a password"),
    "a server's key without a server": ({"model": "reference"}, "it is about a server: give --model its URL"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_before_there_is_a_folder(stub: Stub, asked: dict[str, Any], name: str) -> None:
    change, said = BAD[name]
    change = {
        key: value.replace("{host}", stub.url.removesuffix("/v1")) if isinstance(value, str) else value
        for key, value in change.items()
    }
    with pytest.raises(UsageError, match=said) as raised:
        run_of(asked, **change)
    assert "\n" not in str(raised.value)
    assert not Path(asked["out"]).exists()
    assert stub.requests == []


def test_a_method_called_served_needs_a_server(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'served' is what a server does: give --model its URL"):
        make_config({"methods": ["served"]})


def test_a_context_that_only_the_servers_count_leaves(stub: Stub, asked: dict[str, Any]) -> None:
    stub.token_ids, stub.extra_tokens = False, 3
    with pytest.raises(UsageError, match=r"Length 512 is over the 512 tokens .* as it counts 3 tokens more than we do"):
        run_of(asked, server_context_tokens=512)
    assert not Path(asked["out"]).exists()


def test_a_context_that_nobody_knows(stub: Stub, asked: dict[str, Any], tmp_path: Path) -> None:
    from stub_server import reference_tokenizer

    folder = tmp_path / "tokenizer"
    reference_tokenizer().save_pretrained(folder)
    stub.models = {"data": [{"id": "stub"}]}
    with pytest.raises(UsageError, match="does not say how long a prompt may be"):
        run_of(asked, tokenizer=str(folder))
    run = run_of(asked, tokenizer=str(folder), server_context_tokens=600)
    assert run.info.environment["server"]["context_from"] == "server_context_tokens"
    assert set(run.samples["score"]) == {1.0}


def test_nvml_of_a_server_without_a_gpu(stub: Stub, asked: dict[str, Any]) -> None:
    run = run_of(asked, lengths_tokens=[320], samples=1, server_pid=os.getpid())
    (served,) = run.samples["served"]
    assert (served["nvml_bytes"] is None) != (served["nvml_reason"] is None)
    assert served["nvml_reason"] != "no --server-pid"
