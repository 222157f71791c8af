"""Training from shards alone: it learns what is planted, repeats bit by bit, loads no model, and refuses damage."""

import json

import pytest
import torch
from no_backbone import train_without_backbone
from planted import planted_collection

from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.harness.indexers.collection.places import split
from kvscope.harness.indexers.collection.reading import Collection, open_collections
from kvscope.harness.indexers.lsa.objective import draw_negatives, focal_loss, measure, row_logits
from kvscope.harness.indexers.lsa.objective import example as load_example
from kvscope.harness.indexers.lsa.train import train
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.harness.indexers.training import LOG_FILE, rate
from kvscope.methods.lsa.indexer_files import load_indexer, read_indexer_config

# tau is 1: the state before a step holds the code of that step alone.
QUICK = TrainConfig(tau=1, epochs=12, lr=2e-2, batch_documents=4, recency_tokens=128, sink_tokens=4, patience=12,
                    device="cpu", encoder="mean", lookback=1, warm_start=False, negatives=3,
                    neighbours=0, keep="loss")  # fmt: skip


def quiet(text):
    del text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return planted_collection(tmp_path_factory.mktemp("planted") / "data")


def changed(config, **values):
    return TrainConfig(**{**vars(config), **values})


@pytest.mark.parametrize("encoder", ["mean", "stats"])
def test_it_finds_what_is_planted(data, tmp_path, encoder):
    lines = []
    best = train([data], tmp_path / "out", changed(QUICK, encoder=encoder), note=lines.append)
    assert best["recall_at_tenth"] > 0.6, "chance is an eighth"
    assert best["precision"] > 0.15, "one of thirty candidates is golden"
    assert best["recall"] > 0.4
    assert len(lines) == 12
    assert lines[0].startswith("[1/12] loss ")
    log = [json.loads(line) for line in (tmp_path / "out" / LOG_FILE).read_text().splitlines()]
    assert [line["epoch"] for line in log if "epoch" in line] == list(range(1, 13))
    assert log[1]["held_out_loss"] > best["held_out_loss"]
    config = read_indexer_config(tmp_path / "out")
    assert (config.model, config.model_revision, config.layers, config.tau) == ("ghost", "sha256:none", (1, 3), 1)
    assert config.kept_fraction == best["kept_fraction"]
    rule = {"top_p": 0.6, "voters": "layer", "votes": 1, "least_mass": 0.0, "layers": None}
    assert config.trained["labels"] == rule
    for epoch in (1, 12):
        assert load_indexer(tmp_path / "out" / "checkpoints" / f"epoch-{epoch:02d}").config.layers == (1, 3)


def test_the_saved_indexer_is_the_best_epochs(data, tmp_path):
    best = train([data], tmp_path / "out", changed(QUICK, epochs=4), note=quiet)
    _, held_out = split([(Collection(data), index) for index in range(60)], share=0.1)
    again = measure(load_indexer(tmp_path / "out"), held_out, QUICK)
    assert {key: best[key] for key in again} == again


def test_tokens_need_tokens_and_learn_from_them(tmp_path, data):
    tokens = planted_collection(tmp_path / "tokens", documents=40, features="tokens")
    best = train([tokens], tmp_path / "out", changed(QUICK, encoder="pooled"), note=quiet)
    assert best["recall_at_tenth"] > 0.6
    with pytest.raises(UsageError, match="needs a collection made with --features tokens"):
        train([data], tmp_path / "out", changed(QUICK, encoder="pooled"), note=quiet)


def test_a_warm_start_begins_at_the_models_own_match(tmp_path):
    """Queries of the planted data are the codes of the chunks they need: known before the first update."""
    for features, encoder in (("stats", "mean"), ("stats", "stats"), ("tokens", "pooled")):
        folder = tmp_path / features
        if not folder.exists():
            planted_collection(folder, documents=40, features=features)
        lines = []
        options = {"encoder": encoder, "warm_start": True, "epochs": 1, "lr": 1e-12, "rank": 12}
        best = train([folder], tmp_path / "out", changed(QUICK, **options), note=lines.append)
        assert best["recall_at_tenth"] > 0.8, "chance is an eighth"
        assert "warm start: layer 1 queries 9" in lines[0]
        cold = train([folder], tmp_path / "out", changed(QUICK, **{**options, "warm_start": False}), note=quiet)
        assert cold["recall_at_tenth"] < 0.4


