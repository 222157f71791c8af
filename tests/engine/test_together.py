"""One launch a layer for sequences of every method: the tokens, choices, reads and bytes of each alone.

On a CPU the kernels run in Triton's interpreter; on a GPU steps are captured.
"""

import pytest
import torch
from lsa_tools import random_indexer
from sessions import TOGETHER, RecordedTogetherSession, TogetherSession, new_session

from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.session import Session
from kvscope.harness.engine.synthetic import synthetic_prompt
from kvscope.methods import attention
from kvscope.methods.base import union_collectors
from kvscope.methods.dsa import method as dsa
from kvscope.methods.dsa.lightning import lightning_scores
from kvscope.methods.registry import create_method

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECS = [
    "dense",
    "recency:budget_fraction=0.3",
    "random:budget_fraction=0.6",
    "sliding_window:sinks=4,window=64",
    "pyramidkv:budget_tokens=96,beta=4",
    "quest:budget_tokens=96",
    "moba:budget_tokens=128,block_tokens=32",
    "msa:budget_tokens=128,block_tokens=32",
    "dsa:selection=synthetic,budget_tokens=48",
    "lsa:tau=2,budget_tokens=128,recency_tokens=32,selection=synthetic,chunk_tokens=32",
]
N_STEPS = 3


@pytest.fixture(scope="module")
def tiny():
    return load_model("preset:tiny", device=DEVICE, dtype="float32")


def prompts_of(loaded, methods, lengths):
    assert not [reason for method in methods for reason in method.unsupported(loaded.shape, loaded.device)]
    collectors = [union_collectors(methods, loaded.shape.layers) for _ in lengths]
    return [
        synthetic_prompt(loaded, n_tokens, mirror=True, collectors=each, seed=n_tokens)
        for n_tokens, each in zip(lengths, collectors, strict=True)
    ]


def together(loaded, pairs, *, n_steps=N_STEPS, first=5):
    """Decode (method, prompt) pairs in one session; return tokens, last footprints and residencies of each."""
    session = Session(loaded, decode_graph="on") if DEVICE == "cuda" else new_session(loaded, TOGETHER)
    with session:
        members = [session.add(method, prompt, reserve_tokens=n_steps) for method, prompt in pairs]
        tokens_n = torch.full((len(pairs),), first, device=loaded.device)
        rows, footprints = [], []
        for _ in range(n_steps):
            tokens_n = session.step(tokens_n).argmax(-1)
            rows.append(tokens_n.tolist())
            footprints.append([member.cache.footprint() for member in members])
        assert session._rows.batch is not None
        scored = [member.cache.scored() for member in members]
        assert all(total is None or bool(total.isfinite()) for total in scored)
        residencies = [member.cache.residency() for member in members]
    ids = [list(column) for column in zip(*rows, strict=True)]
    return ids, footprints, residencies


def step_rows_session(loaded, *, rows):
    if DEVICE == "cuda":
        return Session(loaded, decode_graph="on", step_rows=rows)
    return TogetherSession(loaded, decode_graph="on", step_rows=rows)


def without_ties(q_XIE, k_TE, weight_XI):
    scores = lightning_scores(q_XIE, k_TE, weight_XI)
    return scores - 1e-5 * torch.arange(scores.shape[-1], device=scores.device)


