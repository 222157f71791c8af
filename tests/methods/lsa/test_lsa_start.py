"""Training an indexer further (`--start`), and collections that hold different indexed layers (`--layers`)."""

import json
from dataclasses import replace

import pytest
import torch
from lsa_tools import random_indexer
from planted import INFO, planted_collection, planted_document

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.reading import open_collections
from kvscope.harness.indexers.collection.shards import write_manifest, write_shard
from kvscope.harness.indexers.lsa.evaluate import evaluate
from kvscope.harness.indexers.lsa.measuring import EvalConfig
from kvscope.harness.indexers.lsa.train import train
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.harness.indexers.training import LOG_FILE
from kvscope.methods.dsa.indexer_files import FILES as DSA_FILES
from kvscope.methods.indexer_files import CONFIG_FILE, WEIGHTS_FILE, indexer_hash
from kvscope.methods.lsa.indexer_files import load_indexer, read_indexer_config

QUICK = TrainConfig(tau=1, epochs=4, lr=2e-2, batch_documents=4, recency_tokens=128, patience=12, device="cpu",
                    heads=4, key_dim=8, rank=8, encoder_width=16, lookback=1, warm_start=False, negatives=3,
                    neighbours=0, keep="loss")  # fmt: skip
STILL = replace(QUICK, epochs=1, lr=1e-12, weight_decay=0.0)


def quiet(text):
    del text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return planted_collection(tmp_path_factory.mktemp("planted") / "data", documents=40, features="tokens")


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    """An indexer trained for a few epochs."""
    folder = tmp_path_factory.mktemp("begun") / "begun"
    train([data], folder, QUICK, note=quiet)
    return folder


def first_line(folder):
    return json.loads((folder / LOG_FILE).read_text().splitlines()[0])


def epochs(folder):
    return [line for line in map(json.loads, (folder / LOG_FILE).read_text().splitlines()) if "epoch" in line]


# -- where training begins


def test_it_begins_where_the_other_ended(data, begun, tmp_path):
    before = {name: (begun / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    best = train([data], tmp_path / "out", replace(STILL, start=str(begun), warm_start=True), note=quiet)
    said, held_out = first_line(tmp_path / "out"), read_indexer_config(begun).trained["held_out"]
    assert said["start"] == str(begun)
    assert said["held_out"] == {name: held_out[name] for name in said["held_out"]}
    assert best["held_out_loss"] == pytest.approx(held_out["held_out_loss"], rel=1e-4)
    mine, theirs = (load_indexer(folder).state_dict() for folder in (tmp_path / "out", begun))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, atol=1e-6, rtol=0)
    assert {name: (begun / name).read_bytes() for name in before} == before


def test_it_learns_on_and_names_what_it_began_with(data, begun, tmp_path):
    train([data], tmp_path / "out", replace(QUICK, epochs=1, start=str(begun)), note=quiet)
    on, first = (epochs(folder)[0]["loss"] for folder in (tmp_path / "out", begun))
    assert on < 0.9 * first
    mine, theirs = (load_indexer(folder).state_dict() for folder in (tmp_path / "out", begun))
    assert sum(not torch.equal(mine[name], theirs[name]) for name in theirs) > 0.8 * len(theirs)
    start = read_indexer_config(tmp_path / "out").trained["start"]
    assert start["indexer"] == f"begun@{indexer_hash(begun)}"
    assert start["trained"] == read_indexer_config(begun).trained


def test_no_start_leaves_no_word_of_one(begun):
    assert "start" not in read_indexer_config(begun).trained
    assert "start" not in first_line(begun)


def test_tau_lookback_and_a_chunk_of_several_keys_are_free(data, begun, tmp_path):
    """Keys of 16 tokens serve larger chunks: only how they are put together changes."""
    changes = {"tau": 3, "lookback": 2, "chunk_tokens": 32, "segment_tokens": 16}
    train([data], tmp_path / "out", replace(STILL, start=str(begun), **changes), note=quiet)
    config = read_indexer_config(tmp_path / "out")
    assert (config.tau, config.lookback_tokens, config.chunk_tokens, config.segment_tokens) == (3, 2, 32, 16)
    mine, theirs = (load_indexer(folder).state_dict() for folder in (tmp_path / "out", begun))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, atol=1e-6, rtol=0)


