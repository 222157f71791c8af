"""Block-sparse methods against their formulas: what is chosen, gathered and kept, and what they are charged for it."""

import pytest
import torch
from calls import attention_call
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_plain import attention, tokens_read
from tiny_models import PAGE_TOKENS, loaded_model, prompt_ids

from kvscope.errors import UsageError
from kvscope.harness.engine.prefill import prefill
from kvscope.methods import attention as attention_module
from kvscope.methods import block_query, block_sequence
from kvscope.methods.attention import paged_attention
from kvscope.methods.base import union_collectors
from kvscope.methods.dsa.method import head_sum
from kvscope.methods.gather import gather_blocks, token_partial
from kvscope.methods.quest.method import min_max, upper_bounds
from kvscope.methods.registry import create_method

NAMES = ["quest", "moba", "msa", "dsa:indexer=oracle"]
# Small enough to leave most out at 150 tokens, with blocks that fit pages of 16, straddle them and are smaller.
SPECS = [
    "quest:budget_tokens=48,dense_layers=0",
    "quest:budget_tokens=21,block_tokens=7,dense_layers=0",
    "moba:budget_tokens=48,block_tokens=16",
    "moba:budget_tokens=72,block_tokens=24",
    "msa:budget_tokens=32,block_tokens=8",
    "msa:budget_tokens=64,block_tokens=32",
    "dsa:budget_tokens=20,indexer=oracle",
]
N_TOKENS, N_STEPS, SCALE = 150, 20, 0.25


def prefilled(specs, n_tokens=N_TOKENS, **options):
    loaded = loaded_model("llama")
    methods = [create_method(spec) for spec in specs]
    return prefill(loaded, prompt_ids(n_tokens), collectors=union_collectors(methods, loaded.shape.layers), **options)


def prompt_kv(prompt, layer):
    """K and V of the prompt, [H, T, D] each."""
    pages = prompt.pages[layer]
    return (pages[:, :, index].transpose(0, 1).flatten(1, 2)[:, : prompt.n_tokens] for index in (0, 1))


