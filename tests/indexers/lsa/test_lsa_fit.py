"""``lsa fit``: an indexer in one command, within a time that a clock of the test's own tells."""

import json
from dataclasses import replace

import pytest
import torch
from lsa_tools import prefilled, run_steps
from planted import INFO, planted_collection, planted_document
from tiny import save_tiny_model

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.engine.models import load_model
from kvscope.harness.indexers.collection.label_choice import LabelChoice
from kvscope.harness.indexers.collection.reading import Collection
from kvscope.harness.indexers.collection.shards import write_manifest, write_shard
from kvscope.harness.indexers.lsa import fit as module
from kvscope.harness.indexers.lsa.calibrate import warning_of
from kvscope.harness.indexers.lsa.fit import fit
from kvscope.harness.indexers.lsa.fit_config import ROLES, STATE_FILE, FitConfig
from kvscope.harness.indexers.lsa.fit_documents import DocumentCost, fitting_lengths
from kvscope.harness.indexers.lsa.gate import gate_failures
from kvscope.harness.indexers.lsa.label_share import MOST_KEPT, choose_labels, label_share, retrieving_layers
from kvscope.harness.indexers.lsa.refreshes import Refreshes, hit_rate
from kvscope.methods.lsa.indexer_files import read_indexer_config
from kvscope.methods.registry import create_method

pytestmark = pytest.mark.usefixtures("no_figure")


def quiet(text):
    del text