@pytest.mark.slow
def test_every_method_and_two_prompts_in_one_step(tiny, monkeypatch):
    # Keys that no index head likes score 0 alike; which of them a CPU's top-k takes depends on how many there are.
    monkeypatch.setattr(dsa, "lightning_scores", without_ties)
    methods = [create_method(spec) for spec in SPECS]
    prompts = prompts_of(tiny, methods, (220, 251))
    pairs = [(method, prompts[0]) for method in methods]
    pairs += [(method, prompts[1]) for method in methods if method.name not in ("dense", "recency", "random")]
    ids, footprints, residencies = together(tiny, pairs)
    for row, (method, prompt) in enumerate(pairs):
        alone = decode(tiny, method, prompt, [5], max_new_tokens=N_STEPS, stop_at_eos=False)
        assert ids[row] == alone.ids, method.label
        last = footprints[-1][row]
        if method.name != "lsa":  # a step of fixed addresses holds tables and spare slots
            assert last == alone.footprint_last, method.label
        read_bytes = [each[row].bytes_read_per_step for each in footprints]
        assert sum(read_bytes) / N_STEPS == pytest.approx(alone.footprint_mean.bytes_read_per_step, abs=1), method.label
        if alone.residency is not None:
            assert residencies[row] == alone.residency
    assert len({tuple(each) for each in ids}) > 4  # methods differ: what one reads reaches no other


@pytest.mark.slow
def test_with_as_many_rows_in_every_step_a_sequence_has_the_same_bits_in_any(tiny, monkeypatch):
    """Alone, or with others of other methods and prompts, some of which attend by themselves (packed pages)."""
    monkeypatch.setattr(dsa, "lightning_scores", without_ties)
    methods = [create_method(spec) for spec in (*SPECS, "dense:kv=int8")]
    prompts = prompts_of(tiny, methods, (220, 251))
    pairs = [(method, prompt) for method in methods for prompt in prompts]

    def logits(some):
        with step_rows_session(tiny, rows=32) as session:
            for method, prompt in some:
                session.add(method, prompt, reserve_tokens=N_STEPS)
            return torch.stack([session.step([5 + step] * len(some)).clone() for step in range(N_STEPS)])

    every = logits(pairs)
    assert every.shape[1] == len(pairs)
    for b, pair in enumerate(pairs):
        alone = decode(tiny, *pair, [5, 6, 7], max_new_tokens=1, stop_at_eos=False)
        assert int(every[-1, b].argmax()) == alone.ids[0], pair[0].label
    for some in ([0], [1], [7, 0], [len(pairs) - 1], [20, 3, 21], list(range(5, 14))):
        assert torch.equal(logits([pairs[b] for b in some]), every[:, some]), some


@pytest.mark.parametrize("spec", ["moba:block_tokens=32", "msa:block_tokens=32", "dsa:selection=synthetic"])
def test_what_a_query_chooses_does_not_depend_on_how_many_others_choose_or_of_how_much(tiny, spec):
    """A longer prompt's budget is larger. Many keys have the same score under dsa: no head likes them."""
    method = create_method(spec)
    prompts = prompts_of(tiny, [method], (700, 2700))
    plans = [method.blocks(prompt.n_tokens) for prompt in prompts]
    assert plans[0].n_blocks < plans[1].n_blocks

    def logits(some):
        with step_rows_session(tiny, rows=2) as session:
            for prompt in some:
                session.add(method, prompt, reserve_tokens=2)
            return torch.stack([session.step([5 + step] * len(some)).clone() for step in range(2)])

    both = logits(prompts)
    for b, prompt in enumerate(prompts):
        assert torch.equal(logits([prompt])[:, 0], both[:, b])


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="steps are captured there")
def test_a_step_done_again_without_its_python_reads_what_is_there_then(tiny, monkeypatch):
    """As a CUDA graph is replayed: tokens, places, counts, choices and tables are those of each step, also of one that
    outgrew its room and was captured again, and of packed pages, which attend beside the others and fill up."""
    monkeypatch.setattr(dsa, "lightning_scores", without_ties)
    specs = [spec for spec in SPECS if not spec.startswith(("recency", "random", "pyramidkv"))]
    specs += ["dense:kv=int8", f"{SPECS[-1]},kv=int8"]
    methods = [create_method(spec) for spec in specs]
    [prompt] = prompts_of(tiny, methods, (251,))
    n_steps = 6

    def stepped(session, some, *, reserve_tokens):
        with session:
            for method in some:
                session.add(method, prompt, reserve_tokens=reserve_tokens)
            return torch.stack([session.step([5 + step] * len(some)).clone() for step in range(n_steps)])

    alone = [stepped(Session(tiny), [method], reserve_tokens=n_steps)[:, 0] for method in methods]
    monkeypatch.setattr(attention, "_kernel_reads", lambda query, store: True)
    session = RecordedTogetherSession(tiny, decode_graph="on", step_rows=16)
    together = stepped(session, methods, reserve_tokens=2)
    assert session.captures > 1
    for b, method in enumerate(methods):
        torch.testing.assert_close(together[:, b], alone[b], atol=1e-5, rtol=0, msg=method.label)


