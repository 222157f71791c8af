"""One matrix over every registered method. A method added to the registry is tested here without a line more.

What it holds them to: evicting equals masking, bytes predicted equal bytes measured from outside, the result differs
from dense, and no registered method but dense is a no-op at the lengths of the demo.
"""

import functools
import gc
import json
from pathlib import Path

import pytest
import torch
from masked import masking
from sequences import assert_predicted, errors_of_evicting, prefilled
from sessions import Single, side_by_side
from tiny_models import build_stock, loaded_model, prompt_ids

import kvscope.methods
from kvscope.harness.engine.decode import answer_nll, decode
from kvscope.harness.engine.models import load_model, wrap_model
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.engine.prefill import prefill
from kvscope.methods.registry import create_method, method_names
from kvscope.methods.resident import StaticResidency
from kvscope.methods.shape import Footprint

DEMO_LENGTHS_TOKENS = [1024, 2048, 4096, 8192]
# What runs on a model of random weights where a method's defaults need a part trained for the model.
UNTRAINED = {"lsa": "lsa:budget_fraction=0.3,chunk_tokens=16,selection=synthetic", "dsa": "dsa:selection=synthetic"}
# Every method with its defaults, and settings that reach its corners: rings that wrap, pages that do not line up.
SPECS = [
    *(UNTRAINED.get(name, name) for name in method_names()),
    "sliding_window:window=20",
    "sliding_window:window=1,sinks=1",
    "sliding_window:sinks=0,window=33",
    "sliding_window:window=40,sinks=20",
    "recency:recency_tokens=33",
    "recency:recency_tokens=0",
    "random:chunk_tokens=5,recency_tokens=7,fraction=0.3",
    "random:fraction=0",
    "snapkv:budget_tokens=37,window_tokens=9,pooling=max,kernel_size=7",
    "snapkv:budget_tokens=30,window_tokens=6,interval_steps=11",
    "adakv:budget_tokens=40,window_tokens=3,safeguard=0,kernel_size=1",
    "quest:budget_tokens=64,dense_layers=0",
    "quest:block_tokens=7,budget_tokens=50",
    "moba:block_tokens=24,budget_tokens=72",
    "msa:block_tokens=64",
    "dsa:budget_tokens=9,selection=synthetic,seed=3",
    "dsa:budget_tokens=9,indexer=oracle",
    "lsa:tau=4,budget_fraction=0.6,chunk_tokens=12,recency_tokens=33,sink_tokens=0,selection=synthetic",
    "lsa:tau=1,threshold=0.4,chunk_tokens=16,recency_tokens=20,indexer=attention",
    "lsa:tau=3,budget_fraction=0.5,chunk_tokens=16,recency_tokens=33,indexer=landmark",
]
# A threshold keeps as much as the prompt demands, so its bytes cannot be told beforehand.
PREDICTABLE = [spec for spec in SPECS if "lsa" not in spec or "attention" not in spec]
# RoPE; RoPE and NoPE; sliding layers with sink logits; soft caps; the reference model's shape.
MODELS = ["llama", "smollm3", "gpt_oss", "gemma2", "afmoe"]
# Within the steps fall the ends of blocks of 16, 24, 32 and 64 tokens, of chunks of 5, 7 and 12, and an interval of 11.
N_TOKENS = 310
TOKENS = prompt_ids(12, seed=8)
# So many methods, and what each is compared with, share the forward of a step: it takes longer than what they do in it.
N_TOGETHER = 12


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    loaded = loaded_model(request.param)
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), SPECS, chunk_tokens=128, seed=4)
    dense, _ = side_by_side(loaded, [create_method("dense")] * 2, prompt, TOKENS)
    return loaded, prompt, dense.logits_TV


@pytest.fixture(scope="module")
def logits_of(case):
    """Return what gives the logits of a method's steps, evicting and masking.

    dense steps alone: its logits are those of another such session bit by bit.
    """
    loaded, prompt, _ = case
    known = {}

    def logits(spec):
        if spec not in known:
            at = SPECS.index(spec) // N_TOGETHER * N_TOGETHER
            specs = [spec] if spec == "dense" else [each for each in SPECS[at : at + N_TOGETHER] if each != "dense"]
            methods = [create_method(each) for each in specs]
            pairs = [side for method in methods for side in (method, masking(method))]
            sides = [side.logits_TV for side in side_by_side(loaded, pairs, prompt, TOKENS)]
            known.update(zip(specs, zip(sides[::2], sides[1::2], strict=True), strict=True))
        return known[spec]

    return logits