class Clock:
    """Each look takes a second."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        self.now_s += 1.0
        return self.now_s


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """A tiny model whose heads attend to few tokens."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "sharp"
    save_tiny_model(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(400.0)
            layer.self_attn.k_proj.weight.mul_(40.0)
    model.save_pretrained(folder)
    return str(folder)


def asked(model, **changes):
    options = {"minutes": 1.2, "tasks": ("long_qa",), "lengths_tokens": (512,), "device": "cpu"}
    return FitConfig(model=model, **{**options, **changes})


@pytest.fixture(scope="module")
def fitted(sharp, tmp_path_factory):
    folder, clock = tmp_path_factory.mktemp("fit") / "out", Clock()
    card = fit(asked(sharp), folder, note=quiet, clock=clock)
    return folder, card, clock


# -- one command


def test_it_leaves_an_indexer_that_decodes(fitted, sharp):
    folder, card, _ = fitted
    config = read_indexer_config(folder)
    assert (config.tau, config.chunk_tokens, config.neighbours, config.lookback_tokens) == (4, 16, 8, 16)
    assert config.trained["calibration"]["target"] == {"target_recall": 0.98}
    assert config.kept_fraction == card.calibrated["after"]["kept_candidates"]
    loaded, method = load_model(sharp, device="cpu"), create_method(f"lsa:indexer={folder},budget_tokens=300")
    prompt = prefilled(loaded, list(range(5, 505)), method)
    _, record, _ = run_steps(loaded, method, prompt, [7, 8])
    assert record.indexer.startswith("out@")
    assert 200 < record.resident_tokens[0] <= 300


def test_the_time_is_kept_and_no_document_serves_two_ends(fitted):
    folder, card, clock = fitted
    assert clock.now_s < 90  # the last looks come when all is done
    state = json.loads((folder / STATE_FILE).read_text())
    assert 0.6 * 72 < sum(state["phases_s"].values()) <= 72
    seeds = {role: [] for role in ROLES}
    for data in sorted((folder / "data").iterdir()):
        collection = Collection(data)
        seeds[data.name.partition("-")[2]].append(collection.info.seed)
        assert collection.info.layers == card.indexer.layers
    every = [seed for found in seeds.values() for seed in found]
    assert len(every) == len(set(every)) == sum(card.documents.values())
    assert 1000 not in every, "the probe's"
    assert all(seeds.values())


def test_the_card_says_what_it_was_made_of(fitted, sharp):
    folder, card, _ = fitted
    text, values = (folder / "README.md").read_text(), json.loads((folder / "card.json").read_text())
    config = read_indexer_config(folder)
    for word in (config.model_revision, "--minutes 1.2", "long_qa", "top-p 0.9, least mass 0.2", "torch "):
        assert word in text
    assert values["documents"] == card.documents
    assert values["command"].startswith(f"kvscope lsa fit {sharp} --minutes 1.2")
    rows = (folder / "evaluation" / "recall.csv").read_text().splitlines()
    (at_threshold,) = [row for row in rows if row.startswith("512,all,indexer,threshold,0.5,")]
    kept, recall = (float(at_threshold.split(",")[at]) for at in (6, 7))
    assert f"{recall:.1%} at {kept:.1%}" in text
    assert (values["evaluation"]["recall"], values["evaluation"]["kept"]) == (recall, kept)


def test_few_documents_and_large_choices_are_warned_of(fitted):
    _, card, _ = fitted
    assert card.documents["train"] < 32
    assert any("are few documents" in line and "32 to train" in line for line in card.warnings)
    assert card.warnings[0] in card.summary_text()
    many = replace(card, documents=dict.fromkeys(card.documents, 40), evaluated={**card.evaluated, "kept": 0.2})
    assert many.warnings == []
    (greedy,) = replace(many, evaluated={**card.evaluated, "kept": 0.965}).warnings
    assert "it keeps 96.5% of new prompts" in greedy


def test_the_same_command_again_makes_no_document(fitted, sharp, monkeypatch):
    folder, card, _ = fitted
    monkeypatch.setattr(module, "load_model", lambda *args, **options: pytest.fail("the model was loaded"))
    monkeypatch.setattr(module, "train", lambda *args, **options: pytest.fail("it was trained"))
    again = fit(asked(sharp), folder, note=quiet, clock=Clock())
    assert (again.rows, again.hit_rate, again.documents) == (card.rows, card.hit_rate, card.documents)
    with pytest.raises(UsageError, match="begun with tau 4, and 8 is asked for; give another --out"):
        fit(asked(sharp, tau=8), folder, note=quiet, clock=Clock())


def test_too_little_time_is_told_and_more_continues(sharp, tmp_path):
    with pytest.raises(UsageError, match=r"too few documents for an indexer\. Give more --minutes") as caught:
        fit(asked(sharp, minutes=0.3), tmp_path, note=quiet, clock=Clock())
    assert "\n" not in str(caught.value)
    made = len(list((tmp_path / "data").iterdir()))
    lines = []
    card = fit(asked(sharp, minutes=1.4), tmp_path, note=lines.append, clock=Clock())
    assert not any("layers that retrieve" in line for line in lines), "the probe is not made again"
    assert sum(card.documents.values()) > made
    more = fit(asked(sharp, minutes=2.5), tmp_path, note=quiet, clock=Clock())
    assert more.documents["train"] > card.documents["train"], "and so does more time for one that ended"
    assert more.indexer.trained["start"]["trained"]["documents"] > card.indexer.trained["start"]["trained"]["documents"]


def test_a_kill_between_two_documents_costs_none_that_are_whole(sharp, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    real, calls = module.collect, []

    def until_the_fourth(*args, **options):
        calls.append(args)
        if len(calls) == 5:  # the probe is the first
            raise Killed
        return real(*args, **options)

    def not_asked_for(*args, **options):
        raise Killed

    monkeypatch.setattr(module, "collect", until_the_fourth)
    monkeypatch.setattr(module, "train", not_asked_for)
    with pytest.raises(Killed):
        fit(asked(sharp), tmp_path, note=quiet, clock=Clock())
    before = {str(path): path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*/shard*")}
    assert len(list((tmp_path / "data").iterdir())) == 3
    with pytest.raises(Killed):
        fit(asked(sharp), tmp_path, note=quiet, clock=Clock())
    after = {str(path): path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*/shard*")}
    assert before.items() <= after.items()
    assert len(list((tmp_path / "data").iterdir())) > 3


def test_a_model_that_reads_everywhere_has_no_labels(tiny_model, tmp_path):
    """Random weights: no chunk gets a twentieth of a layer's attention, so nothing is needed."""
    with pytest.raises(UsageError, match=r"No refresh needs a chunk .* so there is nothing to learn"):
        fit(asked(tiny_model), tmp_path, note=quiet, clock=Clock())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--minutes", "0"], "minutes must be positive, got 0."),
        (["--minutes", "nan"], "minutes must be positive"),
        (["--tau", "0"], "tau must be 1 or more, got 0."),
        (["--target-recall", "1"], "target_recall must lie between 0 and 1"),
    ],
)
def test_bad_options_are_one_sentence(options, why, tmp_path, capsys):
    assert cli.run_cli(["lsa", "fit", "reference", "--out", str(tmp_path / "out"), *options]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model": "nowhere"}, "There is no model 'nowhere'"),
        ({"lengths_tokens": (8192,)}, "over the 4,096 tokens"),
        ({"lengths_tokens": (16,)}, "too short for task 'long_qa'"),
        ({"chat_template": "nowhere.jinja"}, "Cannot read the chat template"),
        ({"tasks": None, "lengths_tokens": (16,)}, "Length 16 has no room for any of niah_single_1, "),
    ],
)
def test_what_is_refused_leaves_no_folder(options, why, tiny_model, tmp_path):
    with pytest.raises(UsageError, match=why):
        fit(asked(**{"model": tiny_model, **options}), tmp_path / "out", note=quiet)
    assert not (tmp_path / "out").exists()


def test_prompts_of_a_file_serve_no_two_ends(tiny_model, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "red", "answers": "blue"}')
    with pytest.raises(UsageError, match="Task 'jsonl:q' has the same prompts whatever the seed"):
        fit(asked(tiny_model, tasks=(f"jsonl:{path}",)), tmp_path / "out", note=quiet)
    assert not (tmp_path / "out").exists()


def test_presets_have_nothing_to_learn_from(tmp_path, capsys):
    assert cli.run_cli(["lsa", "fit", "preset:llama-3.1-8b", "--out", str(tmp_path / "out")]) == 2
    assert "preset:llama-3.1-8b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("left_s", "expected"),
    [
        (1e9, (4096, 8192)),
        (60 * 0.01 * 6144 + 1, (4096, 8192)),
        (60 * 0.01 * 6144 - 1, (2048, 4096)),
        (60 * 0.01 * 1536 - 1, (1024,)),
    ],
)
def test_lengths_are_the_longest_that_leave_enough_documents(left_s, expected):
    assert fitting_lengths((1024, 2048, 4096, 8192), DocumentCost.of({1000: 10.0}), left_s) == expected