def test_more_sequences_than_rows_are_steps_of_twice_as_many(tiny):
    method = create_method("dense")
    [prompt] = prompts_of(tiny, [method], (64,))
    with step_rows_session(tiny, rows=2) as session:
        for _ in range(3):
            session.add(method, prompt, reserve_tokens=1)
        assert session._rows.n_rows == 4
        logits = session.step([5, 6, 7])
    assert logits.shape[0] == 3
    alone = decode(tiny, method, prompt, [6], max_new_tokens=1, stop_at_eos=False)
    assert int(logits[1].argmax()) == alone.ids[0]


def test_a_least_share_fills_up_in_a_shared_step(tiny, tmp_path):
    """No score of random weights reaches the threshold, so that both hold the best of them, each as many as it asks."""
    folder = random_indexer(tmp_path / "indexer", tiny.shape, chunk_tokens=32)
    options = {"name": "lsa", "indexer": str(folder), "recency_tokens": 32, "tau": 2, "threshold": 0.99}
    methods = [create_method({**options, "least_tokens": least}) for least in (128, 192)]
    [prompt] = prompts_of(tiny, methods, (300,))
    ids, _, residencies = together(tiny, [(method, prompt) for method in methods])
    for row, (method, least) in enumerate(zip(methods, (128, 192), strict=True)):
        alone = decode(tiny, method, prompt, [5], max_new_tokens=N_STEPS, stop_at_eos=False)
        assert ids[row] == alone.ids
        assert residencies[row] == alone.residency
        assert least - 32 < min(residencies[row].resident_tokens) <= least


def test_a_block_that_fills_up_is_chosen_from_the_next_step_on(tiny):
    methods = [create_method("quest:budget_tokens=64"), create_method("moba:budget_tokens=64,block_tokens=16")]
    [prompt] = prompts_of(tiny, methods, (156,))
    pairs = [(method, prompt) for method in methods]
    ids, _, _ = together(tiny, pairs, n_steps=6)
    for row, (method, _) in enumerate(pairs):
        alone = decode(tiny, method, prompt, [5], max_new_tokens=6, stop_at_eos=False)
        assert ids[row] == alone.ids, method.label


@pytest.mark.parametrize("spec", SPECS if DEVICE == "cuda" else ["msa:budget_tokens=192,block_tokens=64", "dense"])
def test_sequences_leave_until_one_is_left_and_go_past_what_was_reserved(tiny, spec, monkeypatch):
    """The last one attends by itself, not with rows of those that left; what grows is captured anew."""
    monkeypatch.setattr(dsa, "lightning_scores", without_ties)
    method = create_method(spec)
    [prompt] = prompts_of(tiny, [method], (250,))
    n_steps = 8
    alone = decode(tiny, method, prompt, [5], max_new_tokens=n_steps, stop_at_eos=False)
    session = Session(tiny, decode_graph="on") if DEVICE == "cuda" else new_session(tiny, TOGETHER)
    with session:
        members = [session.add(method, prompt, reserve_tokens=3) for _ in range(3)]
        ids, tokens = [], [5, 5, 5]
        for step in range(n_steps):
            if step in (2, 4):
                session.remove(members.pop(0))
                tokens = tokens[1:]
            tokens = session.step(tokens).argmax(-1).tolist()
            ids.append(tokens[-1])
        assert session.attends_together == (len(members) > 1)
    assert ids == alone.ids
