"""``lsa calibrate``: what is kept at threshold 0.5 afterwards, what is recorded, what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from lsa_tools import random_indexer
from planted import INFO, planted_collection
from safetensors.torch import load_file

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.reading import Collection, open_collections
from kvscope.harness.indexers.lsa import calibrate as module
from kvscope.harness.indexers.lsa.calibrate import CalibrateConfig, calibrate
from kvscope.harness.indexers.lsa.evaluate import evaluate
from kvscope.harness.indexers.lsa.lineage import calibration_ids, data_ids
from kvscope.harness.indexers.lsa.measuring import EvalConfig, Shares, measuring_options
from kvscope.harness.indexers.lsa.refreshes import Refreshes, cut_for_kept, cut_for_recall, score
from kvscope.harness.indexers.lsa.train import train
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.methods.indexer_files import CONFIG_FILE, WEIGHTS_FILE, indexer_hash
from kvscope.methods.lsa.indexer import logit
from kvscope.methods.lsa.indexer_files import FILES, load_indexer, read_indexer_config

pytestmark = pytest.mark.usefixtures("no_figure")
MEASURE = EvalConfig(recency_tokens=128)
N_DOCUMENTS, N_REFRESHES, N_TOKENS = 20, 120, 640


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Documents to train on, and others."""
    folder = tmp_path_factory.mktemp("planted")
    return [planted_collection(folder / "train", documents=40, features="tokens"),
            planted_collection(folder / "other", documents=N_DOCUMENTS, features="tokens", seed=5)]  # fmt: skip


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    """An indexer that lends, trained a little: its scores overlap, so that a threshold trades recall for bytes."""
    folder = tmp_path_factory.mktemp("begun") / "begun"
    config = TrainConfig(tau=1, epochs=4, lr=2e-2, recency_tokens=128, heads=4, key_dim=8, rank=8, encoder_width=16,
                         lookback=1, neighbours=1, warm_start=False, patience=12, device="cpu", negatives=3,
                         keep="loss")  # fmt: skip
    train(data[:1], folder, config, note=lambda text: None)
    return folder


@pytest.fixture(scope="module")
def recall_before(data, begun, tmp_path_factory, no_figure):
    """Recall of that indexer at threshold 0.5, by ``lsa eval``."""
    return evaluated(begun, data, tmp_path_factory.mktemp("before"))["recall"]


def run(data, indexer, out, **options):
    return calibrate([data[1]], str(indexer), out, CalibrateConfig(measure=MEASURE, **options), device="cpu")


def logits_of(folder, data, *, chunk_tokens=None):
    """Logits of every refresh of the other documents, as they are read by what decodes: from the files."""
    indexer = load_indexer(folder)
    options = measuring_options(indexer.config, MEASURE)
    collections = open_collections([data[1]], chunk_tokens=chunk_tokens or indexer.config.chunk_tokens)
    return torch.cat([each.logits for each in score(indexer, collections, options)])


def evaluated(folder, data, tmp_path):
    """The row of ``lsa eval`` at threshold 0.5."""
    rows = evaluate([data[1]], str(folder), tmp_path / "tables", MEASURE, device="cpu")
    (row,) = [row for row in rows if (row["task"], row["policy"], row["setting"], row["value"])
              == ("all", "indexer", "threshold", 0.5)]  # fmt: skip
    return row


# -- each target