def test_a_model_of_one_length_gets_that():
    assert fitting_lengths((1024,), DocumentCost.of({1000: 10.0}), 1) == (1024,)


def test_what_every_document_costs_says_nothing_of_long_ones():
    # 0.7 s at 1K, nearly all of it whatever the length: 1.6 s at 16K.
    cost = DocumentCost.of({1024: 0.7}).and_of(16384, 1.6)
    assert cost.of_length(1024) == pytest.approx(0.7)
    assert cost.of_length(16384) == pytest.approx(1.6)
    assert cost.of_length(32768) == pytest.approx(1.6 + 0.9 * 16384 / 15360)
    assert fitting_lengths((1024, 8192, 16384, 32768), cost, 60 * 2.2) == (16384, 32768)
    # By the seconds a token of the short one, it would have been 1K alone.
    assert fitting_lengths((1024, 8192, 16384, 32768), DocumentCost.of({1024: 0.7}), 60 * 2.2) == (1024,)


def test_a_longer_document_that_took_no_longer_costs_nothing_a_token():
    cost = DocumentCost.of({1024: 2.0}).and_of(4096, 1.5)
    assert (cost.fixed_s, cost.token_s) == (2.0, 0.0)


# -- labels


def test_a_share_is_of_the_chunks_to_choose_from(tmp_path):
    collection = Collection(planted_collection(tmp_path / "data", documents=6))
    found = label_share([collection], LabelChoice(), tau=1)
    # 40 chunks: one of sinks, eight of window, and one golden of the others at each refresh.
    assert found.labelled_fraction == pytest.approx(1 / 31, abs=1e-5)
    assert (found.needing_fraction, found.refreshes) == (1.0, 6 * 6)
    longer = label_share([collection], LabelChoice(), tau=6)
    assert longer.labelled_fraction > found.labelled_fraction
    assert longer.refreshes == 6