@functools.cache
def predictable_prompt(model, n_tokens):
    """A prompt with what every method of ``PREDICTABLE`` asks of it."""
    return prefilled(loaded_model(model), prompt_ids(n_tokens), PREDICTABLE)


@pytest.fixture(scope="module")
def bf16_case():
    loaded = wrap_model(build_stock("llama").bfloat16(), None, page_tokens=16)
    return loaded, prefilled(loaded, prompt_ids(N_TOKENS), SPECS, chunk_tokens=128, seed=4)


@pytest.fixture(scope="module")
def shortest_demo_prompt():
    ids = prompt_ids(DEMO_LENGTHS_TOKENS[0])
    specs = [UNTRAINED.get(name, name) for name in method_names()]
    return ids, prefilled(loaded_model("llama"), ids[:-1], specs)


def run_steps(loaded, method, prompt, tokens, **options):
    with Single(loaded, method, prompt, reserve_tokens=len(tokens), **options) as session:
        return torch.stack([session.step(token) for token in tokens])


@pytest.mark.parametrize("spec", SPECS)
def test_evicting_equals_masking_and_differs_from_dense(case, logits_of, spec):
    loaded, _, dense = case
    method = create_method(spec)
    evicted, masked = logits_of(spec)
    torch.testing.assert_close(evicted, masked, atol=5e-6, rtol=0)
    if method.name == "dense":
        assert torch.equal(evicted, dense)
    else:
        assert not method.is_noop(N_TOKENS, loaded.shape)
        differences = (evicted - dense).abs().amax(1)
        assert differences.min() > 1e-4 * dense.abs().max(), "every step reads less than dense does"


@pytest.mark.parametrize("spec", SPECS)
def test_evicting_equals_masking_in_bf16(bf16_case, spec):
    """The two sides take different kernels here (fused, and fp32 products), so they agree to bf16 only."""
    loaded, prompt = bf16_case
    assert max(errors_of_evicting(loaded, create_method(spec), prompt, TOKENS)) < 0.01


def new_tensor_bytes():
    """Bytes of the storages of all live tensors made since ``gc.freeze()``, whoever holds them."""
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("spec", PREDICTABLE)
@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_predicted_bytes_are_the_bytes_of_the_live_tensors(model, spec):
    loaded, method = loaded_model(model), create_method(spec)
    # Beside the cache only small change is alive: the rotation of a step, the last key of each layer.
    small_bytes = 16 * loaded.shape.n_layers * loaded.shape.hidden_size * 4
    prompts = {n_tokens: predictable_prompt(model, n_tokens) for n_tokens in (0, 3, 32, N_TOKENS)}
    # Steps end behind the end of a page, of 32 and of 320 tokens.
    for n_tokens, n_steps in [(0, 0), (0, 1), (3, 30), (32, 0), (N_TOKENS, 0), (N_TOKENS, 1), (N_TOKENS, 11)]:
        # What lives already is out of sight, garbage or not; and stays there: it would slow every later collection.
        gc.freeze()
        with Single(loaded, method, prompts[n_tokens], reserve_tokens=n_steps) as session:
            for token in prompt_ids(n_steps):
                session.step(token)
            footprint = session.sequence.footprint()
            assert_predicted(footprint, method, method.predict(loaded.shape, n_tokens, n_steps))
            assert footprint.device_bytes <= new_tensor_bytes() <= footprint.device_bytes + small_bytes
        assert new_tensor_bytes() <= small_bytes, "closing frees the cache though the session object lives on"


@pytest.mark.parametrize("n_tokens", DEMO_LENGTHS_TOKENS)
@pytest.mark.parametrize("name", [name for name in method_names() if name != "dense"])
def test_no_method_is_a_noop_at_demo_lengths(name, n_tokens):
    shape, method = loaded_model("llama").shape, create_method(UNTRAINED.get(name, name))
    dense, own = (each.predict(shape, n_tokens, 8) for each in (create_method("dense"), method))
    assert not method.is_noop(n_tokens - 1, shape)
    assert own.bytes_read_per_step < dense.bytes_read_per_step
    if method.saving_kind == "resident":
        assert own.kv_bytes == dense.kv_bytes
    else:
        assert own.kv_bytes < dense.kv_bytes
    assert create_method("dense").is_noop(n_tokens)


