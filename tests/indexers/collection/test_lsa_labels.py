"""Labels: masses against stock attention, top-p and votes against plain loops, layouts, unions over an interval."""

import math

import pytest
import torch
from sessions import Single
from tiny_models import loaded_model, prompt_ids, stock_model

from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.collect import CollectConfig, describe
from kvscope.harness.indexers.collection.document import CollectionInfo, Document, DocumentInfo
from kvscope.harness.indexers.collection.label_rule import LabelRule, voter_masses
from kvscope.harness.indexers.collection.make_document import record
from kvscope.harness.indexers.collection.recorder import Recorder
from kvscope.methods.lsa.labels import chunk_mass, chunk_votes, top_p_mask
from kvscope.methods.lsa.layout import ChunkLayout


@pytest.mark.parametrize("n_tokens", [0, 1, 15, 16, 17, 100, 128])
@pytest.mark.parametrize(("sink_tokens", "recency_tokens"), [(0, 0), (4, 10), (17, 33), (1000, 0), (0, 1000)])
def test_every_token_is_in_exactly_one_place(n_tokens, sink_tokens, recency_tokens):
    layout = ChunkLayout(n_tokens=n_tokens, chunk_tokens=16, sink_tokens=sink_tokens, recency_tokens=recency_tokens)
    static = [token for start, end in layout.static_ranges for token in range(start, end)]
    chosen = range(layout.first * 16, layout.last * 16)
    assert sorted([*static, *chosen]) == list(range(n_tokens))
    assert len(static) == layout.static_tokens
    assert layout.n_candidates * 16 == layout.candidate_tokens == len(chosen)
    assert set(range(min(sink_tokens, n_tokens))) <= set(static), "sinks stay"
    assert set(range(max(0, n_tokens - recency_tokens), n_tokens)) <= set(static), "the window stays"
    assert layout.budgeted_chunks(n_tokens) == layout.n_candidates
    assert layout.budgeted_chunks(0) == 0
    for budget in range(0, n_tokens + 1, 7):
        kept = layout.static_tokens + 16 * layout.budgeted_chunks(budget)
        assert kept <= max(budget, layout.static_tokens)


def test_top_p_takes_the_fewest_that_hold_enough():
    mass = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25], [0.05, 0.05, 0.0, 0.9]])
    assert top_p_mask(mass, 0.6).tolist() == [
        [True, True, False, False],
        [True, True, True, False],
        [False, False, False, True],
    ]
    some = torch.rand(40, 31, generator=torch.Generator().manual_seed(1))  # their sums depend on the order
    some[:, ::3] = 0.0
    assert torch.equal(top_p_mask(some, 1.0), some > 0), "what holds nothing is not needed"
    torch.manual_seed(0)
    for row in torch.rand(50, 12):
        for top_p in (0.1, 0.6, 0.95, 1.0):
            taken = top_p_mask(row, top_p)
            assert row[taken].sum() >= top_p * row.sum() - 1e-6
            smallest = row[taken].min()
            assert row[taken].sum() - smallest < top_p * row.sum()
            assert not (row[~taken] > smallest).any()


def test_votes_count_layers_or_heads_and_the_rest_gets_none():
    retrieving = [0.0, 0.9, 0.05, 0.05]  # the last entry is everything that is no chunk of the prompt
    idle = [0.1, 0.0, 0.0, 0.9]
    mass = torch.tensor([[retrieving, idle], [idle, idle]])
    assert chunk_votes(mass, top_p=0.6, voters="head").tolist() == [0, 1, 0]
    assert chunk_votes(mass, top_p=0.6, voters="layer").tolist() == [0, 1, 0]
    assert chunk_votes(mass, top_p=1.0, voters="head").tolist() == [3, 1, 1], "nothing takes no vote"
    assert chunk_votes(mass, top_p=1.0, voters="head", least_mass=0.08).tolist() == [3, 1, 0]
    outvoted = torch.tensor([[retrieving, idle, idle, idle]])
    assert chunk_votes(outvoted, top_p=0.6, voters="layer").tolist() == [0, 0, 0]
    assert chunk_votes(outvoted, top_p=0.6, voters="head").tolist() == [0, 1, 0]
    many = torch.tensor([[[1.0, 0.0]]]).expand(300, 1, 2)
    assert chunk_votes(many, top_p=0.5, voters="layer").tolist() == [255]