def spread_collection(folder, masses, *, stepwise=False, two_layers=False, **changes):
    """Planted documents whose first layer gives these masses to as many chunks at every step.

    ``stepwise``: to other chunks at each step. ``two_layers``: every second chunk is the other layer's.
    """
    info = replace(INFO, samples=3, **changes)
    folder.mkdir()
    documents = []
    for sample in range(3):
        document = planted_document(info, sample)
        n = len(masses)
        documents.append(
            replace(
                document,
                indptr=torch.arange(7, dtype=torch.int32) * n,
                indices=(torch.arange(2, 2 + 6 * n) if stepwise else torch.arange(2, 2 + n).repeat(6)).int(),
                voters=torch.arange(6 * n, dtype=torch.int32) % (2 if two_layers else 1),
                values=torch.tensor(masses).repeat(6).half(),
                rest=torch.zeros((6, 6)).half(),
            )
        )
    size_bytes = write_shard(folder / "shard-00000.safetensors", documents, info)
    infos = [vars(each.info) for each in documents]
    write_manifest(
        folder, info, [{"file": "shard-00000.safetensors", "bytes": size_bytes, "documents": infos}], complete=True
    )
    return Collection(folder)


@pytest.mark.parametrize(
    ("masses", "expected"),
    [
        ([0.5, 0.3], [(0.9, 0.2)]),
        ([0.12, 0.11, 0.05], [(0.9, 0.2), (0.9, 0.1)]),
        ([0.07], [(0.9, 0.2), (0.9, 0.1), (0.9, 0.05)]),
    ],
)
def test_rules_grow_laxer_until_enough_is_needed(tmp_path, masses, expected):
    collection = spread_collection(tmp_path / "data", masses)
    assert [(each.top_p, each.least_mass) for each in choose_labels([collection], tau=1)] == expected


def test_stricter_rules_are_tried_one_after_the_other(tmp_path):
    """Six steps of two chunks each make twelve of 31; those of 0.45 go at 0.5, those of 0.55 never do."""
    collection = spread_collection(tmp_path / "data", [0.45, 0.55], stepwise=True)
    tried = choose_labels([collection], tau=6)
    assert [(each.top_p, each.least_mass) for each in tried] == [(0.9, 0.2), (0.9, 0.3), (0.9, 0.4), (0.9, 0.5)]
    assert [round(31 * each.labelled_fraction) for each in tried] == [12, 12, 12, 6]


def test_labels_that_no_rule_makes_few_are_refused(tmp_path):
    """Two layers read other chunks each, all of their attention on one: twelve of 31 in six steps."""
    collection = spread_collection(tmp_path / "data", [1.0, 1.0], stepwise=True, two_layers=True)
    with pytest.raises(UsageError, match=r"No labels ask for less than 30% of the chunks\..*give longer ones"):
        choose_labels([collection], tau=6)


def test_a_stored_least_mass_bounds_how_lax_a_rule_gets(tmp_path):
    collection = spread_collection(tmp_path / "data", [0.07], least_mass=0.2)
    with pytest.raises(UsageError, match="No refresh needs a chunk"):
        choose_labels([collection], tau=1)


def test_layers_are_those_that_ask_for_chunks(tmp_path):
    collection = Collection(planted_collection(tmp_path / "data", documents=3))
    assert retrieving_layers([collection], collection.info.rule(), tau=1) == (1,), "only layer 1 has masses stored"


# -- the separate commands


def test_the_gate_fails_where_labels_keep_nearly_everything():
    row = {"dense": 0.9, "restricted": 0.9, "share": 1.0, "kept_fraction": 0.3}
    assert gate_failures(row) == []
    (why,) = gate_failures({**row, "kept_fraction": 0.954})
    assert "labels keep 95.4% of the prompts, over 30%" in why
    (why,) = gate_failures({**row, "restricted": 0.8, "share": 0.8889})
    assert "dense keeps 88.9% of its score, under 98%" in why
    (why,) = gate_failures({**row, "dense": 0.0, "restricted": 0.0, "share": None})
    assert "dense answers none of these prompts" in why


def test_calibrate_warns_of_an_indexer_that_keeps_nearly_everything():
    assert warning_of({"kept": MOST_KEPT}) is None
    assert "keeps 96.5% of these prompts" in (warning_of({"kept": 0.965}) or "")


def test_a_hit_rate_counts_what_later_refreshes_find():
    logits = torch.tensor([[1.0, 1.0, -1.0], [1.0, -1.0, 1.0], [1.0, -1.0, 1.0]])
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    one = Refreshes(logits, nothing, ~nothing, nothing, None)
    assert hit_rate([one]) == 0.75
    alone = Refreshes(logits[:1], one.golden[:1], one.within[:1], one.filled[:1], None)
    assert hit_rate([alone]) is None
    assert hit_rate([one, alone]) == 0.75