@pytest.mark.parametrize("threshold", [0.43, 0.47, 0.5, 0.52])
def test_what_was_the_threshold_is_a_half(data, begun, tmp_path, threshold):
    found = run(data, begun, tmp_path / "out", threshold=threshold)
    before, after = logits_of(begun, data), logits_of(tmp_path / "out", data)
    wanted = before >= logit(threshold)
    # The shift is added to a bias: whoever lies within its rounding of the threshold may cross it.
    clear = (before - logit(threshold)).abs() > 1e-5
    assert torch.equal((after >= logit(0.5))[clear], wanted[clear])
    assert clear.float().mean() > 0.99
    assert 0 < wanted.sum() < wanted.numel()
    assert (threshold == 0.5) == torch.equal(before >= logit(0.5), wanted), "or this shows nothing"
    torch.testing.assert_close(after, before - logit(threshold), atol=1e-5, rtol=0)
    assert found["threshold"] == pytest.approx(threshold, abs=1e-6)
    assert found["shift"] == pytest.approx(-logit(threshold), abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", [0.3, 0.6, 0.9, 0.99])
def test_a_recall_is_met_by_as_few_chunks_as_do(data, begun, recall_before, tmp_path, target, dtype):
    """One golden chunk a refresh: the recall moves in steps of one refresh."""
    found = run(data, begun, tmp_path / "out", target_recall=target, dtype=dtype)
    row = evaluated(tmp_path / "out", data, tmp_path)
    assert target <= row["recall"] < target + 1 / N_REFRESHES
    assert (found["after"]["recall"], found["after"]["kept"]) == (row["recall"], row["kept_bytes_fraction"])
    assert found["before"]["recall"] == recall_before
    assert found["after"]["refreshes"] == found["after"]["refreshes_needing"] == N_REFRESHES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", [0.32, 0.5, 0.9])
def test_a_share_is_not_exceeded_and_is_used(data, begun, tmp_path, target, dtype):
    """A chunk of one refresh is 16 of 640 tokens, one of 120 refreshes."""
    found = run(data, begun, tmp_path / "out", target_kept=target, dtype=dtype)
    row = evaluated(tmp_path / "out", data, tmp_path)
    assert target - 2 * 16 / 640 / N_REFRESHES < row["kept_bytes_fraction"] <= target
    assert found["after"]["kept"] == row["kept_bytes_fraction"]
    kept = read_indexer_config(tmp_path / "out").kept_fraction
    chosen = logits_of(tmp_path / "out", data) >= 0
    assert kept == pytest.approx(float(chosen.float().mean()), abs=1e-4)


def test_refreshes_count_alike_however_many_chunks_they_need(data, begun, tmp_path):
    """With tau 6 one refresh asks for all chunks of a document; halves of documents give the mean that eval has."""
    measure = replace(MEASURE, tau=6)
    config = CalibrateConfig(target_recall=0.7, measure=measure)
    found = calibrate([data[1]], str(begun), tmp_path / "out", config, device="cpu")
    assert found["after"]["refreshes"] == N_DOCUMENTS
    rows = evaluate([data[1]], str(tmp_path / "out"), tmp_path / "tables", measure, device="cpu")
    (row,) = [r for r in rows if (r["task"], r["policy"], r["setting"], r["value"]) == ("all", "indexer", "threshold",
                                                                                     0.5)]  # fmt: skip
    assert 0.7 <= row["recall"] == found["after"]["recall"] < 0.7 + 1 / N_DOCUMENTS
    config = read_indexer_config(tmp_path / "out")
    assert (config.tau, config.trained["calibration"]["tau"]) == (1, 6), "the indexer's own tau stays"


def test_equal_scores_are_kept_together_or_not_at_all():
    """A cut goes between scores, never into equal ones, and never where rounding could move one over it."""
    logits = torch.tensor([[1.0, 1.0, 1.0, -2.0, -3.0]])
    golden = torch.tensor([[False, True, False, True, False]])
    everything = torch.ones_like(golden)
    scored = [Refreshes(logits, golden, everything, ~everything, Shares(static=0.2, chunk=0.15, metadata=0.05))]
    assert cut_for_recall(scored, 0.4) == cut_for_recall(scored, 0.5) == -0.5
    assert cut_for_recall(scored, 0.6) == -2.5
    assert cut_for_kept(scored, 0.69) == 2.0, "the three do not fit: none is kept"
    assert cut_for_kept(scored, 0.70) == -0.5
    assert cut_for_kept(scored, 0.99) == -2.5
    with pytest.raises(UsageError, match=r"target_kept is 0.2, and sinks, window, keys and states alone are 0.2500 of"):
        cut_for_kept(scored, 0.2)


def test_a_target_counts_what_the_least_share_keeps_anyway():
    """The two best of five stay whatever the cut: half of the golden chunks, 0.55 of the bytes."""
    logits = torch.tensor([[3.0, 2.0, 1.0, -2.0, -3.0]])
    golden = torch.tensor([[False, True, False, True, False]])
    everything, filled = torch.ones_like(golden), logits >= 2.0
    scored = [Refreshes(logits, golden, everything, filled, Shares(static=0.2, chunk=0.15, metadata=0.05))]
    assert scored[0].chosen().tolist() == [[True, True, True, False, False]]
    assert cut_for_recall(scored, 0.6) == -2.5
    assert cut_for_kept(scored, 0.70) == -0.5
    assert cut_for_kept(scored, 0.56) == 1.5, "only the least share stays"
    with pytest.raises(UsageError, match=r"target_recall is 0.5, and the least share alone has 0.5000 of the golden"):
        cut_for_recall(scored, 0.5)
    with pytest.raises(UsageError, match=r"target_kept is 0.4, and filled up to the least share 0.5500 of these"):
        cut_for_kept(scored, 0.4)


@pytest.mark.parametrize(
    ("least", "target"),
    [
        ({"least_tokens": 256}, {"target_recall": 0.9}),
        ({"least_tokens": 100, "least_fraction": 256 / N_TOKENS}, {"threshold": 0.52}),
        ({"least_fraction": 0.9, "cap_tokens": 256}, {"threshold": 0.5}),
    ],
)
def test_a_least_share_is_stored_and_every_measure_is_filled_up_to_it(data, begun, tmp_path, least, target):
    """Of 256 tokens sinks (16) and window (128) leave seven chunks of 16; the cap wins."""
    found = run(data, begun, tmp_path / "out", **least, **target)
    config = read_indexer_config(tmp_path / "out")
    stored = config.trained["calibration"]
    assert {name: stored[name] for name in least} == {name: getattr(config, name) for name in least} == least
    row = evaluated(tmp_path / "out", data, tmp_path)
    assert (found["after"]["recall"], found["after"]["kept"]) == (row["recall"], row["kept_bytes_fraction"])
    logits = logits_of(tmp_path / "out", data)
    n_chosen = (logits >= logit(0.5)).sum(1)
    assert (n_chosen < 7).any(), "or the least share does nothing"
    expected = n_chosen.clamp_min(7).clamp_max(7 if "cap_tokens" in least else logits.shape[1])
    assert found["after"]["kept_candidates"] == round(float(expected.sum()) / logits.numel(), 4)
    back = run(data, tmp_path / "out", tmp_path / "back", threshold=0.5)
    assert back["after"] == found["after"], "kept where another is not given"
    if "target_recall" in target:
        assert row["recall"] >= 0.9
    with pytest.raises(UsageError, match="least_fraction must be between 0 and 1, got 2"):
        run(data, begun, tmp_path / "bad", least_fraction=2, threshold=0.5)


@pytest.mark.parametrize(
    ("cap", "target"),
    [
        ({"cap_tokens": 256}, {"target_recall": 0.2}),
        ({"cap_tokens": 256, "cap_fraction": 0.1}, {"target_kept": 0.36}),
        ({"cap_tokens": 100, "cap_fraction": 256 / N_TOKENS}, {"threshold": 0.4}),
    ],
)
def test_a_cap_is_stored_and_every_measure_is_under_it(data, begun, tmp_path, cap, target):
    """Of 256 tokens sinks (16) and window (128) leave seven chunks of 16."""
    found = run(data, begun, tmp_path / "out", **cap, **target)
    config = read_indexer_config(tmp_path / "out")
    stored = config.trained["calibration"]
    assert config.cap(N_TOKENS) == 256
    assert [stored[name] for name in ("cap_tokens", "cap_fraction")] == [config.cap_tokens, config.cap_fraction]
    row = evaluated(tmp_path / "out", data, tmp_path)
    assert (found["after"]["recall"], found["after"]["kept"]) == (row["recall"], row["kept_bytes_fraction"])
    logits = logits_of(tmp_path / "out", data)
    n_chosen = (logits >= logit(0.5)).sum(1)
    assert (n_chosen > 7).any(), "or the cap does nothing"
    assert found["after"]["kept_candidates"] == round(float(n_chosen.clamp_max(7).sum()) / logits.numel(), 4)
    if "target_recall" in target:
        assert row["recall"] >= 0.2
    if "target_kept" in target:
        assert row["kept_bytes_fraction"] <= 0.36


def test_a_recall_beyond_the_cap_is_refused(data, begun, tmp_path):
    with pytest.raises(UsageError, match=r"within the cap no threshold has more than .*; raise --cap-tokens"):
        run(data, begun, tmp_path / "out", cap_tokens=160, target_recall=0.999)
    with pytest.raises(UsageError, match="cap_tokens must be 1 or more, got 0"):
        run(data, begun, tmp_path / "out", cap_tokens=0, target_recall=0.5)


# -- chunks, dtype


def test_a_larger_chunk_has_the_score_of_its_best_segment(data, begun, tmp_path):
    found = run(data, begun, tmp_path / "out", chunk_tokens=64, threshold=0.6)
    config = read_indexer_config(tmp_path / "out")
    assert (config.chunk_tokens, config.segment_tokens, config.segments_per_chunk) == (64, 16, 4)
    mine, theirs = load_file(tmp_path / "out" / WEIGHTS_FILE), load_file(begun / WEIGHTS_FILE)
    assert {name for name in theirs if not torch.equal(mine[name], theirs[name])} == {"layers.1.bias", "layers.3.bias"}
    # Sinks 64, window 128: chunks 1 to 7 of 64 are segments 4 to 31; of 16 alone segments 1 to 3 are candidates, too,
    # and lend to the fourth, so it is left out.
    large, small = logits_of(tmp_path / "out", data), logits_of(begun, data)
    assert large.shape == (N_REFRESHES, 7)
    best = small[:, 3:].view(N_REFRESHES, 7, 4).amax(2) - logit(0.6)
    torch.testing.assert_close(large[:, 1:], best[:, 1:], atol=1e-5, rtol=0)
    row = evaluated(tmp_path / "out", data, tmp_path)
    assert (row["recall"], row["kept_bytes_fraction"]) == (found["after"]["recall"], found["after"]["kept"])
    back = run(data, tmp_path / "out", tmp_path / "back", chunk_tokens=16, threshold=0.5)
    config = read_indexer_config(tmp_path / "back")
    assert (config.chunk_tokens, config.segment_tokens) == (16, None)
    assert back["shift"] == 0.0
    torch.testing.assert_close(logits_of(tmp_path / "back", data), small - logit(0.6), atol=1e-5, rtol=0)


def test_bfloat16_is_half_as_large_and_chooses_nearly_the_same(data, begun, tmp_path):
    run(data, begun, tmp_path / "half", threshold=0.45, dtype="bfloat16")
    run(data, begun, tmp_path / "full", threshold=0.45)
    sizes = [sum(v.numel() * v.element_size() for v in load_file(tmp_path / name / WEIGHTS_FILE).values())
             for name in ("half", "full")]  # fmt: skip
    assert sizes[0] == sizes[1] / 2 + 2 * 2, "the biases of two layers stay"
    half, full = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("half", "full"))
    for name, weight in full.items():
        assert torch.equal(half[name], weight if name.endswith(".bias") and weight.ndim == 0 else weight.bfloat16())
    assert all(weight.dtype == torch.float32 for weight in load_indexer(tmp_path / "half").state_dict().values())
    chosen = [logits_of(tmp_path / name, data) >= 0 for name in ("half", "full")]
    assert 0 < (chosen[0] != chosen[1]).float().mean() < 0.02, "rounded, and hardly moved"


