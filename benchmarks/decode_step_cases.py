"""The parts of ``decode_step.py``: a published shape with random weights, random KV, steps and prefills timed.

Nothing here says anything about accuracy. Layers share one host copy of random K and V; on the device each layer holds
its own. ``SMOKE`` is the same in a size that a CPU runs in seconds, every step eager: it shows that the parts run, and
its times mean nothing.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from step_times import Row, decode_times, median_s, times_or_oom

from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.models import wrap_model
from kvscope.harness.engine.presets import WEIGHTS_SEED, preset_config
from kvscope.methods.attention import stored_attention
from kvscope.methods.base import AttentionCall
from kvscope.methods.fp8_keys import pack, quantize
from kvscope.methods.kernels.paged_decode.inputs import PagedKV
from kvscope.methods.lsa.indexer import Indexer
from kvscope.methods.lsa.indexer_config import IndexerConfig, default_sizes
from kvscope.methods.lsa.indexer_selection import IndexerSelector
from kvscope.methods.lsa.method import Lsa
from kvscope.methods.lsa.options import LsaConfig
from kvscope.methods.lsa.selection import NothingToChoose
from kvscope.methods.registry import create_method
from kvscope.methods.store import PromptKV

KEYS = "benchmark_keys"
TAU = 64


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is.

    Attributes:
        preset: the shape, layers aside.
        n_layers: of the whole model; ``n_prefill_layers`` of the one that is prefilled.
        lengths_tokens: of TPOT; ``dense_most_tokens`` is the longest that full residency is tried at, None: as the
            card's memory allows.
        long_tokens: where attention and refreshes are compared; ``prefill_tokens`` where prefill is.
        prefill_chunks: chunk sizes of prefill attention.
        budget_tokens: of lsa.
        graph: what ``Session`` is asked for.
        eager_steps, n_steps: steps timed eagerly and as a graph.
    """

    preset: str
    n_layers: int
    n_prefill_layers: int
    lengths_tokens: tuple[int, ...]
    dense_most_tokens: int | None
    long_tokens: int
    prefill_tokens: int
    prefill_chunks: tuple[int, ...]
    budget_tokens: int
    device: str
    dtype: torch.dtype
    graph: Any
    eager_steps: int = 12
    n_steps: int = 2 * TAU + 16


FULL = Scale(
    preset="preset:llama-3.1-8b",
    n_layers=32,
    n_prefill_layers=4,
    lengths_tokens=tuple(k * 1024 for k in (8, 32, 128, 256, 384, 512)),
    dense_most_tokens=None,
    long_tokens=512 * 1024,
    prefill_tokens=128 * 1024,
    prefill_chunks=(2048, 4096, 8192),
    budget_tokens=16_384,
    device="cuda",
    dtype=torch.bfloat16,
    graph="on",
)
SMOKE = Scale(
    preset="preset:tiny",
    n_layers=4,
    n_prefill_layers=3,
    lengths_tokens=(1024, 2048),
    dense_most_tokens=1024,
    long_tokens=8192,
    prefill_tokens=512,
    prefill_chunks=(128,),
    budget_tokens=512,
    device="cpu",
    dtype=torch.float32,
    graph="auto",
    eager_steps=3,
    n_steps=2 * TAU + 2,
)


def build(scale: Scale, n_layers: int) -> LoadedModel:
    """Return a model of the shape with random weights, drawn on its device."""
    from transformers import AutoModelForCausalLM

    config = preset_config(scale.preset)
    config.num_hidden_layers = n_layers
    torch.manual_seed(WEIGHTS_SEED)
    with torch.device(scale.device):
        model = AutoModelForCausalLM.from_config(config, dtype=scale.dtype, attn_implementation="eager")
    return wrap_model(model, None, spec=scale.preset, name=scale.preset)


def heads_of(scale: Scale) -> tuple[int, int, int]:
    """Return query heads, KV heads and head size."""
    config = preset_config(scale.preset)
    return config.num_attention_heads, config.num_key_value_heads, config.head_dim


