"""``lsa collect``: what is asked is written, an interrupted run continues to the same bytes, bad input is refused."""

import json
from dataclasses import replace

import pytest
import torch
from sessions import Single

from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.glue import observing
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.indexers.collection import collect as module
from kvscope.harness.indexers.collection.collect import CollectConfig, collect
from kvscope.harness.indexers.collection.document import document_bytes
from kvscope.harness.indexers.collection.make_document import answer_ids
from kvscope.harness.indexers.collection.reading import Collection
from kvscope.harness.passes.progress import Progress
from kvscope.methods.registry import create_method
from kvscope.tasks import needle
from kvscope.tasks.registry import create_task


class Notes(Progress):
    """Keeps what the user is told."""

    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)

    def end_cell(self, summary):
        self.lines.append(summary)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """A random model never ends an answer: each would take all 128 steps that a needle's may."""
    monkeypatch.setattr(needle, "NEW_TOKENS", 24)


@pytest.fixture
def config(tiny_model):
    return CollectConfig(
        model=tiny_model, tasks=("niah_single_1", "niah_multikey_2"), lengths_tokens=(320, 512), samples=2, seed=77,
        chunk_tokens=16, shard_documents=3, top_p=0.6, least_mass=0.0, device="cpu",
    )  # fmt: skip


