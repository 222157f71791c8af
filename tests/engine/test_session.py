"""Sessions: the same tokens together as alone, whatever comes, leaves, moves or fails."""

import copy
from typing import Any

import pytest
import torch
from sequences import prefilled
from sessions import UNCAPTURED, UncapturedSession, UncapturedStep, new_session
from tiny_models import build_stock, loaded_model, prompt_ids

from kvscope.errors import UsageError
from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.decode_graph import GRAPH
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.models import load_model, wrap_model
from kvscope.harness.engine.session import Session
from kvscope.harness.engine.synthetic import synthetic_prompt
from kvscope.methods.base import union_collectors
from kvscope.methods.dense.method import Dense
from kvscope.methods.registry import create_method
from kvscope.methods.resident import ResidentSequence
from kvscope.methods.step_counters import StepCounters

LSA = "lsa:tau=2,budget_tokens=512,recency_tokens=128,selection=synthetic"


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("preset:tiny", device="cpu")


@pytest.mark.parametrize("graph", ["off", "auto", UNCAPTURED])
@pytest.mark.parametrize("spec", ["dense", "recency", "sliding_window", "quest:budget_tokens=256", LSA])
def test_a_batch_decodes_what_each_sequence_decodes_alone(tiny: LoadedModel, spec: str, graph: Any) -> None:
    fixed = graph == UNCAPTURED  # the step of a CUDA graph, run as it is
    if fixed and spec.startswith("quest"):
        pytest.skip("quest has no step of fixed addresses")
    method = create_method(spec)
    assert method.unsupported(tiny.shape, tiny.device) == []
    prompt = synthetic_prompt(tiny, 1500, mirror=True, collectors=union_collectors([method], tiny.shape.layers), seed=1)
    firsts, n_steps = [5, 77, 200], 5
    alone = [decode(tiny, method, prompt, [first], max_new_tokens=n_steps) for first in firsts]
    with new_session(tiny, graph) as session:
        for _ in firsts:
            session.add(method, prompt, reserve_tokens=n_steps)
        tokens_n, rows = torch.tensor(firsts), []
        for _ in range(n_steps):
            tokens_n = session.step(tokens_n).argmax(-1)
            rows.append(tokens_n.tolist())
        total, recalled_bytes = session.footprint(), session.bytes_recalled()
        backend = session.step_backend
    assert backend.partition(";")[0] == ("eager: the device is cpu" if graph == "auto" else "eager")
    assert [list(column) for column in zip(*rows, strict=True)] == [result.ids for result in alone]
    assert len({tuple(result.ids) for result in alone}) > 1
    # A step of fixed addresses holds spare slots beside what it reads.
    held_bytes = sum(result.footprint_last.kv_bytes for result in alone)
    assert total.kv_bytes == held_bytes or (fixed and spec == LSA and total.kv_bytes > held_bytes)
    assert recalled_bytes == sum(result.bytes_recalled for result in alone)
    assert (recalled_bytes > 0) == (spec == LSA)
    assert total.host_bytes == alone[0].footprint_last.host_bytes
    assert session.members == []


def test_a_graph_that_is_demanded_and_cannot_be_had_is_refused(tiny: LoadedModel) -> None:
    prompt = synthetic_prompt(tiny, 100, mirror=False, seed=1)
    with (
        Session(tiny, decode_graph="on") as session,
        pytest.raises(UsageError, match="the device is cpu"),
    ):
        session.add(Dense(), prompt, reserve_tokens=2)
    assert session.members == []


