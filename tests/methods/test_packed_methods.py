"""Every method over packed pages: near to raw ones, bytes as predicted, the same at fixed addresses; or refused."""

import dataclasses

import pytest
import torch
from sequences import assert_predicted, prefilled
from sessions import Single
from tiny_models import loaded_model, prompt_ids

from kvscope.errors import UsageError
from kvscope.methods import packed_mirror as mirrors
from kvscope.methods.kv_format import FORMATS, residual_pages
from kvscope.methods.packed_mirror import packed_mirror, pages_at_once
from kvscope.methods.packed_pool import PackedPool
from kvscope.methods.packing import pack_pages, unpack_pages
from kvscope.methods.registry import create_method, method_names
from kvscope.methods.shape import tensor_bytes

LSA = "lsa:budget_fraction=0.4,chunk_tokens=16,selection=synthetic"
# Chunks of 12 make units of 4 tokens; blocks of 24 end in the midst of pages; pages of a head are unlike another's.
SPECS = [
    "dense",
    "recency:budget_fraction=0.5",
    "random:chunk_tokens=5,fraction=0.5",
    "snapkv:budget_tokens=150",
    "pyramidkv:budget_tokens=150",
    "expected_attention:budget_tokens=150",
    "knorm:budget_tokens=150",
    "quest:budget_tokens=96",
    "moba:block_tokens=24,budget_tokens=96",
    "dsa:selection=synthetic",
    LSA,
    "lsa:tau=3,budget_fraction=0.5,chunk_tokens=12,recency_tokens=33,selection=synthetic,refresh=stale1",
    "lsa:tau=3,budget_fraction=0.5,chunk_tokens=16,recency_tokens=33,indexer=landmark",
]
# One of each kind of sequence; pyramidkv has pools of unlike lengths.
STATIC = [spec for spec in SPECS if spec.split(":")[0] in ("dense", "random", "pyramidkv", "lsa")]
REFUSED = {
    "sliding_window": "takes the place of the oldest one",
    "tova": "takes the place of an older one",
    "h2o": "takes the place of an older one",
    "adakv": "fill their pages at different steps",
    "msa": "raw keys of every token",
}
N_TOKENS, N_STEPS = 310, 28  # pages of 16 fill twice
#: Largest error of the logits over their norm that a format may make here. dsa and the block-sparse methods choose
#: otherwise where a score is near another's, so theirs may be larger.
NEAR = {"fp8": 0.02, "int8": 0.005, "int4": 0.05, "kivi2": 0.15}


def with_kv(spec, kv):
    return f"{spec}{',' if ':' in spec else ':'}kv={kv}"


@pytest.fixture(scope="module")
def case():
    loaded = loaded_model("llama")
    return loaded, prefilled(loaded, prompt_ids(N_TOKENS), [*SPECS, *(with_kv(spec, "int8") for spec in SPECS)])


def run(case, spec, *, n_steps=N_STEPS, reserve=N_STEPS, **options):
    """Return logits, footprint and residency after some steps."""
    loaded, prompt = case
    with Single(loaded, create_method(spec), prompt, reserve_tokens=reserve, **options) as session:
        logits = torch.stack([session.step(token) for token in prompt_ids(n_steps, seed=8)])
        return logits, session.sequence.footprint(), session.sequence.residency()


@pytest.mark.parametrize(
    ("n_pages", "page_bytes", "at_once"),
    [
        (1024, 32 << 10, 32),  # 64K tokens of the reference model: a mebibyte
        (2048, 256 << 10, 32),  # 128K tokens of Llama-3.1-8B: a 64th of a layer
        (3, 8 << 20, 1),
    ],
)
def test_what_packing_takes_beside_the_pages_is_little(n_pages, page_bytes, at_once):
    assert pages_at_once(n_pages, page_bytes) == at_once


def test_packed_in_parts_is_packed_at_once(case, monkeypatch):
    loaded, prompt = case

    def packed():
        shape = dataclasses.replace(loaded.shape, kv=FORMATS["int4"])
        pool = PackedPool(shape, n_tokens=N_TOKENS, dtype=torch.float32, device=torch.device("cpu"))
        pool.load(prompt, [(3, N_TOKENS)])
        mirror = packed_mirror(dataclasses.replace(prompt, packed={}), pool.packing, torch.device("cpu"))
        return [pool.pages, mirror]

    whole = packed()
    monkeypatch.setattr(mirrors, "_RAW_BYTES_AT_ONCE", 1)
    assert pages_at_once(19, 4096) == 1
    for before, now in zip(whole, packed(), strict=True):
        assert before.keys() == now.keys()
        assert all(torch.equal(before[layer], now[layer]) for layer in before)


