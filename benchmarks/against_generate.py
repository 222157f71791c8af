"""Dense decoding of a Llama-3.1-8B shape on a GPU against transformers' own ``generate``: seconds a token of both.

    python benchmarks/against_generate.py --out FILE
    python benchmarks/against_generate.py --length 32k --repetitions 2
    python benchmarks/against_generate.py --tiny         # on the CPU, nothing compiled: shows that it runs

Both sides have the same random weights, number format and KV, and decode greedily from the same token. kvscope replays
its captured step. ``generate`` has a static cache of exactly the length, and compiles its forward as it does by
default (``reduce-overhead``: CUDA graphs). The prefill is on neither clock: K and V are drawn and written into both
caches. A token's time is the wall time between two tokens, the loop around the step included; the median counts, behind
the steps in which things compile. Ends with 0 when every ratio is at least 1, 1 when one is not, 3 without a GPU.
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from decode_step_cases import FULL, SMOKE, Prompts, Scale, build
from measure import RESULTS, save_result, say

from kvscope.harness.engine.glue import cache_argument
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.presets import WEIGHTS_SEED, preset_config
from kvscope.harness.engine.session import Session
from kvscope.harness.passes.environment import capture_environment
from kvscope.methods.registry import create_method
from kvscope.methods.store import PromptKV
from kvscope.units import format_length, parse_length

#: Steps before those that count: graphs are recorded, kernels compile.
WARM_STEPS = 16
FIRST_TOKEN = 1
TARGET = 1.0


def kvscope_side(loaded: LoadedModel, prompt: PromptKV, n_steps: int, graph: Any) -> dict[str, Any]:
    """Decode ``n_steps`` tokens by a session; return the seconds of each and the tokens."""
    with Session(loaded, decode_graph=graph) as session:
        session.add(create_method("dense"), prompt, reserve_tokens=n_steps)
        session.prepare()
        token, tokens, step_s = FIRST_TOKEN, [], []
        for _ in range(n_steps):
            started_s = time.perf_counter()
            token = int(session.step([token])[0].argmax())
            step_s.append(time.perf_counter() - started_s)
            tokens.append(token)
        return {"step_s": step_s, "tokens": tokens, "backend": session.step_backend, "capture_s": session.capture_s}


def stock_model(scale: Scale) -> Any:
    """Return transformers' model of the shape, its own attention, with the weights that ``build`` draws."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(WEIGHTS_SEED)
    with torch.device(scale.device):
        model = AutoModelForCausalLM.from_config(
            preset_config(scale.preset), dtype=scale.dtype, attn_implementation="sdpa"
        )
    model.eval()
    return model


def static_cache(model: Any, prompt: PromptKV, n_steps: int) -> Any:
    """Return a static cache that holds the prompt and has room for ``n_steps`` tokens."""
    from transformers import StaticCache

    config, device, n = model.config, model.device, prompt.n_tokens
    cache = StaticCache(config=config, max_cache_len=n + n_steps)
    heads, size = config.num_key_value_heads, config.head_dim
    cache.early_initialization(batch_size=1, num_heads=heads, head_dim=size, dtype=model.dtype, device=device)
    for layer, pages in prompt.pages.items():
        held = cache.layers[layer]
        for index, target in enumerate((held.keys, held.values)):
            # [page, H, P, D] -> [H, N, D]
            whole = pages[:, :, index].to(device).transpose(0, 1).flatten(1, 2)
            target[0, :, :n] = whole[:, :n]
        held.cumulative_length.fill_(n)
    return cache


def generate_side(model: Any, prompt: PromptKV, n_steps: int) -> dict[str, Any]:
    """Decode ``n_steps`` tokens by ``generate``; return the seconds between them, the tokens and what was compiled."""
    from torch._dynamo.utils import counters
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    counters.clear()
    marks_s: list[float] = []

    class Marks(StoppingCriteria):
        """Notes when a token is there; nothing stops."""

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
            input_ids[0, -1].item()  # waits for the token, as the session's caller does
            marks_s.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    # The prompt's ids are not read: its K and V are in the cache. The last one is the token that is fed first.
    ids = torch.full((1, prompt.n_tokens + 1), FIRST_TOKEN, device=model.device)
    cache = static_cache(model, prompt, n_steps)
    started_s = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{cache_argument(model): cache},
        generation_config=GenerationConfig(max_new_tokens=n_steps, do_sample=False, pad_token_id=0),
        stopping_criteria=StoppingCriteriaList([Marks()]),
    )
    step_s = [later - earlier for earlier, later in zip([started_s, *marks_s], marks_s, strict=False)]
    return {
        "step_s": step_s,
        "tokens": out[0, prompt.n_tokens + 1 :].tolist(),
        "compiled_graphs": counters["stats"]["unique_graphs"],  # none the second time: what is compiled stays
        "cuda_graphs_skipped": counters["inductor"]["cudagraph_skips"],
    }