def test_a_sequence_that_does_not_fit_leaves_the_session_as_it_was(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may end after a sequence was opened, where its addresses are fixed: it must not decode with the others."""
    make_static = ResidentSequence.make_static
    asked: list[ResidentSequence] = []

    def third_fails(self: ResidentSequence, counters: StepCounters) -> None:
        asked.append(self)
        if len(asked) == 3:
            raise torch.OutOfMemoryError("no room for it")
        make_static(self, counters)

    monkeypatch.setattr(ResidentSequence, "make_static", third_fails)
    prompt = synthetic_prompt(tiny, 700, mirror=False, seed=1)
    with new_session(tiny, UNCAPTURED) as session:
        session.add(Dense(), prompt, reserve_tokens=2)
        session.add(Dense(), prompt, reserve_tokens=2)
        held_bytes = session.footprint().kv_bytes
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            session.add(Dense(), prompt, reserve_tokens=2)
        assert [member.cache for member in session.members] == asked[:2]
        assert asked[2].pool.n_bytes == 0
        assert session.step(torch.tensor([5, 77])).shape[0] == 2
        assert session.footprint().kv_bytes == held_bytes > 0


def session_of(step: type[UncapturedStep]) -> type[Session]:
    """A session that takes such a step for a graph."""
    return type("_Session", (Session,), {"graph_step": step})


class _Refuses(UncapturedStep):
    """As ``auto`` on a GPU meets a model that reads back inside its forward."""

    def _capture(self) -> None:
        raise RuntimeError("it reads back")


def test_a_forward_that_cannot_be_captured_opens_all_anew(tiny: LoadedModel) -> None:
    prompt = synthetic_prompt(tiny, 700, mirror=False, seed=1)
    alone = decode(tiny, Dense(), prompt, [9], max_new_tokens=4)
    with session_of(_Refuses)(tiny, decode_graph="auto") as session:
        opened = [session.add(Dense(), prompt, reserve_tokens=4) for _ in range(3)]
        first = [member.cache for member in opened]
        tokens_n, rows = torch.tensor([9, 9, 9]), []
        for _ in range(4):
            tokens_n = session.step(tokens_n).argmax(-1)
            rows.append(tokens_n.tolist())
        assert session.members == opened
        assert not {id(member.cache) for member in opened} & {id(cache) for cache in first}
        assert session.step_backend == "eager: the model's step cannot be captured (it reads back)"
    assert rows == [[token] * 3 for token in alone.ids]
    with session_of(_Refuses)(tiny, decode_graph="on") as session:
        session.add(Dense(), prompt, reserve_tokens=4)
        with pytest.raises(RuntimeError, match="reads back"):
            session.step([9])


def test_pages_that_grow_are_captured_again(tiny: LoadedModel) -> None:
    """Without a GPU: what stands in for the graph runs the forward again, at the addresses of its capture."""
    captures = []

    class Counts(UncapturedStep):
        backend = GRAPH

        def _capture(self) -> None:
            super()._capture()
            captures.append(len(self._members))

    prompt, n_steps = synthetic_prompt(tiny, 6 * 64 - 3, mirror=False, seed=1), 8
    alone = [decode(tiny, Dense(), prompt, [first], max_new_tokens=n_steps) for first in (5, 77)]
    with session_of(Counts)(tiny, decode_graph="on") as session:
        session.add(Dense(), prompt, reserve_tokens=0)
        session.add(Dense(), prompt, reserve_tokens=0)
        tokens_n, rows = torch.tensor([5, 77]), []
        for _ in range(n_steps):
            tokens_n = session.step(tokens_n).argmax(-1)
            rows.append(tokens_n.tolist())
        assert session.step_backend == "cuda graph"
    assert [list(column) for column in zip(*rows, strict=True)] == [result.ids for result in alone]
    assert captures == [2, 2]  # before the first step, and where the fourth token found no room


class _FullWhileCapturing(UncapturedStep):
    def _capture(self) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


class _FullInOtherWords(UncapturedStep):
    def _capture(self) -> None:
        raise RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize("step", [_FullWhileCapturing, _FullInOtherWords])
def test_memory_that_ends_in_a_capture_is_no_reason_to_go_eager(tiny: LoadedModel, step: type[UncapturedStep]) -> None:
    """A smaller batch is tried then; an eager one of this size would be another measurement."""
    prompt = synthetic_prompt(tiny, 100, mirror=False, seed=1)
    with session_of(step)(tiny, decode_graph="auto") as session:
        session.add(Dense(), prompt, reserve_tokens=2)
        with pytest.raises(RuntimeError, match="out of memory"):
            session.step([1])
    assert session.members == []


# -- prompts, methods and positions may differ

MIXED = [
    ("dense", 150),
    ("sliding_window:window=20", 61),
    ("lsa:selection=synthetic,budget_fraction=0.5,tau=3,chunk_tokens=16,recency_tokens=20", 160),
    ("recency:recency_tokens=40", 0),
]


def run_alone(loaded: LoadedModel, spec: str, prompt: Any, tokens: list[int], graph: Any) -> tuple[torch.Tensor, Any]:
    """Logits of every step, and the record of the resident set."""
    with new_session(loaded, graph) as session:
        member = session.add(create_method(spec), prompt, reserve_tokens=len(tokens))
        logits = torch.stack([session.step([token])[0].clone() for token in tokens])
        return logits, member.cache.residency()


@pytest.mark.parametrize("graph", ["off", UNCAPTURED])
@pytest.mark.parametrize("family", ["llama", "smollm3", "gemma3", "afmoe", "gpt_oss"])
def test_sequences_of_any_prompt_and_method_step_together(family: str, graph: Any) -> None:
    """On models with sliding-window layers too, past their window."""
    if (family, graph) == ("gpt_oss", UNCAPTURED):
        pytest.skip("its experts are no step of fixed addresses")
    loaded = loaded_model(family)
    kinds = MIXED if graph == UNCAPTURED else [*MIXED, ("quest:budget_tokens=48,dense_layers=0", 100)]
    prompts = [prefilled(loaded, prompt_ids(n, seed=n), [spec]) for spec, n in kinds]
    tokens = [prompt_ids(26, seed=100 + index) for index in range(len(kinds))]
    with new_session(loaded, graph) as session:
        for (spec, _), prompt in zip(kinds, prompts, strict=True):
            session.add(create_method(spec), prompt, reserve_tokens=26)
        together = torch.stack([session.step(list(step)).clone() for step in zip(*tokens, strict=True)], 1)
    for index, (spec, _) in enumerate(kinds):
        alone, _ = run_alone(loaded, spec, prompts[index], tokens[index], graph)
        torch.testing.assert_close(together[index], alone, atol=5e-5, rtol=0)


@pytest.mark.parametrize("graph", ["off", UNCAPTURED])
def test_sequences_come_and_leave_between_steps(graph: Any) -> None:
    loaded = loaded_model("afmoe")
    specs = ["dense", MIXED[2][0], "sliding_window:window=20"]  # a refresh falls due where a sequence comes
    prompts = [prefilled(loaded, prompt_ids(n, seed=n), specs) for n in (150, 160, 90)]
    tokens = [prompt_ids(12, seed=100 + index) for index in range(3)]
    alone = [run_alone(loaded, *each, "off") for each in zip(specs, prompts, tokens, strict=True)]
    found: list[list[torch.Tensor]] = [[], [], []]

    def steps(session: Session, present: list[int], n: int) -> None:
        for _ in range(n):
            logits_nV = session.step([tokens[index][len(found[index])] for index in present]).clone()
            for index, logits_V in zip(present, logits_nV, strict=True):
                found[index].append(logits_V)

    with new_session(loaded, graph) as session:
        first, second = (
            session.add(create_method(specs[i]), prompts[i], reserve_tokens=12 if i == 0 else 0) for i in (0, 1)
        )
        steps(session, [0, 1], 3)
        session.add(create_method(specs[2]), prompts[2], reserve_tokens=12)
        steps(session, [0, 1, 2], 6)
        session.remove(first)
        assert first.cache.pool.n_bytes == 0
        steps(session, [1, 2], 3)
        assert second.cache.residency() == alone[1][1]
        session.remove(second)
        steps(session, [2], 3)
        assert (len(session.members), session.captures) == (1, 0)
    for index in range(3):
        torch.testing.assert_close(torch.stack(found[index]), alone[index][0][: len(found[index])], atol=5e-5, rtol=0)


def test_one_that_cannot_be_a_graph_makes_the_session_eager_and_the_others_go_on() -> None:
    loaded = loaded_model("llama")
    specs = ["dense", "recency:recency_tokens=40", "quest:budget_tokens=48,dense_layers=0"]
    prompt, tokens = prefilled(loaded, prompt_ids(150), specs), prompt_ids(6, seed=8)
    alone = [run_alone(loaded, spec, prompt, tokens, "off")[0] for spec in specs]
    with UncapturedSession(loaded, decode_graph="auto") as session:
        fed = session.add(create_method(specs[0]), prompt, reserve_tokens=6)
        before = [session.step(tokens[:1])[0].clone()]
        assert session.step_backend == "eager"
        unfed = session.add(create_method(specs[1]), prompt, reserve_tokens=6)
        held = fed.cache, unfed.cache
        session.add(create_method(specs[2]), prompt, reserve_tokens=6)
        assert session.step_backend == "eager: a step that chooses blocks needs the kernels, which a GPU has"
        assert (fed.cache is held[0], unfed.cache is held[1]) == (True, False)
        later = [session.step([tokens[step + 1], tokens[step], tokens[step]]).clone() for step in range(5)]
    torch.testing.assert_close(torch.stack([*before, *(row[0] for row in later)]), alone[0], atol=2e-5, rtol=0)
    for index in (1, 2):
        torch.testing.assert_close(torch.stack([row[index] for row in later]), alone[index][:5], atol=2e-5, rtol=0)


def test_each_sequence_observes_its_own_layers_and_its_own_rows() -> None:
    loaded = loaded_model("llama")
    prompt = prefilled(loaded, prompt_ids(40), ["dense"])

    class Watching(Dense):
        def __init__(self, layers: tuple[int, ...]) -> None:
            super().__init__()
            self.layers, self.seen = layers, {}

        def observed_layers(self, shape: Any) -> tuple[int, ...]:
            return self.layers

        def open(self, *arguments: Any, **options: Any) -> Any:
            sequence = super().open(*arguments, **options)
            sequence.observe = lambda layer, hidden_BM: self.seen.setdefault(layer, hidden_BM.clone())
            return sequence

    def seen_of(layers: list[tuple[int, ...]], tokens: list[int]) -> list[dict[int, torch.Tensor]]:
        methods = [Watching(each) for each in layers]
        with Session(loaded) as session:
            for method in methods:
                session.add(method, prompt, reserve_tokens=1)
            session.step(tokens)
        assert not any(layer._forward_pre_hooks for layer in loaded.model.model.layers)
        return [method.seen for method in methods]

    together = seen_of([(0, 3), (), (1, 3)], [5, 6, 7])
    assert [sorted(seen) for seen in together] == [[0, 3], [], [1, 3]]
    for seen, token in ((together[0], 5), (together[2], 7)):
        (alone,) = seen_of([tuple(seen)], [token])
        for layer, hidden_BM in seen.items():
            torch.testing.assert_close(hidden_BM, alone[layer], atol=1e-5, rtol=0)


def test_host_bytes_count_once_for_each_mirror() -> None:
    loaded = loaded_model("llama")
    spec = MIXED[2][0]
    one, other = (prefilled(loaded, prompt_ids(n), [spec]) for n in (160, 90))
    with Session(loaded) as session:
        for prompt in (one, one, other):
            session.add(create_method(spec), prompt, reserve_tokens=1)
        assert session.footprint().host_bytes == one.host_bytes + other.host_bytes
        assert session.footprint().kv_bytes == sum(m.cache.footprint().kv_bytes for m in session.members)


def test_wrong_calls_are_refused(tiny: LoadedModel) -> None:
    prompt = synthetic_prompt(tiny, 50, mirror=False, seed=1)
    with Session(tiny) as session:
        session.add(Dense(), prompt, reserve_tokens=1)
        with pytest.raises(ValueError, match="2 tokens for 1 sequences"):
            session.step([1, 2])


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["dense", "recency", LSA])
def test_captured_sequences_decode_what_eager_ones_do(spec: str) -> None:
    loaded = load_model("preset:tiny", device="cuda")
    method = create_method(spec)
    assert method.unsupported(loaded.shape, loaded.device) == []
    prompt = synthetic_prompt(loaded, 1500, mirror=True, collectors=union_collectors([method], loaded.shape.layers))
    found = {}
    for graph in ("off", "on"):
        with Session(loaded, decode_graph=graph) as session:
            for _ in range(3):
                session.add(method, prompt, reserve_tokens=8)
            tokens_n, rows = torch.tensor([5, 77, 200], device="cuda"), []
            for _ in range(8):
                tokens_n = session.step(tokens_n).argmax(-1)
                rows.append(tokens_n.tolist())
            found[graph] = rows, session.bytes_recalled()
            assert session.step_backend == ("cuda graph" if graph == "on" else "eager")
    assert found["on"] == found["off"]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "afmoe"])
def test_a_mixed_session_is_captured_anew_when_sequences_come_and_leave(family: str) -> None:
    loaded = wrap_model(copy.deepcopy(build_stock(family)).to("cuda"), None, page_tokens=16)
    prompts = [prefilled(loaded, prompt_ids(n, seed=n), [spec]) for spec, n in MIXED]
    tokens, found = [prompt_ids(9, seed=100 + index) for index in range(len(MIXED))], {}
    for graph in ("off", "on"):
        rows = []
        with Session(loaded, decode_graph=graph) as session:
            members = [
                session.add(create_method(spec), prompt, reserve_tokens=9)
                for (spec, _), prompt in zip(MIXED[:3], prompts, strict=False)
            ]
            rows += [session.step([tokens[i][step] for i in (0, 1, 2)]).cpu() for step in range(3)]
            session.add(create_method(MIXED[3][0]), prompts[3], reserve_tokens=9)
            rows += [session.step([tokens[i][step] for i in range(4)]).cpu() for step in range(3, 6)]
            session.remove(members[1])
            rows += [session.step([tokens[i][step] for i in (0, 2, 3)]).cpu() for step in range(6, 9)]
            assert session.captures == (3 if graph == "on" else 0)
        found[graph] = torch.cat(rows)
    torch.testing.assert_close(found["on"], found["off"], atol=1e-3, rtol=0)