def test_the_same_weights_under_another_name_are_the_same_model(data, begun, tmp_path):
    """A collection made from the model's folder, an indexer from its name."""
    values = json.loads((begun / CONFIG_FILE).read_text())
    (begun / CONFIG_FILE).write_text(json.dumps({**values, "model": "/models/ghost"}))
    try:
        train([data], tmp_path / "out", replace(STILL, start=str(begun)), note=quiet)
    finally:
        (begun / CONFIG_FILE).write_text(json.dumps(values))
    assert read_indexer_config(tmp_path / "out").model == "ghost"


# -- what cannot be trained further


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 2}, "heads is 4 there and 2 here; give --heads 4."),
        ({"key_dim": 4}, "key_dim is 8 there and 4 here; give --key-dim 8."),
        ({"rank": 4}, "rank is 8 there and 4 here; give --rank 8."),
        ({"encoder_width": 8}, "encoder_width is 16 there and 8 here; give --encoder-width 16."),
        ({"neighbours": 2}, "neighbours is 0 there and 2 here; give --neighbours 0."),
        ({"layers": (3,)}, "layers is 1,3 there and 3 here; give --layers 1,3."),
        ({"segment_tokens": 8}, "has a key for every 16 tokens, 8 were asked for; give --segment-tokens 16."),
        ({"chunk_tokens": 32}, "has a key for every 16 tokens, 32 were asked for; give --segment-tokens 16."),
    ],
)
def test_other_sizes_are_refused_with_the_option_that_mends_it(data, begun, tmp_path, changes, message):
    with pytest.raises(UsageError) as caught:
        train([data], tmp_path / "out", replace(QUICK, start=str(begun), **changes), note=quiet)
    assert message in str(caught.value)
    assert str(begun) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_models_is_refused(data, tmp_path):
    other = planted_collection(tmp_path / "other", documents=6, features="tokens", model_revision="sha256:else")
    train([other], tmp_path / "begun", replace(QUICK, epochs=1), note=quiet)
    with pytest.raises(UsageError, match="model_revision is sha256:else there and sha256:none here; it belongs to ano"):
        train([data], tmp_path / "out", replace(QUICK, start=str(tmp_path / "begun")), note=quiet)


def test_the_shipped_ones_are_known_by_name_and_refused_on_another_model(data, tmp_path):
    with pytest.raises(UsageError, match="Indexer 'reference' cannot be trained further here: model_revision is"):
        train([data], tmp_path / "out", replace(QUICK, start="reference"), note=quiet)


@pytest.mark.parametrize("kind", ["nowhere", "empty", "dsa", "truncated"])
def test_what_is_no_indexer_of_lsa_is_refused(data, begun, tmp_path, kind):
    start = tmp_path / kind
    expected = {"nowhere": "There is no indexer", "empty": "holds no indexer", "dsa": "is one for dsa, lsa was asked",
                "truncated": "cannot be read"}[kind]  # fmt: skip
    if kind == "dsa":
        start = DSA_FILES.folder("reference")
    elif kind != "nowhere":
        start.mkdir()
    if kind == "truncated":
        (start / CONFIG_FILE).write_bytes((begun / CONFIG_FILE).read_bytes())
        (start / WEIGHTS_FILE).write_bytes((begun / WEIGHTS_FILE).read_bytes()[:-9])
    with pytest.raises(UsageError) as caught:
        train([data], tmp_path / "out", replace(QUICK, start=str(start)), note=quiet)
    assert expected in str(caught.value)


def test_the_command_line_reaches_it(data, begun, tmp_path, capsys):
    sizes = ["--heads", "4", "--key-dim", "8", "--rank", "8", "--encoder-width", "16"]
    command = ["lsa", "train", "--data", str(data), "--out", str(tmp_path / "out"), "--epochs", "1", "--tau", "1",
               "--lookback", "1", "--start", str(begun), "--device", "cpu", "-q"]  # fmt: skip
    assert cli.run_cli(command) == 2
    assert "heads is 4 there and 2 here; give --heads 4." in capsys.readouterr().err
    assert cli.run_cli([*command, *sizes]) == 0
    assert read_indexer_config(tmp_path / "out").trained["start"]["indexer"].startswith("begun@")


# -- collections of different layers