def random_step(shape, generator):
    """One token's query, key and value as every layer of a test gets it."""
    q = torch.randn(1, shape.n_q_heads, 1, shape.head_dim, generator=generator)
    k, v = (torch.randn(1, shape.n_kv_heads, 1, shape.head_dim, generator=generator) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("spec", SPECS)
def test_choice_output_and_reads_are_the_formulas(spec):
    method, prompt = create_method(spec), prefilled([spec], chunk_tokens=48)
    shape, plan = prompt.shape, method.blocks(N_TOKENS)
    sequence = method.open(prompt, "cpu")  # nothing reserved: pages and summaries grow on the way
    layers = shape.layers[:2]
    k_by_layer, v_by_layer = {}, {}
    for layer in layers:
        k_by_layer[layer], v_by_layer[layer] = prompt_kv(prompt, layer)
    generator = torch.Generator().manual_seed(3)
    n_late = 0
    for _ in range(N_STEPS):
        q, k, v = random_step(shape, generator)
        n_read = 0
        for layer in shape.layers:
            out = sequence.attend(layer, attention_call(q, k, v, scale=SCALE))
            if layer not in layers:
                continue
            k_HTD = k_by_layer[layer] = torch.cat([k_by_layer[layer], k[0]], 1)
            v_HTD = v_by_layer[layer] = torch.cat([v_by_layer[layer], v[0]], 1)
            q_HGD = q.view(shape.n_kv_heads, -1, shape.head_dim)
            read = tokens_read(
                method.name, q_HGD, k_HTD, block_tokens=plan.block_tokens, n_blocks=plan.n_blocks, scale=SCALE
            )
            assert all(k_HTD.shape[1] - 1 in tokens for tokens in read)
            assert max(map(len, read)) < k_HTD.shape[1]
            expected = attention(q_HGD, k_HTD, v_HTD, read, SCALE)
            torch.testing.assert_close(out.view_as(expected), expected, atol=2e-6, rtol=0)
            reads = sequence._reads[layer]
            assert int(reads.n_tokens) == sum(map(len, read))
            n_read += sum(map(len, read))
            current = (k_HTD.shape[1] - 1) // plan.block_tokens * plan.block_tokens
            n_late += sum(N_TOKENS <= token < current for tokens in read for token in tokens)
    assert n_late, "blocks that were decoded are chosen too"
    assert n_read > 0


@pytest.mark.parametrize("spec", SPECS)
def test_only_what_is_chosen_is_gathered(spec):
    """Values that are not read are NaN: one of them in the gathered tensor would spoil the output."""
    method, prompt = create_method(spec), prefilled([spec])
    shape, plan = prompt.shape, method.blocks(N_TOKENS)
    sequence = method.open(prompt, "cpu", reserve_tokens=1)
    q, k, v = random_step(shape, torch.Generator().manual_seed(5))
    layer = shape.layers[-1]
    k_HTD = torch.cat([next(prompt_kv(prompt, layer)), k[0]], 1)
    q_HGD = q.view(shape.n_kv_heads, -1, shape.head_dim)
    read = tokens_read(method.name, q_HGD, k_HTD, block_tokens=plan.block_tokens, n_blocks=plan.n_blocks, scale=SCALE)
    pages = sequence._pool.pages[layer]
    for head, tokens in enumerate(read):
        for token in set(range(N_TOKENS)) - tokens:
            pages[token // PAGE_TOKENS, head, 1, token % PAGE_TOKENS] = torch.nan
    pages[N_TOKENS // PAGE_TOKENS, :, 1, N_TOKENS % PAGE_TOKENS + 1 :] = torch.nan
    assert sequence.attend(layer, attention_call(q, k, v, scale=SCALE)).isfinite().all()


finite = st.floats(-8, 8, width=32)


@given(st.integers(1, 5), st.integers(1, 6), st.data())
@settings(max_examples=200, deadline=None)
def test_the_bound_of_quest_bounds_every_logit(n_page_tokens, D, data):
    k = torch.tensor(data.draw(st.lists(finite, min_size=n_page_tokens * D, max_size=n_page_tokens * D)))
    q = torch.tensor(data.draw(st.lists(finite, min_size=2 * D, max_size=2 * D)))
    k_HNTD, q_HGD = k.view(1, 1, n_page_tokens, D), q.view(1, 2, D)
    bound_HGN = upper_bounds(q_HGD, min_max(k_HNTD))
    logits_GT = q_HGD[0] @ k_HNTD[0, 0].T
    assert (bound_HGN[0] >= logits_GT.amax(1, keepdim=True) - 1e-4).all()
    if n_page_tokens == 1:
        torch.testing.assert_close(bound_HGN[0], logits_GT, atol=1e-4, rtol=0)


@pytest.mark.parametrize("block_tokens", [4, 16, 24, 64])
def test_gathering_every_block_in_any_order_is_dense_attention(block_tokens):
    generator = torch.Generator().manual_seed(block_tokens)
    n_tokens, H, G, D = 151, 2, 3, 8
    pages = torch.randn(10, H, 2, PAGE_TOKENS, D, generator=generator)
    q = torch.randn(1, H * G, 1, D, generator=generator)
    current = (n_tokens - 1) // block_tokens
    blocks_HB = torch.stack([torch.randperm(current, generator=generator) for _ in range(H)])
    blocks_HB = torch.cat([blocks_HB, torch.full((H, 1), current)], 1)
    tail_tokens = n_tokens - current * block_tokens
    k_HTD, v_HTD = gather_blocks(pages, blocks_HB, block_tokens=block_tokens, tail_tokens=tail_tokens)
    assert k_HTD.shape == v_HTD.shape == (H, n_tokens, D)
    part = token_partial(q.view(H, G, D), k_HTD, v_HTD, scale=0.3, softcap=5.0)
    dense = paged_attention(attention_call(q, scale=0.3, softcap=5.0), pages, n_tokens=n_tokens)
    torch.testing.assert_close(part.out.view_as(dense), dense, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_budget_is_dense(name):
    method, dense = create_method(f"{name}{',' if ':' in name else ':'}budget_tokens=192"), create_method("dense")
    prompt = prefilled([method.label])
    assert method.is_noop(N_TOKENS, prompt.shape)
    ours, theirs = (m.open(prompt, "cpu", reserve_tokens=1) for m in (method, dense))
    q, k, v = random_step(prompt.shape, torch.Generator().manual_seed(5))
    for layer in prompt.shape.layers:
        out, expected = (s.attend(layer, attention_call(q, k, v, scale=SCALE)) for s in (ours, theirs))
        assert torch.equal(out, expected)
    assert ours.footprint().bytes_read_per_step == theirs.footprint().bytes_read_per_step


@pytest.mark.parametrize("chunk_tokens", [16, 48, 256])
@pytest.mark.parametrize("spec", ["quest", "quest:block_tokens=7", "moba", "moba:block_tokens=24"])
def test_summaries_do_not_depend_on_how_the_prompt_was_cut(spec, chunk_tokens):
    method, prompt = create_method(spec), prefilled([spec], chunk_tokens=chunk_tokens)
    summary, block = method.summary(), method.blocks(N_TOKENS).block_tokens
    for layer in prompt.shape.layers:
        k_HTD = next(prompt_kv(prompt, layer))
        whole = [k_HTD[:, start : start + block] for start in range(0, N_TOKENS - block + 1, block)]
        if method.name == "quest":
            expected = torch.stack([torch.stack([k.amin(1), k.amax(1)], 1) for k in whole])
        else:
            expected = torch.stack([k.mean(1)[:, None] for k in whole])
        torch.testing.assert_close(prompt.metadata[summary.name][layer], expected, atol=1e-6, rtol=0)
        assert prompt.metadata[summary.name][layer].device.type == "cpu"


def test_metadata_is_charged_to_whoever_asked_for_it():
    prompt = prefilled(NAMES)
    assert len(prompt.metadata) == 2
    charged = {name: create_method(name).open(prompt, "cpu").footprint().metadata_bytes for name in ["dense", *NAMES]}
    shape = prompt.shape
    key_bytes = shape.n_kv_heads * shape.head_dim * shape.element_bytes
    assert charged["dense"] == charged["msa"] == charged["dsa:indexer=oracle"] == 0
    assert charged["quest"] == (len(shape.layers) - 2) * 2 * (N_TOKENS // 16) * key_bytes
    assert charged["moba"] == len(shape.layers) * (N_TOKENS // 32) * key_bytes


def test_a_prompt_without_the_collectors_is_refused():
    prompt = prefilled(["moba"])
    with pytest.raises(ValueError, match="prefilled without the collectors of 'key_min_max_16'"):
        create_method("quest").open(prompt, "cpu")


@pytest.mark.parametrize("spec", SPECS)
def test_forks_do_not_meet(spec):
    method, prompt = create_method(spec), prefilled([spec])
    shape, layer = prompt.shape, prompt.shape.layers[-1]
    before = {name: {at: t.clone() for at, t in found.items()} for name, found in prompt.metadata.items()}
    one, other = (method.open(prompt, "cpu", reserve_tokens=N_STEPS) for _ in range(2))
    for seed in range(N_STEPS):
        one.attend(layer, attention_call(*random_step(shape, torch.Generator().manual_seed(seed)), scale=SCALE))
    assert (one.n_tokens, other.n_tokens) == (N_TOKENS + N_STEPS, N_TOKENS)
    step = random_step(shape, torch.Generator().manual_seed(99))
    late = other.attend(layer, attention_call(*step, scale=SCALE))
    assert torch.equal(late, method.open(prompt, "cpu").attend(layer, attention_call(*step, scale=SCALE)))
    for name, found in before.items():
        assert all(torch.equal(prompt.metadata[name][at], tensor) for at, tensor in found.items())


def test_the_oracle_of_dsa_honours_soft_caps_and_sinks():
    logits_HGT = 3 * torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(1))
    sinks = torch.randn(6, generator=torch.Generator().manual_seed(2))
    capped = 4 * torch.tanh(logits_HGT / 4)
    with_sink = torch.cat([capped, sinks.view(2, 3, 1)], -1).softmax(-1)[..., :-1].sum((0, 1))
    torch.testing.assert_close(head_sum(logits_HGT, softcap=4.0, sink_logits=sinks), with_sink)
    assert abs(float(head_sum(logits_HGT).sum()) - 6) < 1e-5


@pytest.mark.parametrize(
    ("spec", "n_tokens", "block_tokens", "n_blocks"),
    [
        ("quest", 1024, 16, 8),
        ("quest", 8192, 16, 32),
        ("quest", 32768, 16, 128),
        ("quest", 500_000, 16, 128),
        ("moba", 300, 32, 4),
        ("moba", 1024, 32, 4),
        ("moba", 8130, 128, 4),
        ("moba", 8192, 128, 4),
        ("moba", 32768, 512, 4),
        ("moba", 500_000, 512, 4),
        ("msa", 1024, 8, 16),
        ("msa", 8192, 32, 16),
        ("msa", 500_000, 128, 16),
        ("dsa", 1024, 1, 128),
        ("dsa", 500_000, 1, 2048),
        ("moba:budget_tokens=256", 8192, 64, 4),
        ("moba:budget_tokens=4k", 65536, 512, 8),
        ("moba:budget_tokens=500", 65536, 64, 7),
        ("moba:block_tokens=512", 8192, 512, 2),
        ("moba:budget_tokens=256,block_tokens=32", 500, 32, 8),
        ("msa:budget_tokens=300", 65536, 16, 18),
    ],
)
def test_blocks_and_budgets_at_each_length(spec, n_tokens, block_tokens, n_blocks):
    effective = create_method(spec).effective_config(n_tokens)
    assert (effective["block_tokens"], effective["blocks_read"]) == (block_tokens, n_blocks)
    assert effective["budget_tokens"] == block_tokens * n_blocks


@pytest.mark.parametrize(("name", "block_tokens"), [("quest", 16), ("moba", 512), ("msa", 128), ("dsa", 1)])
def test_paper_settings_fix_the_papers_blocks(name, block_tokens):
    method = create_method(name, paper_settings=True)
    assert method.label == name
    for n_tokens in (1024, 500_000):
        effective = method.effective_config(n_tokens)
        assert (effective["block_tokens"], effective["budget_tokens"]) == (block_tokens, 2048)
    assert method.is_noop(1024)
    assert not method.is_noop(4096)
    chosen = create_method(f"{name}:budget_tokens=1k", paper_settings=True)
    assert chosen.effective_config(500_000)["budget_tokens"] == 1024


def test_layers_of_quest_count_from_the_models_input():
    shape = loaded_model("gemma3").shape
    assert shape.layers == (3,)
    assert create_method("quest").sparse_layers(shape) == (3,)
    everything_dense = create_method("quest:dense_layers=4")
    assert everything_dense.sparse_layers(shape) == ()
    assert everything_dense.is_noop(8192, shape)
    assert not everything_dense.is_noop(8192)
    assert everything_dense.predict(shape, 8192, 1).metadata_bytes == 0


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("quest:budget_tokens=16", "does not hold the current block and one more of block_tokens=16"),
        ("moba:budget_tokens=1", "does not hold the current block and one more; raise the budget"),
        ("moba:budget_tokens=512,block_tokens=512", "set block_tokens lower"),
        ("msa:block_tokens=0", "block_tokens must be 1 or more, got 0"),
        ("quest:dense_layers=-1", "dense_layers must be 0 or more"),
        ("dsa:selection=random", "selection must be trained or synthetic, got 'random'"),
        ("dsa:selection=synthetic,indexer=oracle", "draws its own indexer, so indexer cannot be given"),
        ("dsa:selection=synthetic,seed=x", "seed"),
        ("dsa:block_tokens=4", "Its options are: budget_tokens, indexer, selection, seed, kv, share, read_share."),
    ],
)
def test_bad_options_get_one_clear_sentence(spec, text):
    with pytest.raises(UsageError) as caught:
        create_method(spec)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n_tokens", [150, 160])
@pytest.mark.parametrize("spec", SPECS)
def test_the_kernels_score_and_read_as_torch_does(spec, n_tokens, monkeypatch):
    """Block scores, and chosen blocks read in place: as the torch path. In the interpreter, or on a GPU."""
    method, prompt = create_method(spec), prefilled([spec], n_tokens, chunk_tokens=48)
    shape, layer = prompt.shape, prompt.shape.layers[0]
    generator = torch.Generator().manual_seed(3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = [tuple(x.to(device) for x in random_step(shape, generator)) for _ in range(4)]
    found = {}
    for kernels in (False, True):
        for module in (attention_module, block_sequence):
            monkeypatch.setattr(module, "kernel_runs", lambda q_BQ1D, pages, kernels=kernels: kernels)
        scored_by = only_block_size if kernels else lambda *args, **options: ["not here"]
        monkeypatch.setattr(block_query, "unsupported_block_scores", scored_by)
        if kernels:
            monkeypatch.setattr(block_sequence, "gather_blocks", None)  # nothing is gathered where the kernel runs
        sequence = method.open(prompt, device, reserve_tokens=len(steps))
        outs = [sequence.attend(layer, attention_call(*step, scale=SCALE)) for step in steps]
        found[kernels] = torch.cat(outs), sequence.footprint()
    torch.testing.assert_close(found[True][0], found[False][0], atol=2e-5, rtol=0)
    assert found[True][1] == found[False][1]


def only_block_size(device, *, dtype, head_dim, group, block_tokens=None):
    """What the dispatch says of these shapes on a GPU; for the interpreter."""
    return ["not a power of two"] if block_tokens is not None and block_tokens & (block_tokens - 1) else []
