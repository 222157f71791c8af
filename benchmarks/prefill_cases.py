"""The parts of ``decode_step.py`` that are about prefill: attention of one layer, and a model of a few layers."""

import time
from collections.abc import Iterator

import torch
from decode_step_cases import Scale, build, heads_of
from step_times import Row

from kvscope.harness.engine.prefill import prefill
from kvscope.harness.engine.prefill_attention import chunk_attention


def prefill_attention_rows(scale: Scale) -> Iterator[Row]:
    """Attention of a whole prefill of one layer, chunk by chunk as the engine calls it."""
    n_heads, H, D = heads_of(scale)
    N = scale.prefill_tokens
    cuda = scale.device == "cuda"
    k, v = (torch.randn((1, H, N, D), dtype=scale.dtype, device=scale.device) for _ in range(2))
    for S in scale.prefill_chunks:
        # As the model hands it over: heads behind tokens in memory.
        q = torch.randn((1, S, n_heads, D), dtype=scale.dtype, device=scale.device).transpose(1, 2)

        def layer(q: torch.Tensor = q, S: int = S) -> None:
            for end in range(S, N + 1, S):
                chunk_attention(q, k[:, :, :end], v[:, :, :end], scale=D**-0.5)

        found = []
        for _ in range(3):
            if cuda:
                torch.cuda.synchronize()
            started_s = time.perf_counter()
            layer()
            if cuda:
                torch.cuda.synchronize()
            found.append(time.perf_counter() - started_s)
        flops = 4 * n_heads * D * (N * (N + 1) // 2)
        time_s = min(found[1:])
        yield {"part": "prefill_attention", "case": f"chunks of {S}", "length_tokens": N, "time_s": time_s,
               "tflop_per_s": flops / time_s / 1e12, "note": "one layer, causal FLOPs"}  # fmt: skip


def prefill_rows(scale: Scale, *, peak_flop_per_s: float | None) -> Iterator[Row]:
    """Prefill of a model of a few layers through the engine: tokens/s, and model FLOP utilisation."""
    loaded = build(scale, scale.n_prefill_layers)
    shape, config = loaded.shape, loaded.model.config
    N, M, F = scale.prefill_tokens, config.hidden_size, config.intermediate_size
    kv = 2 * M * shape.n_kv_heads * shape.head_dim
    q = M * shape.n_q_heads * shape.head_dim
    full, last = 2 * q + kv + 3 * M * F, q + kv  # weights; the last layer stores K and V and ends
    attention_flops = 4 * shape.n_q_heads * shape.head_dim * (N * (N + 1) // 2)
    n_full = scale.n_prefill_layers - 1
    flops = 2 * N * (n_full * full + last) + n_full * attention_flops
    ids = torch.randint(0, config.vocab_size, (N,), generator=torch.Generator().manual_seed(0)).tolist()
    for S in scale.prefill_chunks:
        prefill(loaded, ids, chunk_tokens=S)  # page-locks the host memory that the next one finds locked
        time_s = prefill(loaded, ids, chunk_tokens=S).prefill_s
        whole_s = time_s * (2 * N * ((scale.n_layers - 1) * full + last) + (scale.n_layers - 1) * attention_flops)
        whole_s /= flops
        yield {
            "part": "prefill",
            "case": f"{scale.n_prefill_layers} layers, chunks of {S}",
            "length_tokens": N,
            "time_s": time_s,
            "tflop_per_s": flops / time_s / 1e12,
            "model_flop_utilisation": None if peak_flop_per_s is None else flops / time_s / peak_flop_per_s,
            "tokens_per_s_of_all_layers": N / whole_s,
            "note": f"tokens/s at {scale.n_layers} layers by their FLOPs; copies to the host included",
        }
