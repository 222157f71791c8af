"""Training a lightning indexer from shards alone: the loss, what it finds, what it refuses, and what collect stored."""

import json

import pytest
import torch
from dsa_tools import STEPS, planted_collection, random_indexer
from no_backbone import train_without_backbone

from kvscope.errors import UsageError
from kvscope.harness.engine.models import load_model
from kvscope.harness.indexers.collection.collect import CollectConfig, collect
from kvscope.harness.indexers.collection.places import split
from kvscope.harness.indexers.collection.reading import Collection
from kvscope.harness.indexers.collection.token_records import choose_tokens
from kvscope.harness.indexers.dsa.evaluate import evaluate, summary_text
from kvscope.harness.indexers.dsa.objective import DsaTrainConfig, divergence, example, measure, share_taken
from kvscope.harness.indexers.dsa.train import train
from kvscope.harness.indexers.dsa.warm_start import free_of_mean
from kvscope.harness.passes.progress import Progress
from kvscope.methods.dsa.indexer_files import FILES

QUICK = DsaTrainConfig(epochs=10, lr=1e-2, batch_documents=4, key_dim=12, heads=2, patience=10, device="cpu")
CPU = torch.device("cpu")


def quiet(text):
    del text


def changed(config, **values):
    return DsaTrainConfig(**{**vars(config), **values})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return planted_collection(tmp_path_factory.mktemp("planted") / "data")


def test_divergence_is_the_formula_and_counts_what_a_token_stands_for():
    draws = torch.Generator().manual_seed(0)
    score, target = torch.randn(2, 5, generator=draws), torch.rand(2, 5, generator=draws)
    visible = torch.tensor([[True] * 5, [True, True, True, False, False]])
    target = target * visible
    weight = torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0])
    target = target / (target * weight).sum(1, keepdim=True)
    found = divergence(score, target, weight, visible)
    for row in range(2):
        copies = [token for token in range(5) if visible[row, token] for _ in range(int(weight[token]))]
        q = torch.softmax(score[row, copies].double(), 0)
        p = target[row, copies].double()
        assert float(found[row]) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-5)
    assert float(divergence(target.clamp_min(1e-30).log(), target, weight, visible).abs().max()) < 1e-5


@pytest.mark.parametrize("warm", [True, False])
def test_it_finds_what_is_planted(data, tmp_path, warm):
    lines = []
    best = train([data], tmp_path / "out", changed(QUICK, warm_start=warm), note=lines.append)
    assert best["oracle_recall"] > 0.85
    assert best["mass_recall"] > (0.8 if warm else 0.6), "any 128 of 320 tokens hold 0.46"
    log = [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    epochs = [line for line in log if "epoch" in line]
    assert epochs[0]["held_out_loss"] > best["held_out_loss"]
    start = [line for line in log if "warm_start" in line]
    assert bool(start) == warm
    if warm:
        assert start[0]["warm_start"][0]["query_fit"] > 0.9
        assert start[0]["warm_start"][0]["key_fit"] > 0.9
        assert start[0]["held_out"]["mass_recall"] > 0.8, "known before the first update"
    config = FILES.read_config(tmp_path / "out")
    assert (config.model, config.model_revision, config.layers) == ("ghost", "sha256:none", (1, 3))
    assert (config.heads, config.key_dim, config.hidden_size) == (2, 12, 24)
    assert config.trained["documents"] == 36
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "for ghost",
        "DSA-style",
        "layers 1, 3, one indexer each: 2 heads x 12",
        "16 bytes a token and layer",
        "at 320 tokens",
    ):
        assert words in card
    assert config.trained["data"][0]["id"] == Collection(data).info.id
    assert FILES.load(tmp_path / "out" / "checkpoints" / "epoch-01").config.layers == (1, 3)


def test_the_saved_indexer_is_the_best_epochs_and_repeats(data, tmp_path):
    found = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        best = train([data], tmp_path / name, changed(QUICK, epochs=2, seed=seed), note=quiet)
        found.append((tmp_path / name / "indexer.safetensors").read_bytes())
        _, held_out = split([(Collection(data), index) for index in range(40)], share=0.1)
        again = measure(FILES.load(tmp_path / name), held_out)
        assert {key: best[key] for key in again} == again
    assert found[0] == found[1] != found[2]


def test_what_is_taken_is_the_best_within_the_budget(data):
    """Against sorting by hand, where every token is stored, and against that where one stands for several."""
    found = example((Collection(data), 0), CPU)
    score = torch.rand(found.target_RLS[:, 0].shape, generator=torch.Generator().manual_seed(2))
    taken = share_taken(score, found, 40)
    assert ((taken * found.weight_S).sum(1) - 40).abs().max() < 1e-3
    assert (taken[torch.arange(STEPS), found.current_R] == 1).all()
    assert not taken[~found.visible_RS].any(), "no token of a later step"
    exact = example((Collection(planted_like(data)), 0), CPU)
    assert (exact.weight_S == 1).all()
    score = torch.rand(exact.target_RLS[:, 0].shape, generator=torch.Generator().manual_seed(2))
    taken = share_taken(score, exact, 9)
    for row in range(STEPS):
        seen = [token for token in range(score.shape[1]) if exact.visible_RS[row, token]]
        seen.remove(int(exact.current_R[row]))
        best = {*sorted(seen, key=lambda token: -float(score[row, token]))[:8], int(exact.current_R[row])}
        assert set(taken[row].nonzero()[:, 0].tolist()) == best