def test_every_method_stores_or_says_why_not():
    stored = {spec.split(":")[0] for spec in SPECS}
    assert stored | set(REFUSED) == set(method_names())
    for name, words in REFUSED.items():
        with pytest.raises(UsageError, match=words) as refused:
            create_method(f"{name}:kv=int8")
        assert str(refused.value).startswith(f"Method '{name}' cannot store kv=int8: ")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("snapkv:interval_steps=64,kv=int8", "interval_steps chooses anew"),
        ("dsa:indexer=oracle,kv=int4", "indexer=oracle weighs"),
        ("lsa:indexer=attention,kv=int4", "indexer=attention weighs"),
        ("lsa:indexer=oracle,kv=int4", "indexer=oracle weighs"),
        ("lsa:indexer=hindsight,kv=int4", "indexer=hindsight weighs"),
    ],
)
def test_settings_that_need_raw_keys_are_refused(spec, words):
    with pytest.raises(UsageError, match=f"{words}.*; leave kv out"):
        create_method(spec)


@pytest.mark.parametrize("spec", SPECS)
def test_packed_is_near_raw_and_bytes_are_as_predicted(case, spec):
    loaded, prompt = case
    raw, raw_footprint, _ = run(case, spec)
    chooses = not spec.startswith(("dense", "recency", "random"))
    for kv in ("int8", "kivi2") if chooses else FORMATS:
        method = create_method(with_kv(spec, kv))
        logits, footprint, _ = run(case, with_kv(spec, kv))
        assert (logits - raw).norm() <= NEAR[kv] * (10 if spec[:4] in ("ques", "moba", "dsa:") else 1) * raw.norm()
        assert not torch.equal(logits, raw)
        predicted = method.predict(loaded.shape, prompt.n_tokens, N_STEPS)
        if "stale1" in spec:  # what arrives may have been there: predicted is the most it can be
            assert footprint.device_bytes <= predicted.device_bytes
            assert footprint.host_bytes == predicted.host_bytes
        else:
            assert_predicted(footprint, method, predicted)
        assert footprint.kv_bytes < raw_footprint.kv_bytes
        assert footprint.host_bytes <= raw_footprint.host_bytes
        assert method.label == f"{create_method(spec).label}{',' if ':' in create_method(spec).label else ':'}kv={kv}"


@pytest.mark.parametrize("spec", STATIC)
def test_steps_of_fixed_addresses_are_the_same_steps(case, spec):
    """Over the packing of several pages, with room for the steps and without: packed pages move then."""
    spec = with_kv(spec, "int4")
    as_it_comes, footprint, residency = run(case, spec)
    fixed, fixed_footprint, fixed_residency = run(case, spec, decode_graph="uncaptured")
    torch.testing.assert_close(fixed, as_it_comes, atol=2e-5, rtol=1e-5)
    assert fixed_footprint.without_spare() == footprint
    assert fixed_residency == residency
    if "lsa" not in spec:
        moved, *_ = run(case, spec, reserve=0, decode_graph="uncaptured")
        torch.testing.assert_close(moved, as_it_comes, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("dense:kv=fp8", "torch: pages packed as fp8 (the device is cpu"),
        ("snapkv:budget_tokens=150,kv=int4", "torch: pages packed as int4 (the device is cpu"),
        (with_kv(LSA, "int8"), "torch: pages packed as int8 (the device is cpu"),
        ("quest:budget_tokens=96,kv=int8", "torch: what is chosen of pages packed as int8"),
        ("dense", None),
    ],
)
def test_the_row_says_what_reads_packed_pages(case, spec, text):
    loaded, prompt = case
    found = create_method(spec).open(prompt, "cpu").backends()
    assert any(each.startswith(text) for each in found) if text else found == ()
    config = create_method(spec).effective_config(N_TOKENS, loaded.shape) | create_method(spec).kv_values()
    assert config.get("kv") == (spec.partition("kv=")[2] or None)


def test_recall_moves_packed_bytes(case):
    loaded, _ = case
    _, footprint, packed = run(case, with_kv(LSA, "int4"))
    _, raw_footprint, raw = run(case, LSA)
    shape = loaded.shape
    packing = dataclasses.replace(shape, kv=FORMATS["int4"]).packing(16)
    chunk_bytes = shape.n_kv_heads * packing.record_bytes
    assert packed.recalled_bytes[0] % chunk_bytes == 0
    ratio = chunk_bytes / (16 * shape.layer_bytes_per_token)
    assert packed.recalled_bytes[0] == raw.recalled_bytes[0] * ratio
    assert footprint.host_bytes == raw_footprint.host_bytes * ratio


