"""Pages: packing, appending, growth, budgets, and the tokens each method keeps."""

import pytest
import torch

from kvscope.errors import UsageError
from kvscope.methods.budget import default_recency_tokens
from kvscope.methods.registry import create_method
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.methods.store import PagePool, PromptKV

SHAPE = ModelShape(
    layers=(0, 2), n_layers=3, n_q_heads=4, n_kv_heads=2, head_dim=8, hidden_size=32, element_bytes=4, page_tokens=16
)
CPU = torch.device("cpu")


def numbered_prompt(n_tokens, *, seed=0, shape=SHAPE):
    """A prompt whose K at token t is t + 1 and V is -(t + 1), so that pages can be read off."""
    pages = {}
    for layer in shape.layers:
        flat = torch.zeros(shape.pages(n_tokens) * shape.page_tokens)
        flat[:n_tokens] = torch.arange(1, n_tokens + 1)
        number = flat.view(-1, 1, shape.page_tokens, 1).expand(-1, shape.n_kv_heads, -1, shape.head_dim)
        pages[layer] = torch.stack([number, -number], 2)
    return PromptKV(shape=shape, n_tokens=n_tokens, pages=pages, dtype=torch.float32, seed=seed, prompt_sha256="ab")


def tokens_of(pages):
    """The token numbers in pages, in order, zeros for unused places."""
    keys, values = pages.permute(2, 1, 0, 3, 4).flatten(2, 3)
    assert torch.equal(keys, -values)
    assert torch.equal(keys, keys[:1, :, :1].expand_as(keys))
    return [int(n) - 1 for n in keys[0, :, 0]]


@pytest.mark.parametrize(
    "ranges",
    [[(0, 50)], [(16, 50)], [(7, 9)], [(0, 4), (33, 50)], [(0, 16), (17, 18), (40, 50)], [(5, 5), (9, 10)], []],
)
def test_load_packs_ranges_in_order(ranges):
    n_kept = sum(end - start for start, end in ranges)
    pool = PagePool(SHAPE, n_tokens=n_kept, dtype=torch.float32, device=CPU)
    pool.load(numbered_prompt(50), ranges)
    expected = [token for start, end in ranges for token in range(start, end)]
    for pages in pool.pages.values():
        assert pages.shape[0] == SHAPE.pages(n_kept)
        assert tokens_of(pages) == expected + [-1] * (pages.shape[0] * 16 - n_kept)
    assert set(pool.lengths.values()) == {n_kept}
    assert pool.n_bytes == SHAPE.paged_kv_bytes(n_kept)


def test_append_writes_behind_the_last_and_grows_one_page():
    pool = PagePool(SHAPE, n_tokens=0, dtype=torch.float32, device=CPU)
    assert pool.n_bytes == 0
    for t in range(20):
        k = torch.full((1, 2, 1, 8), float(t + 1))
        pool.append(0, k, -k)
    assert tokens_of(pool.pages[0]) == [*range(20), *[-1] * 12]
    assert pool.pages[2].shape[0] == 0
    assert pool.lengths == {0: 20, 2: 0}


def kept_tokens(spec, n_tokens, *, seed=0):
    sequence = create_method(spec).open(numbered_prompt(n_tokens, seed=seed), "cpu")
    return [token for token in tokens_of(sequence.pool.pages[2]) if token >= 0]


def test_recency_keeps_the_end():
    assert kept_tokens("recency:recency_tokens=20", 100) == list(range(80, 100))
    assert kept_tokens("recency", 1000) == list(range(872, 1000))
    assert kept_tokens("recency:recency_tokens=0", 100) == []
    assert kept_tokens("recency:budget_fraction=0.25", 100) == list(range(75, 100))