def planted_like(data):
    return planted_collection(data.parent / "whole", token_samples=10_000, samples=4)


def test_a_sample_of_the_tokens_estimates_the_loss_of_all(tmp_path):
    whole, part = (
        planted_collection(tmp_path / name, token_samples=n, samples=30, n_tokens=1024)
        for name, n in (("whole", 10_000), ("part", 128))
    )
    indexer = FILES.load(
        random_indexer(tmp_path / "indexer", _ShapeOf, model_revision="sha256:none", layers=(1, 3), hidden_size=24)
    )
    losses = [measure(indexer, [(Collection(folder), i) for i in range(30)]) for folder in (whole, part)]
    assert losses[0]["held_out_loss"] == pytest.approx(losses[1]["held_out_loss"], abs=0.05)
    assert losses[0]["oracle_recall"] == pytest.approx(losses[1]["oracle_recall"], abs=0.02)
    assert losses[0]["mass_recall"] == pytest.approx(losses[1]["mass_recall"], abs=0.06)
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (whole, part)]
    assert sizes[1] < sizes[0] / 4


class _ShapeOf:
    revision, layers, hidden_size = "sha256:none", (1, 3), 24


def test_tokens_are_chosen_by_attention_and_drawn_at_random():
    mass = torch.full((2, 3, 500), 1e-5)
    mass[0, 1, 77] = mass[1, 2, 402] = 0.5
    tokens, weights = choose_tokens(mass, 50, seed=3)
    assert len(tokens) == 52
    assert tokens.tolist() == sorted(set(tokens.tolist()))
    assert {77, 402} <= set(tokens.tolist())
    assert float(weights.sum()) == pytest.approx(500)
    assert weights[tokens == 77] == 1
    assert torch.equal(tokens, choose_tokens(mass, 50, seed=3)[0])
    assert not torch.equal(tokens, choose_tokens(mass, 50, seed=4)[0])
    everything, ones = choose_tokens(mass, 498, seed=0)
    assert everything.tolist() == list(range(500))
    assert (ones == 1).all()


def test_free_of_mean_is_an_orthonormal_basis():
    basis = free_of_mean(7, CPU)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64))
    assert basis.sum(0).abs().max() < 1e-9
    assert free_of_mean(1, CPU).shape == (1, 1)


@pytest.fixture(scope="module")
def collected(tiny_model, tmp_path_factory):
    config = CollectConfig(
        model=tiny_model, tasks=("niah_single_1",), lengths_tokens=(320, 512), samples=3, seed=77, chunk_tokens=16,
        features="stats", token_samples=10_000, answers="reference", device="cpu",
    )  # fmt: skip
    return collect(config, tmp_path_factory.mktemp("collected") / "data", progress=Progress())


@torch.inference_mode()
def test_collect_stores_the_states_and_the_attention_of_the_model(collected, tiny_model):
    """Against the stock model in eager attention, whole prompt at once."""
    from transformers import AutoModelForCausalLM

    from kvscope.harness.indexers.collection.make_document import answer_ids
    from kvscope.tasks.registry import create_task

    collection = Collection(collected)
    document, loaded = collection.load(0), load_model(tiny_model, device="cpu")
    sample = create_task("niah_single_1").build(loaded.tokenizer, length_tokens=320, sample=0, seed=77)
    ids = [*sample.ids, *answer_ids(loaded, sample)]
    stock = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager", dtype=torch.float32)
    out = stock(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
    n_prompt, n_steps = document.info.prompt_tokens, document.info.n_steps
    assert document.tokens.tolist() == list(range(n_prompt))
    for at in range(2):
        states = out.hidden_states[at][0]
        torch.testing.assert_close(document.token_states[at].float(), states[:n_prompt], atol=0.02, rtol=0.02)
        attention = out.attentions[at][0].mean(0)[n_prompt : n_prompt + n_steps]
        torch.testing.assert_close(document.token_mass[:, at].float(), attention[:, :n_prompt], atol=1e-3, rtol=1e-2)
        torch.testing.assert_close(
            document.step_mass[:, at].float(), attention[:, n_prompt : n_prompt + n_steps], atol=1e-3, rtol=1e-2
        )
    # Training sees the states that decoding sees, and its own step among the tokens.
    found = example((collection, 0), CPU)
    torch.testing.assert_close(
        found.query_RLM[3, 1].float(), out.hidden_states[1][0, n_prompt + 3], atol=0.02, rtol=0.02
    )
    assert found.position_S[found.current_R].tolist() == list(range(n_prompt, n_prompt + n_steps))
    torch.testing.assert_close(found.target_RLS.sum(2), torch.ones(n_steps, 2))


def test_the_whole_way_through_the_commands(collected, tiny_model, tmp_path, capsys):
    from kvscope import cli

    out, tables = str(tmp_path / "indexer"), tmp_path / "tables"
    assert cli.run_cli(["dsa", "train", "--data", str(collected), "-o", out, "--epochs", "2", "--device", "cpu"]) == 0
    assert "attention held" in capsys.readouterr().out
    command = ["dsa", "eval", "--data", str(collected), "--indexer", out, "-o", str(tables), "--device", "cpu"]
    assert cli.run_cli(command) == 0
    said = capsys.readouterr()
    assert "oracle" in said.out
    assert "these figures are no test of it" in said.err
    for name in ("recall.csv", "recall.md", "recall.json"):
        assert (tables / name).is_file()
    assert json.loads((tables / "recall.json").read_text())["about"]["tokens"] == "every one"
    run = ["run", "--model", tiny_model, "-m", "dense", "-m", f"dsa:indexer={out},budget_tokens=64", "--task",
           "niah_single_1", "-l", "512", "-n", "1", "--max-new-tokens", "3", "--no-footprint", "--device", "cpu",
           "--out", str(tmp_path / "run"), "-q", "--no-report"]  # fmt: skip
    assert cli.run_cli(run) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["method"] != "dense"]
    assert row["selection"] == "trained"
    assert row["config"]["indexer"].startswith("indexer@")
    assert row["metadata_bytes"] > 0
    assert cli.run_cli([*run[:4], "dsa", *run[7:]]) == 2
    assert "No trained lightning indexer comes with kvscope for this model" in capsys.readouterr().err


