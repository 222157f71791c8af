"""One collection for every multiple of its chunk size; which epoch is kept; what is refused."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from planted import planted_collection

from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.collect import CollectConfig, collect
from kvscope.harness.indexers.collection.label_choice import LabelChoice
from kvscope.harness.indexers.collection.reading import Collection, open_collections
from kvscope.harness.indexers.lsa.evaluate import evaluate
from kvscope.harness.indexers.lsa.gate import gate
from kvscope.harness.indexers.lsa.measuring import EvalConfig
from kvscope.harness.indexers.lsa.train import train
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.harness.passes.progress import Progress
from kvscope.methods.lsa.indexer import IndexerConfig
from kvscope.methods.lsa.indexer_files import load_indexer, read_indexer_config

QUICK = TrainConfig(tau=1, epochs=3, lr=2e-2, recency_tokens=128, device="cpu", lookback=1, patience=3,
                    negatives=3, neighbours=0, keep="loss")  # fmt: skip


def quiet(text):
    del text


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return planted_collection(tmp_path_factory.mktemp("planted") / "data", documents=24, features="tokens")


# -- larger chunks


@pytest.fixture(scope="module")
def collected(tiny_model, tmp_path_factory):
    """The same documents in chunks of 16, 48 and 64; prompts of 383 tokens end inside a chunk of each size."""
    config = CollectConfig(model=tiny_model, tasks=("niah_single_1",), lengths_tokens=(512,), samples=2, seed=5,
                           chunk_tokens=16, top_p=0.6, least_mass=0.0, device="cpu")  # fmt: skip
    folder = tmp_path_factory.mktemp("collected")
    return {size: collect(replace(config, chunk_tokens=size), folder / str(size), progress=Progress())
            for size in (16, 48, 64)}  # fmt: skip


def dense_masses(document):
    """Stored masses [R, V, n'], 0 where nothing is stored."""
    found = torch.zeros(len(document.steps), document.rest.shape[1], document.mass.shape[1])
    rows = torch.repeat_interleave(torch.arange(len(document.steps)), document.indptr.long().diff())
    places = rows, document.voters.long(), document.indices.long()
    assert len(set(zip(*(part.tolist() for part in places), strict=True))) == len(rows), "no chunk has two masses"
    return found.index_put(places, document.values.float())


@pytest.mark.parametrize("chunk_tokens", [48, 64])
def test_small_chunks_joined_are_large_ones_collected(collected, chunk_tokens):
    joined, direct = Collection(collected[16], chunk_tokens=chunk_tokens), Collection(collected[chunk_tokens])
    assert joined.info == direct.info
    for index in range(2):
        mine, theirs = joined.load(index), direct.load(index)
        assert mine.info.prompt_tokens % chunk_tokens, "a truncated last chunk"
        for name in ("features", "hidden", "steps", "segments", "queries", "rest"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=0, atol=0)
        for name in ("indptr", "indices", "voters", "values", "mass"):
            assert getattr(mine, name).dtype == getattr(theirs, name).dtype
        # Not stored are masses that fp16 holds no normal number for; stored ones are rounded to 11 bits.
        parts = chunk_tokens // 16
        not_stored = parts * torch.finfo(torch.float16).tiny
        torch.testing.assert_close(dense_masses(mine), dense_masses(theirs), atol=not_stored, rtol=2 * 2**-11)
        least, most = theirs.mass.float(), parts * theirs.mass.float()
        assert (mine.mass.float() >= least * (1 - 2**-9) - 1e-6).all(), "a sum of maxima is no less than the maximum"
        assert (mine.mass.float() <= most * (1 + 2**-9) + 1e-6).all()
        for voter, layer in enumerate(joined.info.label_layers):
            # Attention of random weights is nearly even: rounding may swap chunks, but for ones of the same mass alone.
            rule = joined.info.rule(layers=(layer,))
            masses = dense_masses(theirs)[:, voter]
            by_mine, by_theirs = (masses * (each.votes(rule, joined.info) > 0) for each in (mine, theirs))
            torch.testing.assert_close(by_mine.sum(1), by_theirs.sum(1), rtol=0, atol=2**-9)
            assert 0 < (by_theirs > 0).float().mean() < 1, "all or none were a poor comparison"
        assert joined.positives(index, rule, tau=64).shape == direct.positives(index, rule, tau=64).shape


def test_four_planted_chunks_make_one(tmp_path):
    """Planted: 40 chunks of 16 tokens become ten of 64."""
    collection = Collection(planted_collection(tmp_path / "data", documents=2, features="tokens"), chunk_tokens=64)
    plain = Collection(tmp_path / "data").load(0)
    document = collection.load(0)
    expected = [sum(plain.mass[0, 4 * k + i].item() for i in range(4)) for k in range(10)]
    assert document.mass[0].tolist() == pytest.approx(expected, rel=1e-3)
    assert document.indices.tolist() == [chunk // 4 for chunk in plain.indices.tolist()]
    assert document.features.shape == (2, 10, 64, 12)
    assert torch.equal(document.features[:, 3, 16:32], plain.features[:, 13])


def test_a_collection_keeps_its_name_in_every_chunk_size(tokens):
    assert Collection(tokens, chunk_tokens=64).id == Collection(tokens).id == Collection(tokens).info.id
    assert Collection(tokens, chunk_tokens=64).info.chunk_tokens == 64
    assert Collection(tokens, chunk_tokens=16).load(0).features.shape[1] == 40


def test_collections_of_two_chunk_sizes_meet_in_a_larger_one(tokens, tmp_path):
    other = planted_collection(tmp_path / "other", documents=4, features="tokens", chunk_tokens=32)
    with pytest.raises(UsageError, match="cannot be mixed: chunk_tokens is 16 in the one and 32 in the other"):
        open_collections([tokens, other])
    assert [each.info.chunk_tokens for each in open_collections([tokens, other], chunk_tokens=64)] == [64, 64]


def test_an_indexer_is_trained_and_measured_in_larger_chunks(tokens, tmp_path):
    lines = []
    config = replace(QUICK, chunk_tokens=64, segment_tokens=16, neighbours=1, epochs=2)
    best = train([tokens], tmp_path / "out", config, note=lines.append)
    found = read_indexer_config(tmp_path / "out")
    assert (found.chunk_tokens, found.segment_tokens, found.neighbours) == (64, 16, 1)
    assert found.trained["data"][0]["id"] == Collection(tokens).id
    assert load_indexer(tmp_path / "out").lent.shape == (2,)
    assert "at refreshes" in lines[-1].partition("best tenth")[2]
    assert best["refresh_recall_at_tenth"] == best["recall_at_tenth"], "with tau 1 every step is a refresh"
    assert best["recall_at_tenth"] > 0.4, "chance is a seventh"
    test = planted_collection(tmp_path / "test", documents=6, features="tokens", seed=4)
    rows = evaluate([test], str(tmp_path / "out"), tmp_path / "tables", EvalConfig(recency_tokens=128), device="cpu")
    (row,) = [r for r in rows if (r["task"], r["policy"], r["value"]) == ("all", "indexer", 1.0)]
    # Seven candidate chunks of four keys in two layers, the states scored with and those of the step that runs.
    extra_bytes = 7 * 2 * 4 * (12 + 4) + 2 * 2 * 24 * 4
    assert row["kept_bytes_fraction"] == pytest.approx(1 + extra_bytes / (640 * 96), abs=1e-5)
    told = (tmp_path / "tables" / "recall.md").read_text()
    for line in ("- chunk_tokens: 64", "- segment_tokens: 16", "- neighbours: 1"):
        assert line in told
    lines.clear()
    evaluate([tokens], str(tmp_path / "out"), tmp_path / "again", EvalConfig(), device="cpu", note=lines.append)
    assert "was trained on" in lines[0], "the same documents in chunks of another size are no test either"


def test_the_gate_restricts_to_larger_chunks(collected, tiny_model):
    rows = {}
    for size in (16, 64):
        # No chunk has 200 votes: what is kept are sinks and window, widened to chunks.
        found = gate(
            [collected[16]], model=tiny_model, device="cpu", tau=1000, choice=LabelChoice(votes=200), chunk_tokens=size
        )
        rows[size] = found.rows[0]["kept_fraction"]
    assert rows[16] == pytest.approx((16 + 128 + 15) / 383, abs=1e-3)
    assert rows[64] == pytest.approx((64 + 383 - 192) / 383, abs=1e-3)


# -- which epoch is kept


def measures(loss, recall):
    names = ("recall", "refresh_recall", "recall_at_tenth", "precision")
    return {
        "held_out_loss": loss, **dict.fromkeys(names), "refresh_recall_at_tenth": recall, "kept_fraction": 0.1,
        "held_out_steps": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("keep", "epoch"), [("loss", 1), ("recall", 3)])
def test_keep_says_which_epoch_is_kept(tokens, tmp_path, monkeypatch, keep, epoch):
    """The loss is lowest at once, the ranking best at the third epoch of four."""
    script = iter([measures(*pair) for pair in ((0.1, 0.2), (0.2, 0.1), (0.3, 0.6), (0.4, 0.6))])
    config = replace(QUICK, keep=keep, epochs=4, warm_start=False, patience=9)
    if keep == "recall":  # measured once before, to know that it can be told
        script = chain([measures(9.0, 0.9)], script)
    monkeypatch.setattr("kvscope.harness.indexers.lsa.train.measure", lambda *args: next(script))
    best = train([tokens], tmp_path / "out", config, note=quiet)
    assert best["epoch"] == epoch
    weights = [
        (tmp_path / "out" / "checkpoints" / f"epoch-{n:02d}" / "indexer.safetensors").read_bytes() for n in (1, 2, 3, 4)
    ]
    kept = load_indexer(tmp_path / "out").state_dict()
    same = load_indexer(tmp_path / "out" / "checkpoints" / f"epoch-{epoch:02d}").state_dict()
    assert all(torch.equal(kept[name], same[name]) for name in kept)
    assert len(set(weights)) == 4, "epochs of equal weights show nothing"


def test_patience_counts_epochs_without_gain_in_what_is_kept_by(tokens, tmp_path, monkeypatch):
    script = iter([measures(loss, recall) for loss, recall in
                   ((9, 0), (0.9, 0.5), (0.8, 0.5), (0.7, 0.4), (0.6, 0.6))])  # fmt: skip
    monkeypatch.setattr("kvscope.harness.indexers.lsa.train.measure", lambda *args: next(script))
    config = replace(QUICK, keep="recall", epochs=4, patience=2)
    assert train([tokens], tmp_path / "out", config, note=quiet)["epoch"] == 1


def test_keeping_by_recall_needs_a_refresh_that_needs_a_chunk(tokens, tmp_path):
    """No voter is a head here, so nothing is golden."""
    config = replace(QUICK, voters="head")
    for warm_start in (True, False):
        lines = []
        with pytest.raises(UsageError, match="No held-out refresh needs a chunk, so keep=recall has nothing"):
            train([tokens], tmp_path / "out", replace(config, keep="recall", warm_start=warm_start), note=lines.append)
        assert not any(line.startswith("[1/") for line in lines), "an epoch was spent first"


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_tokens": 0}, "segment_tokens must be 1 or more, got 0"),
        ({"segment_tokens": -4}, "segment_tokens must be 1 or more, got -4"),
        ({"neighbours": -1}, "neighbours must be 0 or more, got -1"),
        ({"keep": "best"}, "keep must be loss or recall, got 'best'"),
    ],
)
def test_bad_options_get_one_clear_sentence(options, message):
    with pytest.raises(UsageError) as caught:
        TrainConfig(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ("tokens", {"segment_tokens": 5}, "segment_tokens is 5: it must divide the chunk of 16 tokens"),
        ("tokens", {"segment_tokens": 32}, "segment_tokens is 32: it must divide the chunk of 16 tokens"),
        ("tokens", {"segment_tokens": 24, "chunk_tokens": 64}, "it must divide the chunk of 64 tokens"),
        ("stats", {"segment_tokens": 8}, "the collection must hold every key (--features tokens)"),
        ("tokens", {"chunk_tokens": 24}, "chunks of 16 tokens do not make such ones; give a multiple"),
        ("tokens", {"chunk_tokens": 8}, "chunks of 16 tokens do not make such ones"),
        ("tokens", {"chunk_tokens": 0}, "chunk_tokens is 0"),
        ("tokens", {"chunk_tokens": -16}, "chunk_tokens is -16"),
        ("stats", {"chunk_tokens": 64}, "--features stats serves its own chunks of 16 tokens alone; collect again"),
    ],
)
def test_what_a_collection_cannot_give_is_refused(tokens, tmp_path, features, options, message):
    folder = tokens
    if features == "stats":
        folder = planted_collection(tmp_path / "stats", documents=4)
    with pytest.raises(UsageError) as caught:
        train([folder], tmp_path / "out", replace(QUICK, **options), note=quiet)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("features", ["stats", "tokens"])