def test_random_keeps_the_end_and_whole_chunks_drawn_by_seed_and_prompt():
    kept = kept_tokens("random:chunk_tokens=8,recency_tokens=20", 500)
    assert kept[-20:] == list(range(480, 500))
    chunks = sorted({token // 8 for token in kept[:-20]})
    assert kept[:-20] == [token for chunk in chunks for token in range(chunk * 8, chunk * 8 + 8)]
    assert len(chunks) == 6, "a tenth of the 60 chunks before the window"
    assert kept == kept_tokens("random:chunk_tokens=8,recency_tokens=20", 500)
    assert kept != kept_tokens("random:chunk_tokens=8,recency_tokens=20,seed=1", 500)
    assert kept != kept_tokens("random:chunk_tokens=8,recency_tokens=20", 500, seed=1)


def test_random_draws_every_chunk_about_equally_often():
    counts = torch.zeros(60)
    for seed in range(400):
        kept = kept_tokens("random:chunk_tokens=8,recency_tokens=20", 500, seed=seed)
        counts[[token // 8 for token in kept[:-20:8]]] += 1
    # 400 draws at 1/10: mean 40, standard deviation 6.
    assert counts.sum() == 2400
    assert counts.min() > 15
    assert counts.max() < 65


def test_sliding_window_keeps_sinks_and_the_end():
    sequence = create_method("sliding_window:sinks=3,window=20").open(numbered_prompt(100), "cpu")
    assert tokens_of(sequence._sink_pool.pages[0]) == [0, 1, 2] + [-1] * 13
    assert tokens_of(sequence._ring.pages[0]) == [*range(80, 100), *[-1] * 12]
    short = create_method("sliding_window:sinks=3,window=20").open(numbered_prompt(10), "cpu", reserve_tokens=4)
    assert tokens_of(short._ring.pages[0]) == [*range(3, 10), *[-1] * 9]


@pytest.mark.parametrize(
    ("n_tokens", "expected"), [(100, 128), (8192, 128), (16384, 256), (524288, 8192), (10**7, 8192)]
)
def test_default_window(n_tokens, expected):
    assert default_recency_tokens(n_tokens) == expected
    if n_tokens >= 8192:
        assert create_method("recency").effective_config(n_tokens)["recency_tokens"] == expected
        assert create_method("random").effective_config(n_tokens)["recency_tokens"] == expected
        assert create_method("sliding_window").effective_config(n_tokens)["window"] == expected


@pytest.mark.parametrize("name", ["recency", "random", "sliding_window"])
@pytest.mark.parametrize("budget_pages", [12, 13, 40])
def test_a_byte_budget_is_kept_and_used(name, budget_pages):
    page_bytes = SHAPE.page_tokens * SHAPE.kv_bytes_per_token
    budget = budget_pages * page_bytes + page_bytes // 2
    recency = "recency_tokens=32,chunk_tokens=16," if name == "random" else ""
    method = create_method(f"{name}:{recency}budget_bytes={budget}")
    n_tokens = 1000
    used = method.open(numbered_prompt(n_tokens), "cpu").footprint().kv_bytes
    assert used == budget_pages * page_bytes
    assert method.predict(SHAPE, n_tokens).kv_bytes == used
    effective = method.effective_config(n_tokens, SHAPE)
    assert effective["budget_bytes"] == budget
    with pytest.raises(UsageError, match="needs the model's shape"):
        method.effective_config(n_tokens)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("recency:budget_bytes=100", "less than one page"),
        ("sliding_window:budget_fraction=0.001", "no window is left"),
        ("random:budget_fraction=0.05", "less than its recency window"),
    ],
)
def test_budgets_that_hold_nothing_are_refused(spec, text):
    with pytest.raises(UsageError, match=text):
        create_method(spec).open(numbered_prompt(1000), "cpu")


def test_a_budget_above_the_prompt_is_a_noop():
    page_bytes = SHAPE.page_tokens * SHAPE.kv_bytes_per_token
    for name in ("recency", "sliding_window"):
        assert create_method(f"{name}:budget_bytes={100 * page_bytes}").is_noop(1000, SHAPE)
        assert not create_method(f"{name}:budget_bytes={10 * page_bytes}").is_noop(1000, SHAPE)


def test_footprints_add_and_average():
    one = Footprint(kv_bytes=1, metadata_bytes=2, host_bytes=3, bytes_read_per_step=4, attention_flops_per_step=5)
    assert one + one + one == Footprint(
        kv_bytes=3, metadata_bytes=6, host_bytes=9, bytes_read_per_step=12, attention_flops_per_step=15
    )
    assert (one + one + one).divided_by(3) == one
    assert one.device_bytes == 3


def test_flops_and_reads_of_a_step():
    # 2 layers, 4 query heads of 8, 100 tokens: QK^T and PV are 2 * 4 * 8 * 100 FLOPs each, a layer.
    assert SHAPE.attention_flops(100) == 2 * 2 * 2 * 4 * 8 * 100
    assert SHAPE.read_bytes(100) == 100 * 2 * (2 * 2 * 8 * 4)
    method = create_method("recency:recency_tokens=20")
    predicted = method.predict(SHAPE, 100, 5)
    assert predicted.bytes_read_per_step == SHAPE.read_bytes(25)
    assert predicted.attention_flops_per_step == SHAPE.attention_flops(25)
    assert predicted.host_bytes == predicted.metadata_bytes == 0