def test_some_layers_can_be_left_out(data, tmp_path):
    train([data], tmp_path / "out", changed(QUICK, layers=(3,), epochs=1), note=quiet)
    assert read_indexer_config(tmp_path / "out").layers == (3,)
    found = load_example((Collection(data), 0), changed(QUICK, layers=(3,)))
    indexer = load_indexer(tmp_path / "out")
    rows, chunks = torch.tensor([2]), torch.arange(found.first, found.last)
    before = row_logits(indexer, found, rows, 1, chunks=chunks)
    found.document.hidden[:, 0] = 7.0  # the layer left out
    found.document.features[0] = 7.0
    assert torch.equal(row_logits(indexer, found, rows, 1, chunks=chunks), before)
    with pytest.raises(UsageError, match=r"Layers 5 are not in collection .*, which holds 1, 3"):
        train([data], tmp_path / "out", changed(QUICK, layers=(5,)), note=quiet)


def test_the_same_call_gives_the_same_weights(tmp_path):
    data = planted_collection(tmp_path / "few", documents=20)
    found = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train([data], tmp_path / name, changed(QUICK, epochs=2, seed=seed), note=quiet)
        found.append((tmp_path / name / "indexer.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_it_stops_when_the_held_out_loss_does_not_fall(data, tmp_path):
    lines = []
    train([data], tmp_path / "out", changed(QUICK, lr=1e-12, epochs=9, patience=2), note=lines.append)
    assert lines[-1] == "stopped: nothing gained on held-out documents for 2 epochs"
    assert len(lines) < 9


def test_threshold_half_can_be_set_to_a_recall(data, tmp_path):
    plain = train([data], tmp_path / "plain", changed(QUICK, epochs=3, revive=0.0), note=quiet)
    for target in (0.5, 0.95):
        best = train([data], tmp_path / "set", changed(QUICK, epochs=3, revive=0.0, target_recall=target), note=quiet)
        assert best["refresh_recall"] == pytest.approx(target, abs=0.06)
    assert best["kept_fraction"] != plain["kept_fraction"]


def test_training_neither_imports_nor_loads_a_backbone(data, tmp_path):
    """The collection's model does not even exist; and nothing that could load one may be imported."""
    train_without_backbone("lsa", data, tmp_path / "out", "--tau", "1", "--lookback", "1")


def test_focal_loss_is_the_formula():
    logits = torch.tensor([[0.3, -1.2], [2.0, 0.0]])
    golden = torch.tensor([[True, False], [False, True]])
    chosen = torch.tensor([[True, True], [True, False]])
    total = 0.0
    for row, column in ((0, 0), (0, 1), (1, 0)):
        p = float(torch.sigmoid(logits[row, column]))
        p = p if golden[row, column] else 1 - p
        total += -((1 - p) ** 2) * float(torch.log(torch.tensor(p)))
    assert float(focal_loss(logits, golden, chosen, gamma=2.0)) == pytest.approx(total / 3, rel=1e-5)
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, golden.float())
    assert float(focal_loss(logits, golden, torch.ones_like(golden), gamma=0.0)) == pytest.approx(float(plain))


def test_negatives_are_three_to_one_random_and_never_golden():
    golden = torch.zeros(3, 200, dtype=torch.bool)
    golden[0, :20] = True
    golden[1, 5] = True
    draws = torch.Generator().manual_seed(0)
    drawn = [draw_negatives(golden, TrainConfig(negatives=3), draws) for _ in range(60)]
    assert [row.sum().item() for row in drawn[0]] == [60, 3, 3], "three also for a step that needs nothing"
    assert not any((each & golden).any() for each in drawn)
    often = torch.stack(drawn).sum(0)[2]
    assert often.max() < 8, "each of 200 comes up 0.9 times of 60 on average"
    assert (often > 0).sum() > 80
    full = torch.ones(1, 10, dtype=torch.bool)
    assert not draw_negatives(full, TrainConfig(negatives=3), draws).any()


def test_the_rate_warms_up_and_falls_to_nothing():
    rates = [rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == 1.0
    assert rates[-1] < 0.001
    assert rate(0, 1) == 1.0


def test_the_split_is_by_document_and_does_not_move(data):
    where = [(Collection(data), index) for index in range(60)]
    training, held_out = split(where, share=0.1)
    assert len(training) == 54
    assert {index for _, index in training}.isdisjoint(index for _, index in held_out)
    assert [index for _, index in split(where[::-1], share=0.1)[1]] == [index for _, index in held_out][::-1]
    with pytest.raises(UsageError, match="1 documents are too few"):
        split(where[:1], share=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0}, "tau must be 1 or more, got 0"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"rank": 0}, "rank must be 1 or more"),
        ({"held_out": 1.0}, "held_out must lie between 0 and 1"),
        ({"target_recall": 1.0}, "target_recall must lie between 0 and 1"),
        ({"encoder": "huge"}, "encoder must be mean, stats, pooled, compressed_key, got 'huge'"),
        ({"lr": 0.0}, "lr must be positive"),
    ],
)
def test_bad_options_get_one_clear_sentence(options, message):
    with pytest.raises(UsageError) as caught:
        TrainConfig(**options)
    assert message in str(caught.value)