def test_the_shipped_ones_are_one_indexer_with_three_thresholds(tmp_path, data):
    """They are one training, shifted by thresholds that became a half: each is the first, shifted by a difference."""
    folders = [FILES.folder(name) for name in ("reference", "reference-chunk64", "reference-chunk256")]
    before = [indexer_hash(folder) for folder in folders]
    first = load_indexer(folders[0]).config.trained
    for folder in folders[1:]:
        indexer, other = load_indexer(folders[0]), load_indexer(folder)
        assert other.config.trained["start"] == first["start"]
        cuts = [logit(trained["calibration"]["threshold"]) for trained in (first, other.config.trained)]
        module.shift_bias(indexer, cuts[0] - cuts[1])
        for name, weight in other.state_dict().items():
            rounding = 1e-4 if name in module.bias_names(other) else 0
            torch.testing.assert_close(indexer.state_dict()[name], weight, atol=rounding, rtol=0)
        config = module.in_chunks(indexer.config, other.config.chunk_tokens, folder="reference")
        assert replace(config, kept_fraction=None, trained={}) == replace(other.config, kept_fraction=None, trained={})
    with pytest.raises(UsageError, match="differ in model: reference"):
        run(data, "reference", tmp_path / "out", threshold=0.5)
    assert [indexer_hash(folder) for folder in folders] == before


