"""The trained indexers that come with kvscope: which one is taken, what it predicts, and that plain specs run.

Nothing here names their hashes, scores, tau or training: they may be trained anew.
"""

import json

import pytest
import torch
from lsa_tools import run_steps
from masked import masking

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER, sampled_revision
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.indexers.lsa.lineage import calibration_ids, data_ids, records
from kvscope.harness.passes.config import load_config
from kvscope.methods.base import union_collectors
from kvscope.methods.dsa import indexer_files as dsa_files
from kvscope.methods.indexer_files import CONFIG_FILE, WEIGHTS_FILE, indexer_hash
from kvscope.methods.lsa import indexer_files as lsa_files
from kvscope.methods.registry import create_method

KINDS = {"lsa": lsa_files.FILES, "dsa": dsa_files.FILES}
SHIPPED = [(kind, name) for kind, files in KINDS.items() for name in files.shipped_names()]
CHUNKS = {16: "reference", 64: "reference-chunk64", 256: "reference-chunk256"}
N_TOKENS, N_STEPS = 1100, 5
EVALUATION_SEEDS = 1000  # theirs are below


def seeds_of(trained):
    """Seeds of all documents that an indexer was trained or calibrated on, back to the first training."""
    return {entry["seed"] for record in records(trained) for entry in
            [*record.get("data", ()), *record.get("calibration", {}).get("data", ())]}  # fmt: skip


def test_the_reference_model_has_them():
    assert lsa_files.FILES.shipped_names() == sorted(CHUNKS.values())
    assert dsa_files.FILES.shipped_names() == ["reference"]


@pytest.fixture(scope="module")
def loaded():
    return load_model("reference", device="cpu")


@pytest.fixture(scope="module")
def budgeted():
    """Every shipped indexer with a budget, by kind and name: then what is kept is known beforehand."""
    return {
        (kind, name): create_method(
            {"name": kind, "indexer": name, "budget_tokens": {"lsa": 600, "dsa": 48}[kind]}
            | ({"tau": 2, "recency_tokens": 64} if kind == "lsa" else {})
        )
        for kind, name in SHIPPED
    }


