"""The parts of ``v4_decode_step.py``: DeepSeek-V4-Flash's geometry, random entries, steps and the native top-k timed.

Weights and entries are random: times and bytes mean something, answers do not. A token of the released model goes to 6
of 256 routed experts, and the others' weights fit no card: here there are 6, so that a step reads the weights that the
released one reads. One layer's entries lie on the host for all; on the device each layer holds its own.

Shapes: n entries of a CSA layer, D head size, E indexer key size, I indexer heads.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from step_times import Row, decode_times, median_s, times_or_oom
from transformers import AutoModelForCausalLM, DeepseekV4Config

from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.models import wrap_model
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.engine.presets import PRESET_MAX_TOKENS, WEIGHTS_SEED, find_preset
from kvscope.harness.passes.floor import bus_bytes_per_s, copy_bytes_per_s, floor_s, weights_read_bytes
from kvscope.methods.kernels.index_topk.ops import index_topk
from kvscope.methods.registry import create_method

NAME = "preset:deepseek-v4-flash"
K = 1024
_CSA, _HCA, _SLIDING = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"
#: Left free beside weights and cache: activations, graphs, a layer's old and new set during a refresh.
SPARE_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is.

    Attributes:
        values: what differs from the preset's configuration.
        lengths_tokens: prompt and steps.
        share: of the tokens that lsa keeps; ``churn``: of the kept entries that a refresh replaces.
        tau: decode steps between refreshes.
        n_steps, eager_steps: timed as a graph and eagerly.
        whole_layers: of the model that the geometry is of.
    """

    values: dict[str, Any]
    lengths_tokens: tuple[int, ...]
    share: float = 0.135
    churn: float = 0.11
    tau: int = 64
    n_steps: int = 2 * 64 + 16
    eager_steps: int = 8
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    graph: Any = "on"
    whole_layers: int = 43


FULL = Scale(
    values={"n_routed_experts": 6, "mlp_layer_types": ["moe"] * 43},
    lengths_tokens=tuple(k * K for k in (64, 128, 256, 512, 1024, 2048, 4000)),
)
TINY = Scale(
    values={
        "vocab_size": 512, "hidden_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "head_dim": 32, "q_lora_rank": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 8, "index_head_dim": 16, "index_topk": 16,
        "sliding_window": 32, "hc_mult": 2, "layer_types": [_SLIDING, _CSA, _HCA, _CSA], "mlp_layer_types": ["moe"] * 4,
        "compress_rates": {_CSA: 4, _HCA: 32},
    },
    lengths_tokens=(512, 1024), share=0.5, churn=0.25, tau=4, n_steps=10, whole_layers=4,
    eager_steps=3, device="cpu", dtype=torch.float32, graph="auto",
)  # fmt: skip


def with_layers(scale: Scale, n_layers: int) -> Scale:
    """Return the scale with the first layers of the preset alone."""
    layer_types = find_preset(NAME).values["layer_types"][:n_layers]
    values = {"num_hidden_layers": n_layers, "layer_types": layer_types, "mlp_layer_types": ["moe"] * n_layers}
    return replace(scale, values={**scale.values, **values})