class Prompts:
    """Random prompts of any length up to a longest: one host copy of K and V, read by every layer."""

    def __init__(self, loaded: LoadedModel, most_tokens: int) -> None:
        shape = loaded.shape
        n_pages = shape.pages(most_tokens)
        size = (n_pages, shape.n_kv_heads, 2, shape.page_tokens, shape.head_dim)
        self._pages = torch.empty(size, dtype=loaded.dtype, pin_memory=loaded.device.type == "cuda")
        for start in range(0, n_pages, 1024):
            part = self._pages[start : start + 1024]
            part.copy_(torch.randn(part.shape, dtype=loaded.dtype, device=loaded.device))
        self._loaded = loaded
        n = len(shape.layers)
        heads, key_dim, rank = default_sizes(shape.hidden_size)
        config = IndexerConfig(
            model="benchmark",
            model_revision=shape.revision,
            layers=tuple(shape.layers[i] for i in sorted({n // 4, n * 3 // 10, n // 2})),
            chunk_tokens=64,
            tau=TAU,
            hidden_size=shape.hidden_size,
            key_features=shape.n_kv_heads * shape.head_dim,
            heads=heads,
            key_dim=key_dim,
            rank=rank,
        )
        self.indexer = Indexer.untrained(config, seed=0).to(loaded.device).requires_grad_(False)

    def of(self, n_tokens: int) -> PromptKV:
        """Return a prompt; keys of the indexer and hidden states are random, too."""
        shape, device, config = self._loaded.shape, self._loaded.device, self.indexer.config
        n_chunks = n_tokens // config.chunk_tokens
        keys = {
            layer: pack(*quantize(torch.randn((n_chunks, config.key_dim), device=device))) for layer in config.layers
        }
        hidden = torch.randn((1, shape.hidden_size), dtype=self._loaded.dtype, device=device)
        return PromptKV(
            shape=shape,
            n_tokens=n_tokens,
            pages=dict.fromkeys(shape.layers, self._pages[: shape.pages(n_tokens)]),
            dtype=self._loaded.dtype,
            last_hidden=dict.fromkeys(range(shape.n_layers), hidden),
            metadata={KEYS: keys},
        )

    def lsa(self, **options: Any) -> Lsa:
        """Return lsa with this indexer of random weights."""
        indexer = self.indexer

        class Synthetic(Lsa):
            def observed_layers(self, shape: Any) -> tuple[int, ...]:
                return indexer.config.layers

            def open(self, prompt: PromptKV, device: Any, *, reserve_tokens: int = 0) -> Any:
                layout = self.layout(prompt.n_tokens)
                selector: Any = NothingToChoose()
                if layout.n_candidates:
                    selector = IndexerSelector(
                        indexer, prompt, torch.device(device), layout=layout, rule=self.rule(layout), keys_name=KEYS,
                        states_name=None,
                    )  # fmt: skip
                return self.open_with(prompt, device, selector, layout=layout, reserve_tokens=reserve_tokens)

        return Synthetic(LsaConfig(selection="synthetic", chunk_tokens=64, tau=TAU, **options))


def _holds(loaded: LoadedModel, kv_bytes: int, length_tokens: int, most_tokens: int | None) -> bool:
    """Whether full residency is tried: by length where one is given, else with 3 GiB left beside weights and KV."""
    if most_tokens is not None:
        return length_tokens <= most_tokens
    weights_bytes = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    card_bytes = torch.cuda.get_device_properties(loaded.device).total_memory
    return kv_bytes + weights_bytes + 3 * 2**30 <= card_bytes


def tpot_rows(scale: Scale) -> Iterator[Row]:
    """TPOT against length: dense, lsa at a budget, and lsa at 13.5 % of the tokens; eager and as a graph."""
    loaded = build(scale, scale.n_layers)
    prompts = Prompts(loaded, max(scale.lengths_tokens))
    methods: dict[str, Any] = {
        "dense": create_method("dense"),
        f"lsa {scale.budget_tokens} tokens": prompts.lsa(budget_tokens=scale.budget_tokens),
        "lsa 13.5 %": prompts.lsa(budget_fraction=0.135),
    }
    for length in scale.lengths_tokens:
        for name, method in methods.items():
            needed_bytes = loaded.shape.dense_kv_bytes(length)
            if name == "dense" and not _holds(loaded, needed_bytes, length, scale.dense_most_tokens):
                yield {"part": "tpot", "case": name, "length_tokens": length, "status": "does not fit",
                       "reason": f"{needed_bytes / 2**30:.0f} GiB of KV beside the weights"}  # fmt: skip
                continue
            for step, n_steps, graph in (
                ("graph", scale.n_steps, scale.graph), ("eager", scale.eager_steps, "off"),
            ):  # fmt: skip
                row = {"part": "tpot", "case": name, "length_tokens": length, "step": step}
                prompt = partial(prompts.of, length - n_steps)
                found = times_or_oom(loaded, method, prompt, n_steps=n_steps, graph=graph)
                if "status" in found:
                    yield row | found
                    continue
                step_s = found.pop("step_s")
                found.pop("before_s")
                yield (
                    row
                    | found
                    | {
                        "tpot_s": statistics.median(step_s[2:]),
                        "mean_step_s": statistics.mean(step_s[2:]),
                        "steps": n_steps,
                    }
                )


def refresh_rows(scale: Scale) -> Iterator[Row]:
    """What a refresh takes by itself, and how much longer an interval of tau steps is for it."""
    loaded = build(scale, scale.n_layers)
    prompts = Prompts(loaded, scale.long_tokens)
    for length in (scale.long_tokens // 4, scale.long_tokens):
        for refresh in ("sync", "stale1"):
            method = prompts.lsa(budget_tokens=scale.budget_tokens, refresh=refresh)
            n_steps = 4 * TAU + 1
            prompt = prompts.of(length - n_steps)
            alone = decode_times(
                loaded, method, prompt, n_steps=2 * TAU + 1, graph=scale.graph, timed_refresh=True
            )  # fmt: skip
            found = decode_times(loaded, method, prompt, n_steps=n_steps, graph=scale.graph)
            step_s = found["step_s"]
            quiet_s = statistics.median(step_s)
            # The first interval follows the opening; a stale copy begins with the second and is read from the third.
            intervals_s = [sum(step_s[i * TAU : (i + 1) * TAU]) for i in range(1, 4)]
            stall_s = statistics.median(intervals_s) - TAU * quiet_s
            refresh_s = statistics.median(alone["before_s"][TAU::TAU])
            recalled_bytes = statistics.mean(found["recalled_bytes"])
            yield {
                "part": "refresh",
                "case": refresh,
                "length_tokens": length,
                "backends": found["backends"],
                "refresh_s": refresh_s,
                "recalled_bytes": recalled_bytes,
                "recalled_gb_per_s": recalled_bytes / refresh_s / 1e9,
                "hit_rate": found["hit_rate"],
                "tpot_s": quiet_s,
                "stall_s": stall_s,
                "stall_share": stall_s / (TAU * quiet_s),
                "refresh_share": refresh_s / (TAU * quiet_s),
                "captures": found["captures"],
            }


def attention_rows(scale: Scale) -> Iterator[Row]:
    """Attention of one query over one layer: everything, against what lsa holds at its budget."""
    n_heads, H, D = heads_of(scale)
    P, n = 64, scale.long_tokens
    window_tokens = min(8192, max(128, n // 64)) + 64  # with the sinks' chunk
    kinds = {"dense": ([n], 2), f"lsa {scale.budget_tokens} tokens": (
        [window_tokens, scale.budget_tokens - window_tokens], 8)}  # fmt: skip
    for name, (tokens, n_sets) in kinds.items():
        calls = []
        for _ in range(n_sets):
            q = torch.randn((1, n_heads, 1, D), device=scale.device).to(scale.dtype)
            stores = []
            for index, n_tokens in enumerate(tokens):
                size = (n_tokens // P, H, 2, P, D)
                pages = torch.randn(size, device=scale.device, dtype=scale.dtype)
                count = torch.full((1, 1), n_tokens, dtype=torch.int32, device=scale.device)
                table = torch.randperm(len(pages), device=scale.device).int().view(1, 1, -1) if index else None
                stores.append(PagedKV(pages=pages, n_tokens=count, page_table=table))
            call = AttentionCall(query=q, key=q, value=q, scale=D**-0.5)  # K and V are in the stores
            calls.append(lambda call=call, stores=stores: stored_attention(call, stores))
        one_s = median_s(calls, scale.device)
        yield {
            "part": "attention",
            "case": name,
            "length_tokens": n,
            "one_layer_s": one_s,
            "all_layers_s": one_s * scale.n_layers,
            "note": f"one layer's KV, times {scale.n_layers} layers",
        }