def test_the_table_ranks_the_choices(data, tmp_path):
    train([data], tmp_path / "indexer", changed(QUICK, epochs=4), note=quiet)
    fresh = planted_collection(tmp_path / "fresh", seed=5, samples=6, token_samples=10_000)
    rows = evaluate([fresh], str(tmp_path / "indexer"), tmp_path / "out", device="cpu")
    at = {(r["policy"], r["budget_tokens"]): r for r in rows if (r["task"], r["layer"]) == ("all", "all")}
    assert at["oracle", 64]["overlap"] == 1
    assert at["oracle", 64]["mass"] > at["indexer", 64]["mass"] > 0.75
    assert at["random", 64]["mass"] < 0.5 < at["indexer", 64]["mass"]
    assert at["recency", 64]["mass"] < 0.5
    assert {r["layer"] for r in rows} == {"all", "1", "3"}
    assert at["indexer", 64]["rows"] == 6 * STEPS * 2
    assert "320" in summary_text(rows) or "0.3K" in summary_text(rows)
    # One cell by hand.
    indexer, mass = FILES.load(tmp_path / "indexer"), 0.0
    for index in range(6):
        found = example((Collection(fresh), index), CPU)
        for place, layer in enumerate((1, 3)):
            part = indexer.layer(layer)
            q, w = part.queries(found.query_RLM[:, place])
            keys = part.keys(found.key_LSM[place]).detach()
            scale = keys.abs().amax(1, keepdim=True) / 448
            keys = (keys / scale).to(torch.float8_e4m3fn).float() * scale
            score = torch.einsum("rh,rhs->rs", w, torch.relu(q @ keys.T)).masked_fill(~found.visible_RS, -torch.inf)
            for row in range(STEPS):
                score[row, found.current_R[row]] = torch.inf
                mass += float(found.target_RLS[row, place, score[row].topk(64).indices].sum())
    assert at["indexer", 64]["mass"] == pytest.approx(mass / (6 * STEPS * 2), abs=2e-3)


def test_shards_without_tokens_or_layers_and_other_models_are_refused(data, tmp_path):
    bare = planted_collection(tmp_path / "bare", token_samples=0, samples=4)
    with pytest.raises(UsageError, match=r"stores no single tokens.*collect with kvscope lsa collect --token-samples"):
        train([bare], tmp_path / "out", QUICK, note=quiet)
    fewer = planted_collection(tmp_path / "fewer", layers=(1,), samples=4)
    with pytest.raises(UsageError, match=r"holds layers 1, and a lightning indexer needs all .*\(3 are missing\)"):
        train([fewer], tmp_path / "out", QUICK, note=quiet)
    foreign = random_indexer(
        tmp_path / "foreign", _ShapeOf, model="else", model_revision="sha256:x", layers=(1, 3), hidden_size=24
    )
    with pytest.raises(UsageError, match=r"differ in model: else .sha256:x. against ghost"):
        evaluate([data], str(foreign), tmp_path / "tables", device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"heads": 0}, "heads must be 1 or more"),
        ({"held_out": 1.0}, "held_out must lie between 0 and 1"),
        ({"lr": 0.0}, "lr must be positive"),
    ],
)
def test_bad_options_get_one_clear_sentence(options, message):
    with pytest.raises(UsageError) as caught:
        DsaTrainConfig(**options)
    assert message in str(caught.value)


def test_training_neither_imports_nor_loads_a_backbone(data, tmp_path):
    """The collection's model does not even exist; and nothing that could load one may be imported."""
    train_without_backbone("dsa", data, tmp_path / "out")