def test_an_indexer_of_chunks_the_collection_cannot_make_is_named(tokens, tmp_path, features):
    train([tokens], tmp_path / "out", replace(QUICK, epochs=1), note=quiet)
    wide = planted_collection(tmp_path / "wide", documents=2, chunk_tokens=32, features=features)
    with pytest.raises(UsageError) as caught:
        evaluate([wide], str(tmp_path / "out"), tmp_path / "tables", EvalConfig(), device="cpu")
    assert f"Indexer '{tmp_path / 'out'}' and the collection differ in chunk_tokens: 16 against 32" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"segment_tokens": 0}, "segment_tokens must divide 16, got 0"),
        ({"segment_tokens": 6}, "segment_tokens must divide 16, got 6"),
        ({"neighbours": -2}, "neighbours must be 0 or more, got -2"),
    ],
)
def test_a_configuration_that_makes_no_sense(values, message):
    with pytest.raises(ValueError, match=message):
        IndexerConfig(model="m", model_revision="r", layers=(0,), chunk_tokens=16, tau=1, hidden_size=4,
                      key_features=4, **values)  # fmt: skip


def test_segments_do_not_change_how_many_flops_a_query_costs():
    config = IndexerConfig(model="m", model_revision="r", layers=(0, 1), chunk_tokens=16, tau=1, hidden_size=4,
                           key_features=4, heads=2, key_dim=8)  # fmt: skip
    cut = replace(config, segment_tokens=4, neighbours=3)
    assert cut.scoring_flops(0) == config.scoring_flops(0)
    per_key = 2 * 2 * 2 * (8 + 1)  # a MAC is two; layers, heads
    assert config.scoring_flops(10) - config.scoring_flops(0) == 10 * per_key
    assert cut.scoring_flops(10) - cut.scoring_flops(0) == 40 * per_key + 40 * 6
    assert cut.chunk_key_bytes == 4 * config.chunk_key_bytes == 4 * 2 * (8 + 4)
    assert cut.segments_per_chunk == 4