def build(scale: Scale) -> LoadedModel:
    """Return a model of the geometry with random weights, drawn on its device."""
    values = {**find_preset(NAME).values, **scale.values}
    config = DeepseekV4Config(**values, max_position_embeddings=PRESET_MAX_TOKENS, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(WEIGHTS_SEED)
    with torch.device(scale.device):
        model = AutoModelForCausalLM.from_config(config, dtype=scale.dtype, attn_implementation="eager")
    return wrap_model(model.eval(), None, spec=NAME, name=NAME)


class Prompts:
    """Prompts of any length up to a longest: a few real tokens, and random entries before them."""

    def __init__(self, loaded: LoadedModel, most_tokens: int) -> None:
        self._loaded, config = loaded, loaded.model.config
        n = most_tokens // loaded.shape.cache.csa_rate
        self._host = {
            "compressor": self._random(n, config.head_dim),
            "indexer": self._random(n, config.index_head_dim),
        }

    def _random(self, n: int, width: int) -> torch.Tensor:
        cuda = self._loaded.device.type == "cuda"
        entries_1nD = torch.empty((1, n, width), dtype=self._loaded.dtype, pin_memory=cuda)
        for start in range(0, n, 65_536):
            part = entries_1nD[:, start : start + 65_536]
            part.copy_(torch.randn(part.shape, dtype=part.dtype, device=self._loaded.device))
        return entries_1nD

    def of(self, n_tokens: int) -> Any:
        """Return a prompt: windows and pending tokens are those of its last few, which the model did read."""
        loaded, cache = self._loaded, self._loaded.shape.cache
        reach = loaded.backend.reach_tokens(loaded.shape)
        ids = [1 + i % 97 for i in range(reach + n_tokens % cache.hca_rate)]
        prompt = prefill(loaded, ids)
        counts = {_CSA: n_tokens // cache.csa_rate, _HCA: n_tokens // cache.hca_rate}
        for kind, layer in zip(loaded.model.config.layer_types, prompt.rest.layers, strict=True):
            layer.cumulative_length = n_tokens
            if kind == _SLIDING:
                continue
            layer.entry_count = dict.fromkeys(layer.entry_count, counts[kind])
            if kind == _HCA:
                entries = torch.randn((1, counts[kind], loaded.shape.head_dim), dtype=loaded.dtype)
                layer.compressed_kv = {"compressor": entries}
        host = {name: entries[:, : counts[_CSA]] for name, entries in self._host.items()}
        return replace(prompt, n_tokens=n_tokens, host=dict.fromkeys(loaded.shape.layers, host))


def methods(scale: Scale) -> dict[str, Any]:
    """Return what is compared."""
    lsa = f"lsa:selection=synthetic,budget_fraction={scale.share},tau={scale.tau},churn={scale.churn}"
    return {
        "dense": create_method("dense"),
        f"lsa {scale.share:.1%}": create_method(lsa),
        "recency": create_method("recency"),
    }


def fits(loaded: LoadedModel, length_tokens: int) -> bool:
    """Whether everything resident fits the card beside the weights; on a CPU always."""
    if loaded.device.type != "cuda":
        return True
    needed = loaded.shape.dense_kv_bytes(length_tokens) + sum(each.nbytes for each in loaded.model.parameters())
    return needed + SPARE_BYTES <= torch.cuda.get_device_properties(loaded.device).total_memory


def tpot_rows(scale: Scale, loaded: LoadedModel) -> Iterator[Row]:
    """TPOT of each method at each length, as a graph and eagerly, over the least time that its bytes take.

    A step that begins with a refresh is in the mean and not in the median. ``floor_s`` is bytes read over the measured
    copy, recalled ones over the bus.
    """
    lengths = [length for length in scale.lengths_tokens if fits(loaded, length)]
    for length in sorted(set(scale.lengths_tokens) - set(lengths)):
        reason = f"{loaded.shape.dense_kv_bytes(length) / 2**30:.0f} GiB of cache beside the weights"
        yield {"part": "tpot", "case": "all", "length_tokens": length, "status": "does not fit", "reason": reason}
    copy, bus = copy_bytes_per_s(loaded.device), bus_bytes_per_s(loaded.device)
    weights_bytes = weights_read_bytes(loaded)
    prompts = Prompts(loaded, max(lengths))
    for length in lengths:
        for name, method in methods(scale).items():
            for step, n_steps, graph in (("graph", scale.n_steps, scale.graph), ("eager", scale.eager_steps, "off")):
                row: Row = {"part": "tpot", "case": name, "length_tokens": length, "step": step}
                prompt = partial(prompts.of, length - n_steps)
                found = times_or_oom(loaded, method, prompt, n_steps=n_steps, graph=graph)
                if "status" in found:
                    yield row | found
                    continue
                step_s = found.pop("step_s")[2:]
                found.pop("before_s")
                recalled = found.pop("recalled_bytes") or [0]
                recalled_bytes = statistics.mean(recalled) / scale.tau
                cache_bytes = found["bytes_read_per_step"]
                least_s = floor_s(
                    weights_bytes + cache_bytes, recalled_bytes, copy_bytes_per_s=copy, bus_bytes_per_s=bus,
                    recalls_behind=False,
                )  # fmt: skip
                yield row | found | {
                    "tpot_s": statistics.median(step_s), "mean_step_s": statistics.mean(step_s), "steps": n_steps,
                    "weights_read_bytes": weights_bytes, "cache_read_bytes": cache_bytes,
                    "recalled_bytes_per_step": recalled_bytes, "copy_bytes_per_s": copy, "bus_bytes_per_s": bus,
                    "floor_s": least_s, "times_floor": statistics.median(step_s) / least_s,
                    **layers_of(scale, loaded, statistics.median(step_s)),
                }  # fmt: skip


def layers_of(scale: Scale, loaded: LoadedModel, tpot_s: float) -> Row:
    """Return how many layers were timed and, where not all, an estimate of all by their number."""
    n_layers, whole = loaded.shape.n_layers, scale.whole_layers
    if n_layers == whole:
        return {"layers": n_layers}
    return {
        "layers": n_layers,
        "tpot_s_times_layers": tpot_s * whole / n_layers,
        "times_layers_note": f"{whole} / {n_layers} of the measured step; the output layer counts as often",
    }


def refresh_rows(scale: Scale, loaded: LoadedModel) -> Iterator[Row]:
    """What a refresh takes by itself at the longest length, and what it copies."""
    length = max(length for length in scale.lengths_tokens if fits(loaded, length))
    n_steps = 3 * scale.tau + 1
    name, method = list(methods(scale).items())[1]
    prompt = Prompts(loaded, length).of(length - n_steps)
    found = decode_times(loaded, method, prompt, n_steps=n_steps, graph=scale.graph, timed_refresh=True)
    refresh_s = statistics.median(found["before_s"][scale.tau :: scale.tau])
    recalled_bytes = statistics.mean(found["recalled_bytes"])
    yield {
        "part": "refresh", "case": name, "length_tokens": length, "refresh_s": refresh_s,
        "refresh_s_per_step": refresh_s / scale.tau, "recalled_bytes": recalled_bytes, "hit_rate": found["hit_rate"],
        "recalled_bytes_per_s": recalled_bytes / refresh_s,
    }  # fmt: skip


def topk_rows(scale: Scale, loaded: LoadedModel) -> Iterator[Row]:
    """The native top-k of one layer, at every length: all entries and lsa's share, by the kernel and by torch."""
    config, device = loaded.model.config, loaded.device
    heads, E, k = config.index_n_heads, config.index_head_dim, config.index_topk
    copy = copy_bytes_per_s(device)
    for length in scale.lengths_tokens:
        for case, share in (("dense", 1.0), (f"lsa {scale.share:.1%}", scale.share)):
            n = round(share * length / loaded.shape.cache.csa_rate)
            keys = [torch.randn(n, E, dtype=loaded.dtype, device=device) for _ in range(4 if n * E < 2**28 else 1)]
            q = torch.randn(heads, E, dtype=loaded.dtype, device=device)
            weight, count = torch.randn(heads, device=device), torch.tensor([n], device=device)
            calls: dict[str, Callable[[torch.Tensor], Any]] = {
                "index_topk": partial(by_kernel, q, weight, count, k=min(k, n)),
                "torch": partial(by_torch, q, weight, k=min(k, n)),
            }
            for by, call in calls.items():
                time_s = median_s([partial(call, each) for each in keys], scale.device)
                n_bytes = n * E * keys[0].element_size()
                yield {
                    "part": "topk", "case": f"{case} by {by}", "length_tokens": length, "entries": n, "time_s": time_s,
                    "bytes": n_bytes, "bytes_per_s": n_bytes / time_s, "floor_s": n_bytes / copy,
                    "times_floor": time_s * copy / n_bytes,
                }  # fmt: skip


def by_kernel(
    q_IE: torch.Tensor, weight_I: torch.Tensor, count_1: torch.Tensor, keys_nE: torch.Tensor, *, k: int
) -> torch.Tensor:
    """Return the top-k as a captured step takes it."""
    return index_topk(q_IE, weight_I, keys_nE, count_1, k=k)


def by_torch(q_IE: torch.Tensor, weight_I: torch.Tensor, keys_nE: torch.Tensor, *, k: int) -> torch.Tensor:
    """Return the top-k as torch makes it in the keys' own type: a product, a sum over heads, ``topk``."""
    scores_n = weight_I.to(keys_nE.dtype) @ torch.relu(q_IE @ keys_nE.T)
    return scores_n.float().topk(k, sorted=False).indices