def test_mass_adds_up_and_sinks_take_their_share():
    torch.manual_seed(0)
    prompt, other, sink = torch.randn(3, 37), torch.randn(3, 5), torch.randn(3)
    mass = chunk_mass(prompt, other, chunk_tokens=8, sink_logits=sink)
    assert mass.shape == (3, 6)
    torch.testing.assert_close(mass.sum(1), torch.ones(3))
    every = torch.softmax(torch.cat([prompt, other, sink[:, None]], 1), 1)
    for chunk in range(5):
        torch.testing.assert_close(mass[:, chunk], every[:, chunk * 8 : min(37, chunk * 8 + 8)].sum(1))
    torch.testing.assert_close(mass[:, 5], every[:, 37:].sum(1))
    torch.testing.assert_close(chunk_mass(prompt[:, :0], other, chunk_tokens=8), torch.ones(3, 1))


@pytest.mark.parametrize("family", ["llama", "smollm3", "gpt_oss"])
def test_recorded_masses_and_states_are_those_of_the_stock_model(family):
    """The oracle is transformers' own eager attention over the whole sequence at once."""
    loaded, stock = loaded_model(family), stock_model(family)
    config = CollectConfig(tasks=("x",), lengths_tokens=(1,), samples=1, seed=0, chunk_tokens=16, state_tokens=5,
                           top_p=0.6, least_mass=0.0)  # fmt: skip
    info = describe(config, loaded)
    context, fed = prompt_ids(150), prompt_ids(4, seed=8)
    document = record(
        loaded, Recorder(info), info, context, fed, task="t", question_type="t", length_tokens=154, sample=0
    )
    with torch.no_grad():
        out = stock(torch.tensor([[*context, *fed]]), output_attentions=True, output_hidden_states=True)
    for step in range(4):
        masses = []
        for layer in loaded.shape.layers:
            weight = out.attentions[layer][0, :, 150 + step, :150].mean(0)  # heads averaged
            padded = torch.cat([weight, weight.new_zeros(10)]).view(10, 16)
            masses.append(padded.sum(1))
        torch.testing.assert_close(document.mass[step].float(), torch.stack(masses).amax(0), atol=2e-3, rtol=0)
    for row, token in enumerate(range(145, 154)):
        for i, layer in enumerate(info.layers):
            expected = out.hidden_states[layer][0, token]
            torch.testing.assert_close(document.hidden[row, i].float(), expected, atol=2e-2, rtol=2e-2)
        # The stored masses are all of it here: they give the votes that the whole attention gives.
        whole = torch.stack([out.attentions[layer][0, :, 150 + step, :150] for layer in loaded.shape.layers])
        chunks = torch.nn.functional.pad(whole, (0, 10)).unflatten(-1, (10, 16)).sum(-1)
        mass_LQM = torch.cat([chunks, 1 - chunks.sum(-1, keepdim=True)], -1)
        for voters in ("layer", "head"):
            expected = chunk_votes(mass_LQM, top_p=0.6, voters=voters, least_mass=0.02)
            found = document.votes(info.rule(voters=voters, least_mass=0.02), info)[step]
            assert (found - expected.int()).abs().sum() <= 1, "fp16 may move one chunk over the edge"
    assert document.hidden.shape == (5 + 4, len(info.layers), loaded.shape.hidden_size)
    assert document.info == DocumentInfo(
        task="t", question_type="t", length_tokens=154, sample=0, prompt_tokens=150, n_steps=4
    )
    assert document.features.shape == (len(info.layers), 9, 16, info.key_features)
    if family != "llama":
        return
    for i, layer in enumerate(info.layers):  # queries and keys as they are before rotation
        module = stock.model.layers[layer]
        with torch.no_grad():
            x = module.input_layernorm(out.hidden_states[layer][0])
            q, k = module.self_attn.q_proj(x), module.self_attn.k_proj(x)
        torch.testing.assert_close(document.queries[:, i].float(), q[150:], atol=5e-2, rtol=2e-2)
        torch.testing.assert_close(document.features[i].flatten(0, 1).float(), k[:144], atol=5e-2, rtol=2e-2)


def test_recording_changes_nothing():
    loaded = loaded_model("smollm3")
    config = CollectConfig(tasks=("x",), lengths_tokens=(1,), samples=1, seed=0, chunk_tokens=16,
                           top_p=0.6, least_mass=0.0)  # fmt: skip
    recorder = Recorder(describe(config, loaded))
    from lsa_tools import prefilled, run_steps

    from kvscope.methods.registry import create_method

    prompt = prefilled(loaded, prompt_ids(100), recorder)
    tokens = prompt_ids(5, seed=8)
    with Single(loaded, recorder, prompt, reserve_tokens=5) as session:
        recorded = torch.stack([session.step(token) for token in tokens])
    dense, _, _ = run_steps(loaded, create_method("dense"), prompt, tokens)
    assert torch.equal(recorded, dense)


INFO = CollectionInfo(
    model="m", model_revision="r", dtype="float32", hidden_size=1, key_features=4, query_heads=3, head_dim=2,
    kv_bytes_per_token=8, layers=(2,), label_layers=(2, 5), chunk_tokens=16, features="stats", top_p=0.6,
    voters="layer", least_mass=0.01, votes=1, state_tokens=2, tasks=("t",), lengths_tokens=(400,), samples=1, seed=0,
)  # fmt: skip