# -- the record


def test_the_record_says_what_was_done_and_with_what(data, begun, tmp_path):
    before = {name: (begun / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    found = run(data, begun, tmp_path / "out", target_recall=0.8)
    trained = read_indexer_config(tmp_path / "out").trained
    record = trained["calibration"]
    assert record["target"] == {"target_recall": 0.8}
    assert {name: record[name] for name in found} == found
    assert record["data"][0]["id"] == Collection(data[1]).id
    assert (record["documents"], record["chunk_tokens"], record["dtype"], record["tau"]) == (20, 16, "float32", 1)
    assert (record["recency_tokens"], record["labels"]["top_p"]) == (128, INFO.top_p)
    assert trained["start"]["indexer"] == f"begun@{indexer_hash(begun)}"
    assert trained["start"]["trained"] == read_indexer_config(begun).trained
    assert {name: (begun / name).read_bytes() for name in before} == before
    run(data, tmp_path / "out", tmp_path / "again", threshold=0.6)
    trained = read_indexer_config(tmp_path / "again").trained
    assert data_ids(trained) == {Collection(data[0]).id}
    assert calibration_ids(trained) == {Collection(data[1]).id}
    assert trained["start"]["trained"]["start"]["indexer"].startswith("begun@")


def test_documents_that_it_has_seen_are_named(data, begun, tmp_path):
    lines = []
    config = CalibrateConfig(threshold=0.4, measure=MEASURE)
    calibrate(data, str(begun), tmp_path / "out", config, device="cpu", note=lines.append)
    assert lines == [f"note: the indexer was trained on '{data[0]}': other documents will have a lower recall."]
    lines.clear()
    run(data, begun, tmp_path / "one", threshold=0.4)
    evaluate(data, str(tmp_path / "one"), tmp_path / "tables", MEASURE, device="cpu", note=lines.append)
    assert [line.split("'")[0] for line in lines] == ["note: the indexer was trained on ",
                                                      "note: the indexer was calibrated on "]  # fmt: skip


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "0.4", "--target-kept", "0.2"], "and target_kept; given: threshold, target_kept."),
        (["--threshold", "1"], "threshold must lie between 0 and 1, both excluded, got 1.0."),
        (["--target-recall", "0"], "target_recall must lie between 0 and 1, both excluded, got 0.0."),
        (["--target-kept", "1.5"], "target_kept must lie between 0 and 1, both excluded, got 1.5."),
        (["--target-kept", "nan"], "target_kept must lie between 0 and 1, both excluded, got nan."),
        (["--target-kept", "0.05"], "target_kept is 0.05, and sinks, window, keys and states alone are 0."),
        (["--threshold", "0.4", "--chunk-tokens", "40"], "has a key for every 16 tokens; give a multiple of 16."),
        (["--threshold", "0.4", "--chunk-tokens", "0"], "chunk_tokens must be 1 or more, got 0."),
        (["--threshold", "0.4", "--chunk-tokens", "1600"], "No document is long enough for a candidate chunk"),
        (["--threshold", "0.4", "--dtype", "fp8"], "dtype must be float32 or bfloat16, got 'fp8'."),
        (["--threshold", "0.4", "--tau", "0"], "tau must be 1 or more, got 0."),
        (["--threshold", "0.4", "--top-p", "2"], "top_p must be above 0 and at most 1, got 2.0."),
        (["--target-recall", "0.9", "--least-mass", "0.9"], "No refresh of these documents needs a chunk"),
    ],
)
def test_bad_input_is_one_sentence(data, begun, tmp_path, capsys, options, message):
    command = ["lsa", "calibrate", "--indexer", str(begun), "--data", str(data[1]), "--out", str(tmp_path / "out"),
               "--device", "cpu", *options]  # fmt: skip
    assert cli.run_cli(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_what_does_not_belong_together_is_refused(data, begun, tmp_path):
    other = planted_collection(tmp_path / "other", documents=2, features="tokens", model="ghoul", model_revision="zz")
    stats = planted_collection(tmp_path / "stats", documents=2)
    for folder, message in (
        (other, r"differ in model: ghost \(sha256:none\) against ghoul \(zz\)"),
        (stats, "differ in features: tokens against stats"),
        (tmp_path, "is no collection"),
    ):
        with pytest.raises(UsageError, match=message):
            run([None, folder], begun, tmp_path / "out", threshold=0.4)
    long = planted_indexer(tmp_path / "long", lookback_tokens=5)
    with pytest.raises(UsageError, match="scores the last 5 states, and the collection keeps 4"):
        run(data, long, tmp_path / "out", threshold=0.4)
    with pytest.raises(UsageError, match="There is no indexer 'nowhere'"):
        run(data, "nowhere", tmp_path / "out", threshold=0.4)
    assert not (tmp_path / "out").exists()


def test_the_indexer_itself_is_not_overwritten(data, begun):
    before = indexer_hash(begun)
    with pytest.raises(UsageError, match="is the indexer itself; give another folder"):
        run(data, begun, begun.parent / "." / begun.name, threshold=0.4)
    assert indexer_hash(begun) == before


def test_scores_that_are_no_numbers_are_refused(data, tmp_path):
    folder = planted_indexer(tmp_path / "broken")
    indexer = load_indexer(folder)
    with torch.no_grad():
        indexer.layer(3).bias.fill_(torch.nan)
    FILES.save(indexer, folder)
    with pytest.raises(UsageError, match=r"are not finite \(layers.3.bias\)"):
        run(data, folder, tmp_path / "out", threshold=0.4)


def planted_indexer(folder, **changes):
    class Shape:
        revision, layers, hidden_size, n_kv_heads, head_dim = INFO.model_revision, INFO.layers, 24, 2, 6

    return random_indexer(folder, Shape, **{"model": INFO.model, **changes})


# -- the command line


def test_the_command_prints_both_sides_and_writes_an_indexer(data, begun, tmp_path, capsys):
    command = ["lsa", "calibrate", "--indexer", str(begun), "--data", str(data[1]), "--target-kept", "0.4",
               "--chunk-tokens", "32", "--recency-tokens", "128", "--dtype", "bfloat16", "--device", "cpu",
               "--out", str(tmp_path / "out")]  # fmt: skip
    assert cli.run_cli(command) == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.startswith(("before", "after"))}
    record = read_indexer_config(tmp_path / "out").trained["calibration"]
    for name in ("before", "after"):
        assert lines[name] == [f"{record[name][key]:.2%}" for key in ("recall", "kept", "kept_candidates")]
    assert lines["before"] != lines["after"]
    assert f"indexer  {tmp_path / 'out'}" in said
    assert json.loads((tmp_path / "out" / CONFIG_FILE).read_text())["segment_tokens"] == 16
    assert cli.run_cli(["lsa", "calibrate", "--help"]) == 0
    words = capsys.readouterr().out
    for word in ("--threshold", "--target-recall", "--target-kept", "--chunk-tokens", "--dtype", "--tau"):
        assert word in words