def tpot_s(side: dict[str, Any], warm_steps: int) -> float:
    """Return the median seconds of the steps that count."""
    return statistics.median(side["step_s"][warm_steps:])


def summary(name: str, side: dict[str, Any], warm_steps: int) -> dict[str, Any]:
    """Return what is written of one side."""
    steps = sorted(side.pop("step_s")[warm_steps:])
    side["tokens"] = side["tokens"][:8]
    spread = {"p10_s": steps[len(steps) // 10], "p90_s": steps[len(steps) * 9 // 10]}
    return {"side": name, "tpot_s": statistics.median(steps), **spread, "steps": len(steps), **side}


def equal_tokens(a: list[int], b: list[int]) -> int:
    """Return how many tokens from the first on are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def measure(scale: Scale, lengths: list[int], *, n_steps: int, repetitions: int, save: Any) -> list[dict[str, Any]]:
    """Measure every length; ``save`` is told the rows whenever there are more."""
    n_all = WARM_STEPS + n_steps
    loaded: LoadedModel | None = build(scale, preset_config(scale.preset).num_hidden_layers)
    assert loaded is not None
    prompts = Prompts(loaded, max(lengths))
    kept = {length: prompts.of(length - n_all) for length in lengths}
    ours: dict[int, list[dict[str, Any]]] = {length: [] for length in lengths}
    for length, prompt in kept.items():
        for _ in range(repetitions):
            ours[length].append(kvscope_side(loaded, prompt, n_all, scale.graph))
            say(f"{format_length(length)}: kvscope {1e3 * tpot_s(ours[length][-1], WARM_STEPS):.3f} ms a token")
    loaded = prompts = None  # type: ignore[assignment]
    _let_go()
    model, rows = stock_model(scale), []
    for length, prompt in kept.items():
        torch._dynamo.reset()  # another cache length: compiled anew, with its own shapes
        theirs = []
        for _ in range(repetitions):
            theirs.append(generate_side(model, prompt, n_all))
            _let_go()
            say(f"{format_length(length)}: generate {1e3 * tpot_s(theirs[-1], WARM_STEPS):.3f} ms a token")
        own_s = min(tpot_s(side, WARM_STEPS) for side in ours[length])
        stock_s = min(tpot_s(side, WARM_STEPS) for side in theirs)
        same = equal_tokens(ours[length][0]["tokens"], theirs[0]["tokens"])
        sides = [summary("kvscope", side, WARM_STEPS) for side in ours[length]]
        sides += [summary("generate", side, WARM_STEPS) for side in theirs]
        rows.append(
            {
                "length_tokens": length,
                "kvscope_tpot_s": own_s,
                "generate_tpot_s": stock_s,
                "ratio": stock_s / own_s,
                "target": TARGET,
                "target_met": stock_s / own_s >= TARGET,
                "equal_tokens": f"the first {same} of {n_all}",
                "sides": sides,
            }
        )
        save(rows)
        say(f"{format_length(length)}: {stock_s / own_s:.2f}x")
    return rows


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    """Measure and write JSON after each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=parse_length, action="append", help="repeatable; default 32k and 128k")
    parser.add_argument("--steps", type=int, default=48, help=f"that count, behind {WARM_STEPS} that do not")
    parser.add_argument("--repetitions", type=int, default=1, help="the fastest counts; all are written")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "against_generate_h200.json")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("There is no GPU here; --tiny runs on a CPU.", file=sys.stderr)
        return 3
    scale = SMOKE if options.tiny else FULL
    lengths = options.length or ([1024] if options.tiny else [32 * 1024, 128 * 1024])

    def save(rows: list[dict[str, Any]]) -> None:
        result = {
            "benchmark": "against_generate",
            "what": "dense, seconds a token: kvscope's captured step, and generate with a static cache, compiled",
            "shape": scale.preset,
            "tiny": options.tiny,
            "environment": capture_environment(device="cpu" if options.tiny else "cuda:0"),
            "rows": rows,
        }
        save_result(options.out, result, indent=1)

    with torch.no_grad():
        rows = measure(scale, lengths, n_steps=options.steps, repetitions=options.repetitions, save=save)
    return 0 if all(row["target_met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
