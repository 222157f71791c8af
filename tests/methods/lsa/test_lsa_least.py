"""A least share of a threshold: filled up by the best of the others, displacing nothing, wherever a cap works."""

import pytest
import torch
from lsa_tools import prefilled, random_indexer, run_steps
from tiny_models import loaded_model, prompt_ids

from kvscope.methods.kernels.select.kernel import empty_selection
from kvscope.methods.lsa.indexer_files import indexer_folder, read_indexer_config
from kvscope.methods.lsa.selection import Rule
from kvscope.methods.registry import create_method

N_TOKENS = 402
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def filled(scores, *, threshold, n_least, n_most):
    """By plain lists: what reaches the threshold, then the best of the others, in order among equals."""
    order = sorted(range(len(scores)), key=lambda chunk: (-scores[chunk], chunk))
    reached = [chunk for chunk in order if scores[chunk] >= threshold]
    others = [chunk for chunk in order if scores[chunk] < threshold]
    kept = reached + others[: max(0, n_least - len(reached))]
    return sorted(kept[:n_most])


@pytest.mark.parametrize("n_most", [None, 0, 7, 30])
@pytest.mark.parametrize("n_least", [0, 5, 20, 60])
@pytest.mark.parametrize("shift", [-9.0, -1.5, 0.0, 9.0])
def test_the_fill_is_the_plain_formula(n_least, n_most, shift):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(60, generator=generator).mul(4).round().div(4) + shift  # with equal ones
        found = Rule(threshold=0.5, n_least=n_least, n_most=n_most).of_logits(scores).tolist()
        assert found == filled(scores.tolist(), threshold=0.0, n_least=n_least, n_most=n_most)


def test_what_reaches_the_threshold_is_never_displaced_and_nothing_is_added_to_enough():
    scores = torch.tensor([-1.0, 2.0, -0.5, 0.0, -0.5])
    assert Rule(threshold=0.5).of_logits(scores).tolist() == [1, 3]
    assert Rule(threshold=0.5, n_least=2).of_logits(scores).tolist() == [1, 3]
    assert Rule(threshold=0.5, n_least=3).of_logits(scores).tolist() == [1, 2, 3], "equal scores in order"
    assert Rule(threshold=0.5, n_least=5).of_logits(scores).tolist() == [0, 1, 2, 3, 4]
    assert Rule(threshold=0.5, n_least=4, n_most=1).of_logits(scores).tolist() == [1], "the cap wins"


def test_attention_is_filled_up_alike():
    mass, rest = torch.tensor([0.1, 0.4, 0.05, 0.25]), torch.tensor(0.2)
    assert Rule(threshold=0.8, n_least=2).of_mass(mass, rest).tolist() == [1, 3]
    assert Rule(threshold=0.8, n_least=3).of_mass(mass, rest).tolist() == [0, 1, 3]
    assert Rule(threshold=0.1, n_least=1).of_mass(mass, rest).tolist() == [1]
    assert Rule(threshold=0.1, n_least=3, n_most=2).of_mass(mass, rest).tolist() == [1, 3]


@pytest.mark.parametrize("rule", [{}, {"cap_tokens": 120}, {"cap_tokens": 90}])
def test_the_kernels_fill_up_what_torch_fills_up(tmp_path, rule):
    """The kernel in Triton's interpreter here, on a GPU as it is; no score reaches the threshold, then some do."""
    loaded = loaded_model("smollm3")
    folder = random_indexer(tmp_path / "indexer", loaded.shape, chunk_tokens=4, key_dim=16)
    method = create_method(
        {"name": "lsa", "indexer": str(folder), "recency_tokens": 20, "least_tokens": 100, "threshold": 0.9, **rule}
    )
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), method, chunk_tokens=64)
    selector = method.open(prompt, DEVICE)._selector
    layout = method.layout(N_TOKENS)
    n_kept = layout.budgeted_chunks(min(100, rule.get("cap_tokens", 100)))
    selector.kernel_reasons = []
    logits_n = selector.logits().amax(0)
    found = selector.choose().tolist()
    assert found == logits_n.argsort(descending=True, stable=True)[:n_kept].sort().values.tolist()
    for reached in (0, n_kept // 2):
        selector._threshold = logits_n.sort(descending=True).values[reached : reached + 1].clone()
        out = empty_selection(len(logits_n), len(logits_n), DEVICE)
        assert selector.choose_into(out) == int(out.n) == n_kept
        assert out.chunks_K[:n_kept].tolist() == found
        assert out.wanted_n.nonzero()[:, 0].tolist() == found


def resident(method, loaded, decode_graph):
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), method, chunk_tokens=64)
    logits, record, _ = run_steps(loaded, method, prompt, prompt_ids(8, seed=8), decode_graph=decode_graph)
    return logits, record.resident_tokens


