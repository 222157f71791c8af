"""Paged attention against an fp64 oracle over gathered tokens.

Shapes: Q query heads, H KV heads, D head size, S slots, P tokens a page, T tokens.
"""

import pytest
import torch
from calls import attention_call
from masked import masked_attention
from rounding import EPS, roundings

from kvscope.harness.engine import prefill_attention
from kvscope.harness.engine.prefill_attention import chunk_attention
from kvscope.methods.attention import merge_partials, paged_attention, paged_partial
from kvscope.methods.flash import attention_with_lse, flash_window_runs_on


def oracle(q_BQSD, k_BHTD, v_BHTD, *, scale, keep_ST=None, softcap=None, sink_logits=None):
    """Attention with every logit written out, in fp64."""
    G = q_BQSD.shape[1] // k_BHTD.shape[1]
    k, v = (x.double().repeat_interleave(G, 1) for x in (k_BHTD, v_BHTD))
    logits = q_BQSD.double() @ k.transpose(2, 3) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if keep_ST is not None:
        logits = logits.masked_fill(~keep_ST, -torch.inf)
    if sink_logits is not None:
        column = sink_logits.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.cat([logits, column], -1).softmax(-1)[..., :-1] @ v
    return logits.softmax(-1) @ v


def paged(T, *, H, P, D, dtype=torch.float32, spare=0, seed=0):
    """Random K and V [1, H, T, D] and the pages that hold them; the unused end is zero."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(1, H, T, D, generator=generator).to(dtype) for _ in range(2))
    n_pages = -(-T // P)
    pages = torch.zeros(n_pages + spare, H, 2, P, D, dtype=dtype)
    for t in range(T):
        pages[t // P, :, 0, t % P], pages[t // P, :, 1, t % P] = k[0, :, t], v[0, :, t]
    return k, v, pages


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"sink_logits": torch.tensor([1.0, -2.0, 0.5, 4.0, 0.0, 2.0])}]
)
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 100])
@pytest.mark.parametrize("H", [1, 2, 6])
def test_equals_the_oracle(H, T, options):
    k, v, pages = paged(T, H=H, P=16, D=24, spare=2)
    q = torch.randn(1, 6, 1, 24) * 3
    out = paged_attention(attention_call(q, scale=0.2, **options), pages, n_tokens=T)
    # A logit is a sum of D = 24 products. As much as it is off, each weight is off in proportion, and so is the sum of
    # the values, none of which is larger than v.abs().max().
    logits = 0.2 * (q.view(1, H, -1, 24) @ k.transpose(2, 3)).abs().max()
    atol = roundings(sums=1, terms=24) * EPS * float(logits * v.abs().max())
    torch.testing.assert_close(out.double(), oracle(q, k, v, scale=0.2, **options), atol=atol, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_low_precision_error_is_below_eager_attention(dtype, softcap):
    k, v, pages = paged(300, H=2, P=16, D=64, dtype=dtype)
    q = (torch.randn(1, 6, 1, 64, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    exact = oracle(q, k, v, scale=0.125, softcap=softcap)
    eager_k, eager_v = (x.repeat_interleave(3, 1) for x in (k, v))
    logits = q @ eager_k.transpose(2, 3) * 0.125
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    eager = logits.float().softmax(-1).to(dtype) @ eager_v
    out = paged_attention(attention_call(q, scale=0.125, softcap=softcap), pages, n_tokens=300)
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= (eager - exact).abs().max()


@pytest.mark.parametrize("per_head", [False, True])
def test_reads_through_a_page_table_and_nothing_else(per_head):
    _, _, pages = paged(96, H=2, P=16, D=8)
    table = torch.tensor([[4, 0, 3], [1, 2, 5]]) if per_head else torch.tensor([4, 0, 3])
    slots = table if per_head else table.expand(2, 3)
    kv = torch.stack([pages[slots[h], h].transpose(0, 1).flatten(1, 2) for h in range(2)])
    q = torch.randn(1, 4, 1, 8)
    expected = oracle(q, kv[None, :, 0, :40], kv[None, :, 1, :40], scale=0.3)
    poisoned = pages.clone()
    for h in range(2):
        poisoned[[slot for slot in range(6) if slot not in slots[h]], h] = torch.nan
    out = paged_attention(attention_call(q, scale=0.3), poisoned, n_tokens=40, page_table=table)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


def test_pages_past_the_last_token_are_not_read():
    k, v, pages = paged(32, H=2, P=16, D=8, spare=3)
    pages[2:] = torch.nan
    q = torch.randn(1, 4, 1, 8)
    out = paged_attention(attention_call(q, scale=0.3), pages, n_tokens=32)
    torch.testing.assert_close(out.double(), oracle(q, k, v, scale=0.3), atol=2e-6, rtol=1e-5)


def test_masked_tokens_have_no_weight():
    """What the oracles of eviction are made of."""
    k, v, pages = paged(50, H=2, P=16, D=8)
    keep = torch.rand(64, generator=torch.Generator().manual_seed(2)) < 0.4
    keep[50:] = False
    q = torch.randn(1, 4, 1, 8)
    out = masked_attention(attention_call(q, scale=0.3), pages, keep.view(4, 16))
    torch.testing.assert_close(out.double(), oracle(q, k, v, scale=0.3, keep_ST=keep[:50]), atol=2e-6, rtol=1e-5)


def test_parts_merge_to_the_whole_even_with_an_empty_one_and_large_logits():
    k, v, pages = paged(64, H=2, P=16, D=8)
    q = torch.randn(1, 4, 1, 8) * 60
    cuts = [(0, 1, 16), (1, 3, 32), (3, 3, 0), (3, 4, 16)]
    parts = [paged_partial(q, pages[a:b], n_tokens=n, scale=1.0) for a, b, n in cuts]
    sinks = torch.tensor([100.0, -100.0, 0.0, 30.0])
    for sink_logits in (None, sinks):
        out = merge_partials(parts, q, sink_logits=sink_logits)
        expected = oracle(q, k, v, scale=1.0, sink_logits=sink_logits)
        assert out.isfinite().all()
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)


def test_wrong_calls_are_refused():
    _, _, pages = paged(16, H=2, P=16, D=8)
    with pytest.raises(ValueError, match="one query"):
        paged_attention(attention_call(torch.randn(1, 4, 2, 8), scale=1.0), pages, n_tokens=16)
    with pytest.raises(ValueError, match="do not fit"):
        paged_attention(attention_call(torch.randn(1, 4, 1, 8), scale=1.0), pages, n_tokens=17)
    with pytest.raises(ValueError, match="as many keys"):
        attention_with_lse(*(torch.randn(1, 2, n, 8) for n in (3, 5, 5)), causal=True, scale=1.0)


SINKS = torch.tensor([1.0, -2.0, 0.5, 4.0])


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"sink_logits": SINKS}, {"softcap": 3.0, "sink_logits": SINKS}]
)
@pytest.mark.parametrize("window", [None, 1, 20, 150, 1000])
@pytest.mark.parametrize(("S", "T"), [(1, 1), (1, 40), (33, 33), (33, 100), (700, 900)])
def test_chunk_attention_equals_the_oracle(S, T, window, options):
    generator = torch.Generator().manual_seed(S + T)
    q = torch.randn(1, 4, S, 16, generator=generator) * 2
    k, v = (torch.randn(1, 2, T, 16, generator=generator) for _ in range(2))
    i, j = torch.arange(T - S, T)[:, None], torch.arange(T)[None]
    keep = (j <= i) & (j > i - (window or T))
    out = chunk_attention(q, k, v, scale=0.25, window=window, **options)
    torch.testing.assert_close(out.double(), oracle(q, k, v, scale=0.25, keep_ST=keep, **options), atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("most_elements", [1, 40_000, 2**26])
@pytest.mark.parametrize(("S", "T", "window"), [(300, 300, 150), (300, 400, 150), (100, 700, 150), (64, 64, 20)])
def test_both_ways_through_a_window_are_exact_in_any_number_of_parts(monkeypatch, S, T, window, most_elements):
    """A CPU takes the fused one where it can; a GPU in fp32 and soft caps take the other. Two sequences at once."""
    monkeypatch.setattr(prefill_attention, "_EXPLICIT_ELEMENTS", most_elements)
    draws = torch.Generator().manual_seed(T)
    q = torch.randn(2, 4, S, 16, generator=draws)
    k, v = (torch.randn(2, 2, T, 16, generator=draws) for _ in range(2))
    i, j = torch.arange(T - S, T)[:, None], torch.arange(T)[None]
    expected = oracle(q, k, v, scale=0.25, keep_ST=(j <= i) & (j > i - window))
    fused, lse = prefill_attention._fused_windowed(q, k, v, scale=0.25, window=window)
    explicit = prefill_attention._windowed(q, k, v, scale=0.25, window=window, softcap=None, sink_logits=None)
    logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) * 0.25
    hidden = ~((j <= i) & (j > i - window))
    for out in (fused, explicit):
        torch.testing.assert_close(out.double(), expected, atol=4e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), logits.masked_fill(hidden, -torch.inf).logsumexp(-1), atol=4e-6, rtol=1e-5)


def masked_window(q_BQSD, k_BHTD, v_BHTD, *, scale, window):
    """What ``windowed_attention`` does, written out: it runs on CUDA alone."""
    S, T = q_BQSD.shape[2], k_BHTD.shape[2]
    i, j = torch.arange(T - S, T)[:, None], torch.arange(T)[None]
    return oracle(q_BQSD, k_BHTD, v_BHTD, scale=scale, keep_ST=(j <= i) & (j > i - window)).to(q_BQSD.dtype)


@pytest.mark.parametrize("window", [1, 20, 64, 99])
@pytest.mark.parametrize(("S", "T"), [(2, 100), (33, 100), (100, 100), (70, 300)])
def test_a_fused_window_is_given_the_keys_its_queries_see_and_no_others(monkeypatch, S, T, window):
    """Where a fused window runs, chunk_attention hands it a part of the keys: the answer is that of all."""
    lengths = []

    def fused(q, k, v, **options):
        lengths.append((k.shape[2], v.shape[2]))
        return masked_window(q, k, v, **options)

    monkeypatch.setattr(prefill_attention, "flash_window_runs_on", lambda q: True)
    monkeypatch.setattr(prefill_attention, "windowed_attention", fused)
    draws = torch.Generator().manual_seed(S + T)
    q = torch.randn(1, 4, S, 16, generator=draws)
    k, v = (torch.randn(1, 2, T, 16, generator=draws) for _ in range(2))
    out = chunk_attention(q, k, v, scale=0.25, window=window)
    torch.testing.assert_close(out, masked_window(q, k, v, scale=0.25, window=window), atol=1e-6, rtol=1e-5)
    assert lengths == [(min(T, S + window - 1),) * 2]


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"sink_logits": SINKS}])
def test_what_no_fused_window_knows_does_not_go_there(monkeypatch, options):
    def refuse(*arguments, **given):
        raise AssertionError("it takes neither a soft cap nor sinks")

    monkeypatch.setattr(prefill_attention, "flash_window_runs_on", lambda q: True)
    monkeypatch.setattr(prefill_attention, "windowed_attention", refuse)
    q, k, v = (torch.randn(1, heads, 40, 16) for heads in (4, 2, 2))
    i, j = torch.arange(40)[:, None], torch.arange(40)[None]
    expected = oracle(q, k, v, scale=0.25, keep_ST=(j <= i) & (j > i - 8), **options)
    out = chunk_attention(q, k, v, scale=0.25, window=8, **options)
    torch.testing.assert_close(out.double(), expected, atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"sink_logits": SINKS}])
@pytest.mark.parametrize(("window", "T"), [(1, 40), (39, 40), (40, 40), (41, 40), (128, 3000)])
def test_one_query_takes_its_last_keys_without_a_mask(monkeypatch, window, T, options):
    """Keys before the window are not even read: here they are NaN."""

    def refuse(*arguments, **given):
        raise AssertionError("no masked path for one query")

    monkeypatch.setattr(prefill_attention, "_windowed", refuse)
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, T, 16), torch.randn(1, 2, T, 16)
    seen = slice(max(0, T - window), T)
    expected = oracle(q, k[:, :, seen], v[:, :, seen], scale=0.25, **options)
    k[:, :, : seen.start], v[:, :, : seen.start] = torch.nan, torch.nan
    out = chunk_attention(q, k, v, scale=0.25, window=window, **options)
    torch.testing.assert_close(out.double(), expected, atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_fused_window_on_a_cpu(dtype):
    assert not flash_window_runs_on(torch.zeros(1, 1, 1, 64, dtype=dtype))


class OnCuda:
    """As much of a CUDA tensor as the question needs."""

    device = torch.device("cuda")

    def __init__(self, dtype, D):
        self.dtype, self.shape = dtype, (1, 6, 100, D)


@pytest.mark.parametrize(
    ("dtype", "D", "runs"),
    [(torch.bfloat16, 64, True), (torch.float16, 256, True), (torch.float32, 64, False), (torch.bfloat16, 36, False),
     (torch.bfloat16, 264, False)],
)  # fmt: skip
def test_a_fused_window_is_for_half_precision_and_sizes_that_flash_takes(dtype, D, runs):
    assert flash_window_runs_on(OnCuda(dtype, D)) is runs


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128, 80, 36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype, D):
    k, v, pages = paged(700, H=2, P=64, D=D, dtype=dtype)
    q = torch.randn(1, 6, 1, D).to(dtype)
    exact = oracle(q, k, v, scale=0.125)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    out = paged_attention(attention_call(q.cuda(), scale=0.125), pages.cuda(), n_tokens=700)
    torch.testing.assert_close(out.double().cpu(), exact, atol=tolerance, rtol=tolerance)
    chunk = torch.randn(1, 6, 130, D).to(dtype)
    keep = torch.arange(570, 700)[:, None] >= torch.arange(700)[None]
    for window in (None, 90):
        seen = keep & (torch.arange(700)[None] > torch.arange(570, 700)[:, None] - (window or 700))
        out = chunk_attention(chunk.cuda(), k.cuda(), v.cuda(), scale=0.125, window=window)
        expected = oracle(chunk, k, v, scale=0.125, keep_ST=seen)
        torch.testing.assert_close(out.double().cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_large_attention_on_hopper_is_exact(causal: bool, D: int):
    """Past the size from which cuDNN is asked; some rows against fp64."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    H = 8
    S, T = (16384, 16384) if causal else (8192, 32768)
    draws = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (torch.randn((1, H, n, D), generator=draws, device="cuda").bfloat16() for n in (S, T, T))
    out, lse = attention_with_lse(q, k, v, causal=causal, scale=D**-0.5)
    rows = torch.tensor([0, 1, 127, 128, 5000, S - 1], device="cuda")
    logits = q[:, :, rows].double() @ k.double().mT * D**-0.5
    if causal:
        logits = logits.masked_fill(torch.arange(T, device="cuda") > rows[:, None], -torch.inf)
    torch.testing.assert_close(lse[:, :, rows].double(), logits.logsumexp(-1), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(out[:, :, rows].double(), logits.softmax(-1) @ v.double(), atol=2e-3, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("S", "T"), [(1, 40), (1, 400), (33, 33), (700, 900), (2048, 6000)])
@pytest.mark.parametrize("window", [1, 20, 128])
def test_fused_window_equals_the_oracle(S: int, T: int, window: int):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    draws = torch.Generator(device="cuda").manual_seed(0)
    q = torch.randn((1, S, 6, 64), generator=draws, device="cuda").bfloat16().transpose(1, 2)
    k, v = (torch.randn((1, 2, T, 64), generator=draws, device="cuda").bfloat16() for _ in range(2))
    out = chunk_attention(q, k, v, scale=0.125, window=window)
    expected = chunk_attention(q.float().cpu(), k.float().cpu(), v.float().cpu(), scale=0.125, window=window)
    torch.testing.assert_close(out.float().cpu(), expected, atol=2e-2, rtol=2e-2)