@pytest.fixture(scope="module")
def prompt(loaded, budgeted):
    """One prefill for all of them."""
    assert [method.unsupported(loaded.shape, "cpu") for method in budgeted.values()] == [[]] * len(SHIPPED)
    ids = torch.randint(20, 4000, (N_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    return prefill(loaded, ids, collectors=union_collectors(budgeted.values(), loaded.shape.layers))


# -- each of them


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_it_loads_and_is_one_of_the_reference_model_as_it_is(kind, name):
    """Training the model anew makes its indexers another model's: this is where that shows."""
    folder = KINDS[kind].folder(name)
    config = KINDS[kind].load(folder).config
    assert (config.model, config.model_revision) == ("reference", sampled_revision(str(REFERENCE_MODEL_FOLDER), None))
    # A calibrated indexer was trained where it came from, and one taken over from weights before has a start alone: a
    # record that breaks off before names no training.
    trainings = [r for r in records(config.trained) if "calibration" not in r and set(r) != {"start"}]
    assert trainings
    assert all(record["documents"] > 0 and record["data"] for record in trainings)
    assert data_ids(config.trained).isdisjoint(calibration_ids(config.trained)), "its threshold is of what it knows"
    assert all(seed >= EVALUATION_SEEDS for seed in seeds_of(config.trained)), "evaluation's documents are known to it"
    assert '"/' not in (folder / CONFIG_FILE).read_text(), "a path of the machine that trained it"
    assert {path.name for path in folder.iterdir()} <= {CONFIG_FILE, WEIGHTS_FILE, "README.md", "recall.md"}


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_its_prediction_is_the_ledger(loaded, budgeted, prompt, kind, name):
    method = budgeted[kind, name]
    tokens = list(range(30, 30 + N_STEPS))
    logits, record, footprint = run_steps(loaded, method, prompt, tokens)
    assert footprint == method.predict(loaded.shape, N_TOKENS, N_STEPS)
    assert footprint.metadata_bytes > 0
    dense, _, _ = run_steps(loaded, create_method("dense"), prompt, tokens)
    assert (logits - dense).abs().max() > 1e-4, "something was left out, or this shows nothing"
    hashed = f"{name}@{indexer_hash(KINDS[kind].folder(name))}"
    if kind == "lsa":
        assert (record.indexer, record.tau) == (hashed, 2)
        assert record.indexer_tau == KINDS[kind].read_config(KINDS[kind].folder(name)).tau
        masked, _, _ = run_steps(loaded, masking(method), prompt, tokens)
        torch.testing.assert_close(logits, masked, atol=2e-4, rtol=0)
    else:
        assert method.effective_config(N_TOKENS, loaded.shape)["indexer"] == hashed


# -- which one


def test_plain_lsa_takes_the_first_by_name_with_its_chunk_and_tau(loaded):
    first = lsa_files.FILES.read_config(lsa_files.FILES.folder(lsa_files.FILES.shipped_names()[0]))
    method = create_method("lsa")
    # Asked for settings before anything else: the model that is named decides.
    settings = method.effective_config(N_TOKENS, loaded.shape)
    assert (settings["chunk_tokens"], settings["tau"]) == (first.chunk_tokens, first.tau)
    assert (method.chunk_tokens(), method.tau()) == (first.chunk_tokens, first.tau)
    # Of 60 tokens chunks of 16 leave some to choose from, those of 64 none.
    assert create_method("lsa:recency_tokens=0,budget_tokens=0").is_noop(60, loaded.shape) is False
    assert create_method("lsa:recency_tokens=0,budget_tokens=0,chunk_tokens=64").is_noop(60, loaded.shape) is True


@pytest.mark.parametrize(("chunk_tokens", "name"), CHUNKS.items())
def test_a_chunk_size_names_its_indexer(loaded, chunk_tokens, name):
    method = create_method(f"lsa:chunk_tokens={chunk_tokens}")
    method.require(loaded.shape)
    assert method._source.name == f"{name}@{indexer_hash(lsa_files.FILES.folder(name))}"
    assert method.tau() == lsa_files.FILES.read_config(lsa_files.FILES.folder(name)).tau
    assert create_method(f"lsa:chunk_tokens={chunk_tokens},tau=7").tau() == 7


def test_without_a_trained_indexer_tau_and_chunk_are_64(loaded):
    for spec in ("lsa:indexer=attention", "lsa:selection=synthetic,budget_tokens=256"):
        settings = create_method(spec).effective_config(N_TOKENS, loaded.shape)
        assert (settings["chunk_tokens"], settings["tau"]) == (64, 64)


def test_what_is_not_there_is_told(loaded):
    with pytest.raises(UsageError, match="No trained indexer for chunks of 32 tokens comes with kvscope"):
        create_method("lsa:chunk_tokens=32").require(loaded.shape)
    with pytest.raises(UsageError, match="trained for chunks of 64 tokens, chunk_tokens=16 was asked for"):
        create_method("lsa:chunk_tokens=16,indexer=reference-chunk64").require(loaded.shape)
    with pytest.raises(UsageError, match=r"no indexer 'reference-chunk46'.*reference-chunk64"):
        create_method("lsa:indexer=reference-chunk46")._source.folder()


def test_a_model_without_one_is_refused_after_one_that_has_one(loaded, tiny_model):
    """The method remembers the last model it was asked about, no other."""
    other = load_model(tiny_model, device="cpu").shape
    method = create_method("lsa")
    assert method.unsupported(loaded.shape, "cpu") == []
    (reason,) = method.unsupported(other, "cpu")
    assert reason.startswith("No trained indexer comes with kvscope for this model")
    assert method.unsupported(loaded.shape, "cpu") == []


# -- through the command line


@pytest.mark.parametrize(
    ("option", "values"), [("chunk_tokens", [16, 64, 256]), ("tau", [16, 64, 256]), ("threshold", [0.2, 0.5])]
)
def test_a_sweep_of_plain_lsa_runs(tmp_path, capsys, option, values):
    sweep = f"lsa.{option}={','.join(map(str, values))}"
    command = ["run", "--model", "reference", "-m", "dense", "-m", "lsa", "--sweep", sweep, "--task", "niah_single_1",
               "-l", "1k", "-n", "1", "--max-new-tokens", "4", "--no-footprint", "--no-report", "--device", "cpu",
               "--out", str(tmp_path / "run"), "-q"]  # fmt: skip
    assert cli.run_cli(command) == 0, capsys.readouterr().err
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["method"] == "lsa"]
    assert [row["config"][option] for row in rows] == values
    assert len({row["method_label"] for row in rows}) == len(values)
    for row in rows:
        name = CHUNKS[row["config"]["chunk_tokens"]]
        assert row["residency"]["indexer"].startswith(f"{name}@")
        trained_tau = lsa_files.FILES.read_config(lsa_files.FILES.folder(name)).tau
        assert row["residency"]["indexer_tau"] == trained_tau
        assert row["residency"]["tau"] == (row["config"]["tau"] if option == "tau" else trained_tau)
        assert row["selection"] == "trained"
        assert not row["noop"]


def test_plan_predicts_all_of_them(capsys):
    command = ["plan", "--model", "reference", "-m", "dense", "-m", "dsa", "-m", "lsa:budget_tokens=1024", "--sweep",
               "lsa.chunk_tokens=16,64,256", "--task", "niah_single_1", "-l", "4k", "--device", "cpu"]  # fmt: skip
    assert cli.run_cli(command) == 0
    device = capsys.readouterr().out.partition("Predicted bytes in host memory")[0]
    bytes_mib = {line.split()[0]: float(line.split()[1]) for line in device.splitlines() if line.startswith(("d", "l"))
                 and len(line.split()) == 2}  # fmt: skip
    assert list(bytes_mib) == ["dense", "dsa", *(f"lsa:budget_tokens=1024,chunk_tokens={chunk}" for chunk in CHUNKS)]
    assert max(list(bytes_mib.values())[2:]) < bytes_mib["dense"] < bytes_mib["dsa"]


def test_a_sweep_over_chunks_is_a_method_each():
    config = load_config(flags={"methods": ["lsa"]}, sweeps=["lsa.chunk_tokens=16,64,256"])
    assert list(config.method_labels) == [f"lsa:chunk_tokens={chunk}" for chunk in CHUNKS]