def random_document(*, n_chunks=20, segments=(5, 1, 9), seed=0, least_mass=0.01):
    """A document of random attention with gaps between its answers, and that attention [R, L, Q, n' + 1]."""
    draws = torch.Generator().manual_seed(seed)
    steps, segment_of, at = [], [], 0
    for segment, n in enumerate(segments):
        steps += range(at, at + n)
        segment_of += [segment] * n
        at += n + 3
    logits = 4 * torch.randn((len(steps), 2, 3, n_chunks + 1), generator=draws)
    mass = torch.softmax(logits, -1).half().float()
    voters = torch.stack([voter_masses(each) for each in mass])
    row, voter, chunk = (voters[:, :, :-1] >= least_mass).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(steps))
    info = DocumentInfo(
        task="t", question_type="t", length_tokens=400, sample=0, prompt_tokens=16 * n_chunks - 3, n_steps=at
    )
    document = Document(
        info=info, features=torch.zeros(1, n_chunks - 1, 3, 4), hidden=torch.arange(2 + at).float()[:, None, None],
        steps=torch.tensor(steps, dtype=torch.int32), segments=torch.tensor(segment_of, dtype=torch.int32),
        indptr=torch.cat([torch.zeros(1), counts.cumsum(0)]).int(), indices=chunk.int(), voters=voter.to(torch.int16),
        values=voters[row, voter, chunk], rest=voters[:, :, -1], mass=torch.zeros(len(steps), n_chunks),
        queries=torch.zeros(at, 1, 4),
    )  # fmt: skip
    return document, mass


@pytest.mark.parametrize("voters", ["layer", "head"])
@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("least_mass", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("layers", [None, (5,)])
def test_stored_masses_give_the_votes_of_the_whole_attention(voters, top_p, least_mass, layers):
    """The dense rule is the oracle; masses under the least are not stored and must not be missed."""
    document, mass = random_document()
    rule = INFO.rule(voters=voters, top_p=top_p, least_mass=least_mass, layers=layers)
    found = document.votes(rule, INFO)
    for row, each in enumerate(mass):
        asked = each if layers is None else each[1:]
        expected = chunk_votes(asked, top_p=top_p, voters=voters, least_mass=least_mass)
        # Rounding decides only where a sum meets top_p exactly.
        assert torch.equal(found[row], expected.int()), f"row {row}"


def test_a_rule_may_not_ask_for_what_was_not_stored():
    assert INFO.rule() == LabelRule(least_mass=0.01)
    assert INFO.rule(top_p=0.9, votes=2).text()["votes"] == 2
    with pytest.raises(UsageError, match=r"stores no mass below 0\.01"):
        INFO.rule(least_mass=0.001)
    with pytest.raises(UsageError, match="Layers 3 were not recorded for labels; the collection has 2, 5"):
        INFO.rule(layers=(3, 5))
    for bad, message in (({"top_p": 0.0}, "top_p"), ({"voters": "all"}, "voters"), ({"votes": 0}, "votes"),
                         ({"least_mass": 1.0}, "least_mass")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            LabelRule(**bad)


@pytest.mark.parametrize("tau", [1, 2, 4, 64])
@pytest.mark.parametrize("least", [1, 2])
def test_a_label_is_the_union_over_the_interval_within_one_answer(tau, least):
    document, _ = random_document()
    rule = INFO.rule(votes=least)
    votes = document.votes(rule, INFO)
    found = document.positives(rule, INFO, tau=tau)
    steps, segments = document.steps.tolist(), document.segments.tolist()
    for row, (step, segment) in enumerate(zip(steps, segments, strict=True)):
        inside = [
            other
            for other, (later, owner) in enumerate(zip(steps, segments, strict=True))
            if owner == segment and step <= later < step + tau
        ]
        assert torch.equal(found[row], (votes[inside] >= least).any(0))
    firsts = [0, 5, 6]
    expected = [row for start, n in zip(firsts, (5, 1, 9), strict=True) for row in range(start, start + n, tau)]
    assert document.refresh_rows(tau).tolist() == expected


def test_states_of_a_row_are_those_before_it():
    document, _ = random_document()
    rows = torch.tensor([0, 3, 14])
    states = document.states(rows, 2)[:, :, 0, 0]
    # State i belongs to the token i - 2 steps after the prompt's last prefilled one; rows 0, 3, 14 are steps 0, 3, 20.
    assert document.steps[14] == 20
    assert states.tolist() == [[0, 1], [3, 4], [20, 21]]
    assert math.prod(states.shape) == 6