def test_lookback_needs_states_and_a_gpu_needs_a_gpu(data, tmp_path):
    with pytest.raises(UsageError, match="lookback is 9, and the collection keeps 4 states"):
        train([data], tmp_path / "out", changed(QUICK, lookback=9), note=quiet)
    with pytest.raises(UsageError, match="Device 'tpu' is not one of"):
        train([data], tmp_path / "out", changed(QUICK, device="tpu"), note=quiet)
    with pytest.raises(UsageError, match="There is no device 'cuda:99'"):
        train([data], tmp_path / "out", changed(QUICK, device="cuda:99"), note=quiet)
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentProblem, match="torch sees no CUDA GPU"):
            train([data], tmp_path / "out", changed(QUICK, device="cuda"), note=quiet)


def test_lookback_takes_the_best_of_the_last_states(data):
    config = changed(QUICK, lookback=3)
    found = load_example((Collection(data), 0), config)
    from kvscope.harness.indexers.lsa.train import indexer_config
    from kvscope.methods.lsa.indexer import Indexer

    indexer = Indexer.untrained(indexer_config(Collection(data).info, config), seed=0)
    rows, chunks = torch.arange(6), torch.arange(found.first, found.last)
    together = row_logits(indexer, found, rows, 3, chunks=chunks)
    hidden = found.document.hidden.clone()
    singles = []
    for shift in range(3):
        found.document.hidden[shift:] = hidden[: len(hidden) - shift]
        singles.append(row_logits(indexer, found, rows, 1, chunks=chunks))
    torch.testing.assert_close(together, torch.stack(singles).amax(0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "is truncated or was changed"),
        ("missing", "is missing; delete it and run"),
        ("foreign", "shards of two collections were mixed"),
        ("noise", "is not a safetensors file"),
        ("manifest", "manifest.json is missing"),
        ("format", "has format 7, this kvscope knows 2"),
        ("keys", "is damaged (top_p)"),
        ("empty", "holds no document yet"),
    ],
)
def test_damaged_collections_get_one_clear_sentence(tmp_path, damage, message):
    folder = planted_collection(tmp_path / "data", documents=4, per_shard=2)
    shard, manifest = folder / "shard-00001.safetensors", folder / "manifest.json"
    values = json.loads(manifest.read_text())
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-9])
    elif damage == "missing":
        shard.unlink()
    elif damage == "foreign":
        other = planted_collection(tmp_path / "other", documents=4, per_shard=2, seed=3)
        shard.write_bytes((other / shard.name).read_bytes())
    elif damage == "noise":
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    elif damage == "manifest":
        manifest.unlink()
    elif damage == "format":
        manifest.write_text(json.dumps({**values, "format": 7}))
    elif damage == "keys":
        del values["collection"]["top_p"]
        manifest.write_text(json.dumps(values))
    elif damage == "empty":
        manifest.write_text(json.dumps({**values, "shards": []}))
    with pytest.raises(UsageError) as caught:
        open_collections([folder])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_collections_made_differently_are_not_mixed(tmp_path, data):
    other = planted_collection(tmp_path / "other", documents=4, per_shard=2, chunk_tokens=32)
    with pytest.raises(UsageError) as caught:
        open_collections([data, other])
    for word in (str(data), str(other), "chunk_tokens is 16 in the one and 32 in the other"):
        assert word in str(caught.value)
    alike = planted_collection(tmp_path / "alike", documents=4, per_shard=2, seed=9)
    assert sum(map(len, open_collections([data, alike]))) == 64
    with pytest.raises(UsageError, match=r"data' and '.*data' hold the same documents, .* give one of them"):
        open_collections([data, alike, data])
    with pytest.raises(UsageError, match="at least one folder"):
        open_collections([])


def test_labels_can_be_told_otherwise_than_the_collection_says(data, tmp_path):
    """Here only the first layer has a mass stored for the golden chunk: asked for heads, nothing is golden."""
    best = train([data], tmp_path / "out", changed(QUICK, epochs=1, voters="head"), note=quiet)
    assert best["recall"] is None
    assert read_indexer_config(tmp_path / "out").trained["labels"]["voters"] == "head"
    with pytest.raises(UsageError, match="Layers 9 were not recorded for labels"):
        train([data], tmp_path / "out", changed(QUICK, label_layers=(9,)), note=quiet)


def test_an_unfinished_collection_is_used_and_named(tmp_path):
    folder = planted_collection(tmp_path / "data", documents=20, per_shard=5)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": False}))
    lines = []
    train([folder], tmp_path / "out", changed(QUICK, epochs=1), note=lines.append)
    assert "is unfinished; its 20 documents are used" in lines[0]
