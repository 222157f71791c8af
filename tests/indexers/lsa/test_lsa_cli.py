"""The whole way through the command line: collect, train, evaluate, run with the result, sweep; and what is refused."""

import json

import pytest

from kvscope import cli
from kvscope.harness.engine.names import sampled_revision
from kvscope.results.frames import load_run


@pytest.fixture(scope="module")
def indexer(tiny_model, tmp_path_factory):
    """Two collections and an indexer of the tiny model, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("lsa")
    shared = ["--model", tiny_model, "--task", "niah_single_1", "-l", "512", "--least-mass", "0", "--device", "cpu"]
    for name, seed, samples in (("train", "50", "6"), ("test", "60", "2")):
        out = str(folder / name)
        assert cli.run_cli(["lsa", "collect", *shared, "--seed", seed, "-n", samples, "--out", out, "-q"]) == 0
    out = str(folder / "indexer")
    assert cli.run_cli(["lsa", "train", "--data", str(folder / "train"), "--out", out, "--epochs", "2", "--tau", "8",
                        "--device", "cpu", "-q"]) == 0  # fmt: skip
    return folder


def test_eval_prints_the_table_and_where_it_is(indexer, tmp_path, capsys):
    command = ["lsa", "eval", "--data", str(indexer / "test"), "--indexer", str(indexer / "indexer")]
    assert cli.run_cli([*command, "--out", str(tmp_path / "tables"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "oracle" in out
    assert str(tmp_path / "tables") in out
    assert (tmp_path / "tables" / "recall.csv").is_file()
    assert cli.run_cli(command) == 2
    assert "needs --indexer and --out (or --gate)" in capsys.readouterr().err


def test_the_gate_ends_with_its_verdict(indexer, tiny_model, capsys):
    code = cli.run_cli(["lsa", "eval", "--data", str(indexer / "test"), "--gate", "--model", tiny_model, "-q"])
    out = capsys.readouterr().out
    assert (code, "gate passed" in out) in [(0, True), (1, False)]
    assert "restricted" in out


def test_run_shows_all_of_it(indexer, tiny_model, tmp_path, capsys):
    spec = f"lsa:indexer={indexer / 'indexer'},tau=2,recency_tokens=64"
    command = [
        "run", "--model", tiny_model, "-m", "dense", "-m", spec, "--sweep", "lsa.threshold=0.3,0.5",
        "--task", "niah_single_1", "-l", "512", "-n", "2", "--max-new-tokens", "5", "--device", "cpu",
        "--set", "footprint_decode_tokens=5", "--out", str(tmp_path / "run"), "-q",
    ]  # fmt: skip
    assert cli.run_cli(command) == 0
    out = capsys.readouterr().out
    assert "threshold=0.3" in out
    run = load_run(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 3
    for row in rows:
        if row["method"] == "dense":
            assert row["residency"] is None
            continue
        residency = row["residency"]
        assert len(residency["resident_tokens"]) == len(residency["recalled_bytes"]) == -(-row["decode_tokens"] // 2)
        assert sum(residency["recalled_bytes"]) == row["bytes_recalled"]
        assert (residency["tau"], residency["indexer_tau"]) == (2, 8)
        assert residency["indexer"].startswith("indexer@")
        assert residency["prompt_tokens"] == max(residency["resident_tokens"] + [residency["prompt_tokens"]])
        assert (row["selection"], row["saving_kind"]) == ("trained", "offloaded")
        assert row["host_kv_bytes"] > 0
        assert row["config"]["chunk_tokens"] == 16
    footprint = run.footprint[run.footprint["method"] == "lsa"]
    assert (footprint["status"] == "ok").all()
    assert all(record["prompt_tokens"] > 0 for record in footprint["residency"])
    assert (tmp_path / "run" / "report" / "report.html").is_file()
    assert cli.run_cli(command) == 0, "the same command again finds every row"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lsa", "No trained indexer comes with kvscope for this model: make one with kvscope lsa fit"),
        ("lsa:chunk_tokens=64", "No trained indexer for chunks of 64 tokens comes with kvscope for this model"),
        ("lsa:indexer={indexer},chunk_tokens=32", "trained for chunks of 16 tokens, chunk_tokens=32 was asked for"),
        ("lsa:indexer=nowhere", "There is no indexer 'nowhere'"),
        ("lsa:threshold=1.2", "threshold must lie between 0 and 1"),
        ("lsa:tau=0", "tau must be 1 or more"),
    ],
)
def test_a_run_is_refused_before_it_starts(indexer, tiny_model, tmp_path, capsys, spec, message):
    spec = spec.format(indexer=indexer / "indexer")
    command = ["run", "--model", tiny_model, "-m", "dense", "-m", spec, "--task", "niah_single_1", "-l", "512",
               "-n", "1", "--no-footprint", "--device", "cpu", "--out", str(tmp_path / "run"), "-q"]  # fmt: skip
    assert cli.run_cli(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_indexer_of_another_model_is_refused_naming_both(indexer, tmp_path, capsys):
    command = ["plan", "--model", "reference", "-m", f"lsa:indexer={indexer / 'indexer'}", "--task", "niah_single_1",
               "-l", "512", "--device", "cpu"]  # fmt: skip
    assert cli.run_cli(command) == 2
    said = capsys.readouterr().err
    assert "it was trained for model 'tiny'" in said
    from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER

    assert sampled_revision(str(REFERENCE_MODEL_FOLDER), None) in said


def test_synthetic_is_planned_and_marked(tiny_model, tmp_path, capsys):
    command = ["run", "--model", tiny_model, "-m", "lsa:selection=synthetic,budget_fraction=0.5", "--task",
               "niah_single_1", "-l", "512", "-n", "1", "--max-new-tokens", "3", "--no-footprint", "--device", "cpu",
               "--out", str(tmp_path / "run"), "-q", "--no-report"]  # fmt: skip
    assert cli.run_cli(command) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert row["selection"] == "synthetic"
    assert row["residency"]["indexer"] is None
    assert row["residency"]["indexer_bytes"] > 0


def test_layers_are_numbers(capsys):
    command = ["lsa", "train", "--data", "x", "--out", "y", "--layers", "3,b"]
    assert cli.run_cli(command) == 2
    assert "--layers '3,b' is not a list of layers" in capsys.readouterr().err


def test_one_collection_serves_an_indexer_of_larger_chunks(indexer, tiny_model, tmp_path, capsys):
    """Collected in chunks of 16; trained, evaluated, run and gated in chunks of 64 of four keys."""
    larger = tmp_path / "larger"
    command = ["lsa", "train", "--data", str(indexer / "train"), "--out", str(larger), "--epochs", "2", "--tau", "8",
               "--chunk-tokens", "64", "--segment-tokens", "16", "--neighbours", "2", "--keep", "recall",
               "--recency-tokens", "64", "--device", "cpu", "-q"]  # fmt: skip
    assert cli.run_cli(command) == 0
    assert "refresh_recall_at_tenth" in capsys.readouterr().out
    values = json.loads((larger / "config.json").read_text())
    assert (values["chunk_tokens"], values["segment_tokens"], values["neighbours"]) == (64, 16, 2)
    assert (values["trained"]["options"]["keep"], values["trained"]["options"]["chunk_tokens"]) == ("recall", 64)
    evaluated = ["lsa", "eval", "--data", str(indexer / "test"), "--indexer", str(larger), "--device", "cpu"]
    assert cli.run_cli([*evaluated, "--out", str(tmp_path / "tables"), "-q"]) == 0
    assert json.loads((tmp_path / "tables" / "recall.json").read_text())["about"]["chunk_tokens"] == 64
    command = ["run", "--model", tiny_model, "-m", "dense", "-m",
               f"lsa:indexer={larger},tau=2,recency_tokens=64,budget_fraction=0.7", "--task", "niah_single_1", "-l",
               "512", "-n", "1", "--max-new-tokens", "5", "--no-footprint", "--device", "cpu", "--out",
               str(tmp_path / "run"), "-q", "--no-report"]  # fmt: skip
    assert cli.run_cli(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["method"] == "lsa"]
    assert row["config"]["chunk_tokens"] == 64
    assert row["residency"]["indexer"].startswith("larger@")
    assert len(set(row["residency"]["resident_tokens"])) == 1
    gated = ["lsa", "eval", "--data", str(indexer / "test"), "--gate", "--model", tiny_model, "--chunk-tokens"]
    assert cli.run_cli([*gated, "64", "-n", "1", "-q"]) in (0, 1)
    assert "kept_fraction" in capsys.readouterr().out
    assert cli.run_cli([*gated, "24", "-q"]) == 2
    assert "chunk_tokens is 24, and the collection's chunks of 16 tokens do not make such ones" in _said(capsys)
    assert cli.run_cli([*evaluated, "--out", str(tmp_path / "tables"), "--chunk-tokens", "64"]) == 2
    assert "--chunk-tokens belongs to --gate" in _said(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--segment-tokens", "5"], "segment_tokens is 5: it must divide the chunk of 16 tokens"),
        (["--segment-tokens", "0"], "segment_tokens must be 1 or more, got 0"),
        (["--neighbours", "-1"], "neighbours must be 0 or more, got -1"),
        (["--keep", "best"], "keep must be loss or recall, got 'best'"),
        (["--chunk-tokens", "40"], "chunks of 16 tokens do not make such ones"),
    ],
)
def test_training_options_are_refused_in_one_sentence(indexer, tmp_path, capsys, options, message):
    command = [
        "lsa",
        "train",
        "--data",
        str(indexer / "train"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "-q",
    ]
    assert cli.run_cli([*command, *options]) == 2
    assert message in _said(capsys)
    assert not (tmp_path / "out").exists()


def test_help_names_the_options(capsys):
    assert cli.run_cli(["lsa", "train", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for word in ("--segment-tokens", "--neighbours", "--keep", "--chunk-tokens", "loss (lowest held-out)"):
        assert word in said
    assert cli.run_cli(["lsa", "eval", "--help"]) == 0
    assert "--chunk-tokens" in capsys.readouterr().out


def _said(capsys):
    return " ".join(capsys.readouterr().err.split())