def test_a_captured_step_fills_up_as_an_eager_one(tmp_path):
    """From the option or from the indexer; never fewer tokens than whole chunks of it, at every refresh."""
    loaded = loaded_model("smollm3")
    sizes = {"chunk_tokens": 4, "lookback_tokens": 3}
    plain = random_indexer(tmp_path / "plain", loaded.shape, **sizes)
    stored = random_indexer(tmp_path / "stored", loaded.shape, **sizes, least_tokens=90, least_fraction=0.4)
    options = {"name": "lsa", "recency_tokens": 20, "tau": 2, "threshold": 0.9}
    by_indexer = create_method({**options, "indexer": str(stored)})
    by_option = create_method({**options, "indexer": str(plain), "least_tokens": 160})
    eager, kept = resident(by_indexer, loaded, "off")
    captured, same = resident(by_indexer, loaded, "uncaptured")
    assert set(kept) == set(same)
    assert 160 - 4 < min(kept) == max(kept) <= 160
    torch.testing.assert_close(captured, eager, atol=1e-5, rtol=0)
    again, kept_by_option = resident(by_option, loaded, "off")
    assert kept_by_option == kept
    torch.testing.assert_close(again, eager, atol=1e-6, rtol=0)
    assert by_indexer.effective_config(N_TOKENS, loaded.shape)["least_tokens"] == 160
    assert by_indexer.effective_config(4000, loaded.shape)["least_tokens"] == 1600


def test_nil_and_none_are_what_there_was_before(tmp_path):
    loaded = loaded_model("smollm3")
    plain = random_indexer(tmp_path / "plain", loaded.shape, chunk_tokens=4)
    stored = random_indexer(tmp_path / "stored", loaded.shape, chunk_tokens=4, least_fraction=0.4)
    options = {"name": "lsa", "recency_tokens": 20, "tau": 2}
    before, kept = resident(create_method({**options, "indexer": str(plain)}), loaded, "off")
    for indexer, least in (
        (plain, {"least_fraction": 0.0}),
        (plain, {"least_tokens": 0}),
        (stored, {"least_tokens": 0}),
    ):
        method = create_method({**options, "indexer": str(indexer), **least})
        assert "least_tokens" not in method.effective_config(N_TOKENS, loaded.shape)
        logits, same = resident(method, loaded, "off")
        assert torch.equal(logits, before)
        assert same == kept


def test_bytes_are_predicted_with_what_is_filled_up(tmp_path):
    loaded = loaded_model("smollm3")
    folder = random_indexer(tmp_path / "indexer", loaded.shape, chunk_tokens=4, kept_fraction=0.01)

    def predicted(**bounds):
        method = create_method({"name": "lsa", "indexer": str(folder), "recency_tokens": 20, **bounds})
        return method.predict(loaded.shape, N_TOKENS).kv_bytes, method.is_noop(N_TOKENS, loaded.shape)

    at_budget = predicted(budget_fraction=0.5)
    assert predicted(least_fraction=0.5) == at_budget
    assert predicted(least_fraction=0.8, cap_fraction=0.5) == at_budget, "the cap wins"
    assert predicted()[0] < at_budget[0]
    assert predicted(least_fraction=1)[1], "it keeps everything"


def test_the_shipped_indexers_are_as_they_were():
    for name in ("reference", "reference-chunk64", "reference-chunk256"):
        config = read_indexer_config(indexer_folder(name))
        assert (config.least_tokens, config.least_fraction, config.least(262_144)) == (None, None, None)