def test_every_document_is_there_shortest_first_with_its_answer(config, tmp_path):
    notes = Notes()
    collection = Collection(collect(config, tmp_path / "data", progress=notes))
    assert [each.name for each in collection.documents] == [
        f"{task}/{length}/{sample}"
        for length in (320, 512)
        for task in ("niah_single_1", "niah_multikey_2")
        for sample in (0, 1)
    ]
    assert collection.complete
    assert collection.info.layers == collection.info.label_layers == (0, 1)
    assert collection.info.model_revision.startswith("sha256:")
    assert "8 documents in 3 shards, 0 of them there already; about" in notes.lines[0]
    assert "to write" in notes.lines[0]
    for index, info in enumerate(collection.documents):
        document = collection.load(index)
        assert document.features.shape[:2] == (2, info.prompt_tokens // 16)
        assert len(document.hidden) == 16 + info.n_steps
        assert document.steps.tolist() == list(range(info.n_steps))
        assert info.prompt_tokens + 1 + config_room(info) == info.length_tokens
        assert document.mass.shape == (info.n_steps, -(-info.prompt_tokens // 16))
        assert (document.mass.float().sum(1) <= 2.01).all(), "at most one of each of two layers"
        assert document.indptr[-1] == len(document.indices) == len(document.voters) == len(document.values)
        assert document.rest.shape == (info.n_steps, 2 + 2 * 2), "two layers, two heads each"
        assert (document.votes(collection.info.rule(), collection.info) <= 2).all()


def config_room(info):
    from kvscope.tasks.registry import create_task

    return create_task(info.task).max_new_tokens


def test_an_interrupted_run_continues_to_the_same_bytes(config, tmp_path, monkeypatch):
    whole = collect(config, tmp_path / "whole", progress=Progress())
    made = []
    make = module.make_document

    def stop_in_the_second_shard(*args, **options):
        made.append(1)
        if len(made) == 5:
            raise KeyboardInterrupt
        return make(*args, **options)

    monkeypatch.setattr(module, "make_document", stop_in_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        collect(config, tmp_path / "part", progress=Progress())
    part = Collection(tmp_path / "part")
    assert len(part) == 3
    assert not part.complete
    made.clear()
    monkeypatch.setattr(module, "make_document", lambda *args, **options: made.append(1) or make(*args, **options))
    notes = Notes()
    collect(config, tmp_path / "part", progress=notes)
    assert len(made) == 5, "the first shard is not made again"
    assert "1 of them there already" in notes.lines[0]
    for path in sorted(whole.iterdir()):
        assert path.read_bytes() == (tmp_path / "part" / path.name).read_bytes(), path.name
    made.clear()
    collect(config, tmp_path / "part", progress=Progress())
    assert made == [], "finished: nothing runs"


def test_a_deleted_shard_is_made_again_and_a_truncated_one_is_named(config, tmp_path):
    folder = collect(config, tmp_path / "data", progress=Progress())
    shard = folder / "shard-00001.safetensors"
    before = shard.read_bytes()
    shard.write_bytes(before[:-5])
    with pytest.raises(UsageError, match=r"shard-00001.*is truncated or was changed"):
        collect(config, folder, progress=Progress())
    shard.unlink()
    collect(config, folder, progress=Progress())
    assert shard.read_bytes() == before
    assert len(Collection(folder)) == 8


def test_another_collection_is_not_mixed_in(config, tmp_path):
    folder = collect(replace(config, samples=1), tmp_path / "data", progress=Progress())
    with pytest.raises(UsageError, match="holds another collection: samples is 1 there and 2 here"):
        collect(config, folder, progress=Progress())
    with pytest.raises(UsageError, match="holds another collection: chunk_tokens is 16 there and 32 here"):
        collect(replace(config, samples=1, chunk_tokens=32), folder, progress=Progress())


def test_the_disk_is_checked_before_anything_runs(config, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda folder: 5000)
    monkeypatch.setattr(module, "make_document", lambda *args, **options: pytest.fail("it ran"))
    with pytest.raises(EnvironmentProblem, match=r"needs about .* and the disk of .* has 4\.9 KiB free"):
        collect(config, tmp_path / "data", progress=Progress())


def test_the_estimate_is_an_upper_bound_and_near(config, tmp_path):
    folder = collect(config, tmp_path / "data", progress=Progress())
    collection = Collection(folder)
    real_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    tight_bytes = sum(
        document_bytes(collection.info, prompt_tokens=each.prompt_tokens, n_steps=each.n_steps)
        for each in collection.documents
    )
    assert tight_bytes <= real_bytes < 1.3 * tight_bytes + 20_000


def test_layers_can_be_chosen_and_must_be_managed(config, tmp_path):
    folder = collect(replace(config, layers=(1,), samples=1), tmp_path / "data", progress=Progress())
    info = Collection(folder).info
    assert (info.layers, info.label_layers) == ((1,), (0, 1))
    assert Collection(folder).load(0).hidden.shape[1] == 1
    with pytest.raises(UsageError, match="Layers 7 of model 'tiny' cannot be indexed: kvscope manages 0, 1"):
        collect(replace(config, layers=(0, 7)), tmp_path / "other", progress=Progress())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be 1 or more, got 0"),
        ({"answers": "mine"}, "answers must be own or reference, got 'mine'"),
        ({"chunk_tokens": 0}, "chunk_tokens must be 1 or more"),
        ({"votes": 0}, "votes must be 1 or more"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"least_mass": 1.0}, "least_mass must be 0 or more and below 1"),
        ({"features": "all"}, "features must be stats or tokens, got 'all'"),
        ({"voters": "all"}, "voters must be layer, head, index, got 'all'"),
        ({"tasks": ()}, "At least one task and one length are needed"),
    ],
)
def test_bad_options_get_one_clear_sentence(config, options, message):
    with pytest.raises(UsageError) as caught:
        replace(config, **options)
    assert message in str(caught.value)


def test_more_documents_than_a_file_has_are_refused(config, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"prompt": "red", "answers": "blue"}')
    asked = replace(config, tasks=(f"jsonl:{tmp_path / 'q.jsonl'}",), samples=2)
    with pytest.raises(UsageError, match="Task 'jsonl:q' has 1 prompts, and 2 samples are asked for"):
        collect(asked, tmp_path / "out", progress=Progress())
    assert not (tmp_path / "out").exists()


def test_the_manifest_says_how_labels_were_made(config, tmp_path):
    folder = collect(replace(config, top_p=0.7, votes=2, samples=1), tmp_path / "data", progress=Progress())
    said = json.loads((folder / "manifest.json").read_text())["collection"]
    assert (said["top_p"], said["votes"], said["voters"], said["least_mass"]) == (0.7, 2, "layer", 0.0)
    assert (said["tasks"], said["lengths_tokens"], said["seed"]) == (
        ["niah_single_1", "niah_multikey_2"],
        [320, 512],
        77,
    )


def test_the_answer_fed_is_what_dense_decodes(config, tmp_path):
    """Step by step the states of the own answer are those of dense decode, and no step is beyond its end."""
    collection = Collection(collect(config, tmp_path / "data", progress=Progress()))
    assert collection.info.answers == "own"
    loaded = load_model(config.model, device="cpu")
    for index, info in enumerate(collection.documents[:3]):
        sample = create_task(info.task).build(loaded.tokenizer, length_tokens=info.length_tokens, sample=info.sample,
                                              seed=config.seed)  # fmt: skip
        prompt = prefill(loaded, sample.ids[:-1])
        answer = decode(loaded, create_method("dense"), prompt, sample.ids[-1:],
                        max_new_tokens=sample.max_new_tokens, stop_strings=sample.stop)  # fmt: skip
        assert info.n_steps == len(answer.ids)
        seen = []
        with (
            observing(loaded.model, (1,), lambda layer, hidden_BM, seen=seen: seen.append(hidden_BM[0].clone())),
            Single(loaded, create_method("dense"), prompt, reserve_tokens=info.n_steps) as session,
        ):
            for token in (sample.ids[-1], *answer.ids[:-1]):
                session.step(token)
        states = collection.load(index).hidden[-info.n_steps :, 1]
        torch.testing.assert_close(states, torch.stack(seen).bfloat16(), atol=1e-2, rtol=1e-2)


def test_the_reference_answer_is_fed_on_request_and_is_another_collection(config, tmp_path):
    config = replace(config, samples=1, lengths_tokens=(320,))
    own = Collection(collect(config, tmp_path / "own", progress=Progress()))
    config = replace(config, answers="reference")
    reference = Collection(collect(config, tmp_path / "reference", progress=Progress()))
    assert reference.id != own.id
    loaded = load_model(config.model, device="cpu")
    for info in reference.documents:
        sample = create_task(info.task).build(loaded.tokenizer, length_tokens=320, sample=0, seed=config.seed)
        assert info.n_steps == 1 + len(answer_ids(loaded, sample))
    with pytest.raises(UsageError, match="holds another collection: answers is own there and reference here"):
        collect(config, tmp_path / "own", progress=Progress())


def test_collections_older_than_the_choice_are_of_reference_answers(config, tmp_path):
    folder = collect(replace(config, samples=1, answers="reference"), tmp_path / "data", progress=Progress())
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["collection"]["answers"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    old = Collection(folder)
    assert (len(old), old.info.answers) == (4, "reference")