@pytest.mark.parametrize("n_tokens", [0, 1, 79, 80, 81, 96, 97])
def test_what_is_packed_follows_from_the_count(n_tokens):
    """The pool after every append is the pool loaded with as many tokens; the newest are as they came."""
    shape = dataclasses.replace(loaded_model("llama").shape, kv=FORMATS["int8"])
    assert residual_pages(16) * 16 == 80
    H, D, (layer, *_) = shape.n_kv_heads, shape.head_dim, shape.layers
    numbers = torch.Generator().manual_seed(n_tokens)
    kv_2HTD = torch.randn((2, H, n_tokens + 40, D), generator=numbers)
    pool = PackedPool(shape, n_tokens=0, dtype=torch.float32, device=torch.device("cpu"))
    for token in range(n_tokens + 40):
        pool.append(layer, *kv_2HTD[:, None, :, token : token + 1])
    n_packed = shape.packed_pages(n_tokens + 40)
    assert pool.n_packed[layer] == n_packed
    assert 64 < pool.residual_tokens(layer) <= 80 or n_packed == 0
    token_HT = torch.arange(n_tokens + 40).expand(H, -1)
    found_2HTD = torch.stack(pool.tokens(layer, token_HT))
    assert torch.equal(found_2HTD[:, :, n_packed * 16 :], kv_2HTD[:, :, n_packed * 16 :])
    pages = kv_2HTD[:, :, : n_packed * 16].reshape(2, H, n_packed, 16, D).permute(2, 1, 0, 3, 4)
    packed = pack_pages(pages, pool.packing)
    assert torch.equal(pool.pages[layer][:n_packed], packed)
    read = unpack_pages(packed, pool.packing).permute(2, 1, 0, 3, 4).reshape(2, H, -1, D)
    torch.testing.assert_close(found_2HTD[:, :, : n_packed * 16], read)
    assert pool.n_bytes == tensor_bytes([*pool.pages.values(), pool.residual(layer)])


def test_a_budget_in_bytes_counts_packed_bytes():
    shape = loaded_model("llama").shape
    budget = shape.paged_kv_bytes(128)
    method = create_method(f"recency:budget_bytes={budget},kv=int4")
    raw = create_method(f"recency:budget_bytes={budget}")
    assert raw.predict(shape, 4000).kv_bytes == budget
    packed = method.predict(shape, 4000)
    page_bytes = len(shape.layers) * method.stored(shape).packed_bytes(16)
    assert budget - page_bytes < packed.kv_bytes <= budget
    assert method.is_noop(200, shape)
    assert not raw.is_noop(200, shape), "raw pages of 200 tokens take more than the budget"
    assert packed.attention_flops_per_step > 1.5 * raw.predict(shape, 4000).attention_flops_per_step
    with pytest.raises(UsageError, match="keeps unpacked in every layer"):
        create_method("recency:budget_bytes=1000,kv=int4").predict(shape, 4000)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("dense:kv=int5", "expects 'fp8', 'int8', 'int4', 'kivi2' or none, got 'int5'."),
        ("dense:kv", "kv"),
        ("dense:window=5", "Method 'dense' has no option 'window'. Its options are: kv."),
    ],
)
def test_bad_options_are_told(spec, words):
    with pytest.raises(UsageError) as refused:
        create_method(spec)
    assert words in str(refused.value)


def test_none_is_the_models_dtype():
    assert create_method("dense:kv=none").label == "dense"
    assert create_method("dense:kv=none").kv is None


def test_a_plan_counts_a_packed_mirror_beside_the_prompt():
    from kvscope.harness.passes.config import RunConfig
    from kvscope.harness.passes.facts import describe_model
    from kvscope.harness.passes.forecast import needed_bytes_by_device

    facts = describe_model("preset:qwen3-0.6b", device="cpu")
    config = RunConfig(model="preset:qwen3-0.6b", methods=["dense"], kv="synthetic", lengths_tokens=[8192])

    def host_bytes(spec):
        method = create_method(spec)
        predicted = method.predict(facts.shape, 8192)
        needs = needed_bytes_by_device(method, predicted, 8192, config=config, facts=facts)
        return needs["cpu"] - predicted.device_bytes - facts.weights_bytes, predicted.host_bytes

    raw, raw_mirror = host_bytes(LSA)
    packed, packed_mirror = host_bytes(with_kv(LSA, "int4"))
    assert raw == facts.shape.dense_kv_bytes(8192) >= raw_mirror
    # The prompt's layers share memory where nothing recalls them.
    assert packed == packed_mirror + facts.shape.dense_kv_bytes(8192) // len(facts.shape.layers)