def spoilt_collection(folder, *, layers, seed, kept=3, documents=20):
    """Planted documents in which every indexed layer but one holds nothing but NaN."""
    info = replace(INFO, layers=layers, features="tokens", samples=documents, seed=seed)
    other = torch.tensor([place for place, layer in enumerate(layers) if layer != kept])
    made = []
    for sample in range(documents):
        document = planted_document(info, sample)
        spoilt = {
            name: getattr(document, name).index_fill(dim, other, torch.nan)
            for name, dim in (("features", 0), ("hidden", 1), ("queries", 1))
        }
        made.append(replace(document, **spoilt))
    folder.mkdir(parents=True)
    size_bytes = write_shard(folder / "shard-00000.safetensors", made, info)
    shard = {"file": "shard-00000.safetensors", "bytes": size_bytes, "documents": [vars(each.info) for each in made]}
    write_manifest(folder, info, [shard], complete=True)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Layer 3 comes second in the one and first in the other."""
    folder = tmp_path_factory.mktemp("mixed")
    return [spoilt_collection(folder / "one", layers=(1, 3), seed=1),
            spoilt_collection(folder / "two", layers=(3, 5), seed=2)]  # fmt: skip


@pytest.mark.parametrize("warm", [True, False])
def test_training_takes_a_layer_from_where_each_collection_has_it(mixed, tmp_path, warm):
    best = train(mixed, tmp_path / "out", replace(QUICK, layers=(3,), warm_start=warm, epochs=6), note=quiet)
    assert best["recall_at_tenth"] > 0.5, "chance is an eighth"
    assert all(value.isfinite().all() for value in load_indexer(tmp_path / "out").state_dict().values())
    assert read_indexer_config(tmp_path / "out").layers == (3,)
    if warm:
        rows = evaluate(mixed, str(tmp_path / "out"), tmp_path / "tables", EvalConfig(), device="cpu")
        assert rows


def test_without_layers_they_are_not_mixed(mixed, tmp_path):
    with pytest.raises(UsageError) as caught:
        train(mixed, tmp_path / "out", QUICK, note=quiet)
    assert "layers is (1, 3) in the one and (3, 5) in the other" in str(caught.value)
    assert sum(map(len, open_collections(mixed, layers=(3,)))) == 40


@pytest.mark.parametrize("turned", [False, True])
def test_a_layer_that_one_of_them_lacks_is_named_with_the_collection(mixed, tmp_path, turned):
    folders = mixed[::-1] if turned else mixed
    with pytest.raises(UsageError) as caught:
        train(folders, tmp_path / "out", replace(QUICK, layers=(3, 5)), note=quiet)
    assert str(caught.value) == f"Layers 5 are not in collection '{mixed[0]}', which holds 1, 3."


def test_other_differences_are_refused_all_the_same(mixed, tmp_path):
    other = planted_collection(tmp_path / "other", documents=4, features="tokens", least_mass=0.1)
    with pytest.raises(UsageError, match=r"least_mass is 0.0 in the one and 0.1 in the other"):
        open_collections([mixed[0], other], layers=(3,))


def test_an_indexer_of_random_weights_is_a_start_too(data, tmp_path):
    """It fits by its sizes alone: nothing else of it is asked for."""

    class Shape:
        revision, layers, hidden_size, n_kv_heads, head_dim = INFO.model_revision, INFO.layers, 24, 2, 6

    folder = random_indexer(tmp_path / "random", Shape, encoder="pooled")
    train([data], tmp_path / "out", replace(STILL, start=str(folder)), note=quiet)
    assert read_indexer_config(tmp_path / "out").trained["start"]["trained"] == {}


def test_a_checkpoint_says_what_it_was_trained_on(data, begun, tmp_path):
    """What a run leaves that ends at a time limit."""
    checkpoint = begun / "checkpoints" / "epoch-02"
    left, whole = (read_indexer_config(folder).trained for folder in (checkpoint, begun))
    assert left == {name: value for name, value in whole.items() if name != "held_out"}
    train([data], tmp_path / "out", replace(QUICK, epochs=1, start=str(checkpoint)), note=quiet)
    start = read_indexer_config(tmp_path / "out").trained["start"]
    assert start == {"indexer": f"epoch-02@{indexer_hash(checkpoint)}", "trained": left}
    last = read_indexer_config(tmp_path / "out" / "checkpoints" / "epoch-01").trained
    assert last["start"] == start