@pytest.mark.parametrize("name", method_names())
def test_real_tensors_at_the_shortest_demo_length(shortest_demo_prompt, name):
    loaded, method = loaded_model("llama"), create_method(UNTRAINED.get(name, name))
    ids, prompt = shortest_demo_prompt
    result = decode(loaded, method, prompt, ids[-1:], max_new_tokens=4)
    assert_predicted(result.footprint_last, method, method.predict(loaded.shape, len(ids) - 1, 4))
    dense_bytes = loaded.shape.dense_kv_bytes(len(ids) - 1, 4)
    if method.saving_kind == "resident":
        assert result.footprint_mean.kv_bytes == dense_bytes
    else:
        assert result.footprint_mean.device_bytes < 0.5 * dense_bytes
    if name != "dense":
        nll = [answer_nll(loaded, each, prompt, ids[-1:], [5, 6, 7]) for each in (create_method("dense"), method)]
        assert abs(nll[0] - nll[1]) > 1e-5


@pytest.fixture(scope="module")
def whole_prompt():
    return prefilled(loaded_model("llama"), prompt_ids(N_TOKENS), SPECS, seed=4)


@pytest.mark.parametrize("spec", SPECS)
def test_results_repeat_bit_by_bit(whole_prompt, spec):
    tokens = prompt_ids(5, seed=8)
    first, again = (run_steps(loaded_model("llama"), create_method(spec), whole_prompt, tokens) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("spec", SPECS)
def test_effective_config_can_be_written_to_a_row(spec):
    method = create_method(spec)
    effective = method.effective_config(N_TOKENS, loaded_model("llama").shape)
    assert json.loads(json.dumps(effective)) == effective
    assert method.effective_config(N_TOKENS) == effective, "the shape matters only for budgets in bytes"
    assert method.unsupported(loaded_model("llama").shape, "cpu") == []


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_its_page(name):
    page = (Path(kvscope.methods.__path__[0]) / name / "README.md").read_text()
    for heading in ("## What stays", "## Mathematics", "## Options", "## Limits", "## Source"):
        assert heading in page, f"{name}/README.md lacks '{heading}'"


class NothingResident(StaticResidency):
    """For tests: no prompt token stays. What it still scores leaked from the prefill."""

    name, stays, saves, source, cost = "nothing_resident", "nothing", "everything", "tests", "0"
    saving_kind = "freed"
    Config = type(create_method("dense").config)

    def n_resident_tokens(self, n_tokens, shape):
        return 0

    def resident_ranges(self, prompt):
        return []

    def effective_config(self, n_tokens, shape=None):
        return {}


@pytest.mark.parametrize("model", ["llama", "smollm3", "qwen3"])
def test_with_nothing_resident_the_prompt_leaves_no_trace(model):
    loaded = loaded_model(model)
    tokens = prompt_ids(6, seed=21)
    logits = []
    for seed in (1, 2):
        prompt = prefill(loaded, prompt_ids(200, seed=seed))
        logits.append(run_steps(loaded, NothingResident(), prompt, tokens))
        assert NothingResident().predict(loaded.shape, 200) == Footprint()
    assert torch.equal(*logits), "equal for unlike prompts, so no answer can depend on the prompt"
    dense = [
        run_steps(loaded, create_method("dense"), prefill(loaded, prompt_ids(200, seed=s)), tokens) for s in (1, 2)
    ]
    assert (dense[0] - dense[1]).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.skipif(
    not list(REFERENCE_MODEL_FOLDER.glob("*.safetensors")), reason="the reference model's weights are not here"
)
def test_with_nothing_resident_the_reference_model_scores_at_chance():
    from kvscope.tasks.registry import create_task

    loaded = load_model("reference", device="cpu")
    task = create_task("niah_single_1")
    scores = {"dense": 0.0, "nothing": 0.0}
    for index in range(6):
        sample = task.build(loaded.tokenizer, length_tokens=512, sample=index, seed=77)
        prompt = prefill(loaded, sample.ids[:-1], seed=index)
        for key, method in (("dense", create_method("dense")), ("nothing", NothingResident())):
            # Room for the number; what knows no answer would go on for 128 tokens.
            result = decode(loaded, method, prompt, sample.ids[-1:], max_new_tokens=16, stop_strings=sample.stop)
            scores[key] += task.score(sample, result.text)
    # A seven-digit number is guessed once in nine million: chance is zero.
    assert scores["nothing"] == 0
    assert scores["dense"] >= 5
