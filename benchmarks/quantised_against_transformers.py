"""What K and V in fewer bits do to a model's predictions: kvscope's packed pages and transformers' QuantizedCache.

Same model, same token ids, float32 on both sides. Each side is held against its own dense cache: the mean divergence KL
of the next token's distribution over a teacher-forced continuation, and the bytes that its cache holds at the end.
transformers' back ends come from PyPI (`pip install optimum-quanto hqq`); one that is not there is a line that says so.

    python benchmarks/quantised_against_transformers.py                     # a Qwen3 with random weights, made here
    python benchmarks/quantised_against_transformers.py --model FOLDER      # any model without sliding layers
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from against_kvpress import make_model
from measure import RESULTS, machine, machine_lines, say, write_result

from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.engine.session import Session
from kvscope.methods.kv_format import FORMATS
from kvscope.methods.registry import create_method

#: Name of a line -> what QuantizedCache is made with. HQQ's axis 0 is its default, axis 1 groups one head's channels.
PEERS: dict[str, dict[str, Any]] = {
    "quanto, 4 bits, axis 0": {"backend": "quanto", "nbits": 4},
    "quanto, 4 bits, axis -1": {"backend": "quanto", "nbits": 4, "axis_key": -1, "axis_value": -1},
    "quanto, 2 bits, axis 0": {"backend": "quanto", "nbits": 2},
    "hqq, 8 bits, axis 0": {"backend": "hqq", "nbits": 8},
    "hqq, 4 bits, axis 0": {"backend": "hqq", "nbits": 4},
    "hqq, 4 bits, axis 1": {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1},
    "hqq, 2 bits, axis 1": {"backend": "hqq", "nbits": 2, "axis_key": 1, "axis_value": 1},
}
Row = dict[str, Any]


def kvscope_logits(loaded: Any, spec: str, prompt: Any, fed: Sequence[int]) -> tuple[torch.Tensor, int]:
    """Return the logits of a teacher-forced decode [n, V], and the bytes of K and V at its end."""
    with Session(loaded) as session:
        member = session.add(create_method(spec), prompt, reserve_tokens=len(fed))
        logits = torch.cat([session.step([token]) for token in fed])
        return logits.float().cpu(), member.cache.footprint().kv_bytes


@torch.inference_mode()
def stock_logits(model: Any, cache: Any, ids: Sequence[int], fed: Sequence[int]) -> tuple[torch.Tensor, int]:
    """The same of stock transformers with a cache of its own."""
    model(input_ids=torch.tensor([list(ids)]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    found = []
    for token in fed:
        out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        found.append(out.logits[0, -1:].float())
    return torch.cat(found), tensor_bytes(cache.layers)


def tensor_bytes(thing: Any, seen: set[int] | None = None) -> int:
    """Return the bytes of every tensor storage that hangs on an object, each once."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, str | int | float | type):
        return 0
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor) and type(thing) in (torch.Tensor, torch.nn.Parameter):
        storage = thing.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    parts = list(thing.values()) if isinstance(thing, dict) else list(thing) if isinstance(thing, list | tuple) else []
    return sum(tensor_bytes(part, seen) for part in [*parts, *getattr(thing, "__dict__", {}).values()])


def divergence(dense_nV: torch.Tensor, other_nV: torch.Tensor) -> float:
    """Return the mean KL(dense || other) of the distributions, in nats."""
    dense, other = dense_nV.log_softmax(-1), other_nV.log_softmax(-1)
    return float((dense.exp() * (dense - other)).sum(-1).mean())


def rows(folder: str, *, length_tokens: int, steps: int, seed: int) -> Iterator[Row]:
    """Measure every format of both sides."""
    loaded = load_model(folder, device="cpu", dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    vocabulary = loaded.model.config.get_text_config().vocab_size
    ids = torch.randint(5, vocabulary, (length_tokens,), generator=generator).tolist()
    fed = torch.randint(5, vocabulary, (steps,), generator=generator).tolist()
    prompt = prefill(loaded, ids)
    dense, dense_bytes = kvscope_logits(loaded, "dense", prompt, fed)
    yield {"side": "kvscope", "format": "dense", "kl_nats": 0.0, "kv_bytes": dense_bytes, "bytes_of_dense": 1.0}
    for name in FORMATS:
        logits, n_bytes = kvscope_logits(loaded, f"dense:kv={name}", prompt, fed)
        yield line("kvscope", name, divergence(dense, logits), n_bytes, dense_bytes)
    yield from peer_rows(folder, ids, fed)


def peer_rows(folder: str, ids: Sequence[int], fed: Sequence[int]) -> Iterator[Row]:
    """The same of transformers' own caches."""
    from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    dense, dense_bytes = stock_logits(model, DynamicCache(config=model.config), ids, fed)
    yield line("transformers", "dense", 0.0, dense_bytes, dense_bytes)
    make: Callable[..., Any] = QuantizedCache
    for name, options in PEERS.items():
        try:
            logits, n_bytes = stock_logits(model, make(config=model.config, **options), ids, fed)
        except Exception as error:  # noqa: BLE001 - a back end that is missing or refuses is a line
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            yield {"side": "transformers", "format": name, "status": "not measured", "reason": reason}
        else:
            yield line("transformers", name, divergence(dense, logits), n_bytes, dense_bytes)


def line(side: str, name: str, kl_nats: float, n_bytes: int, dense_bytes: int) -> Row:
    """Return one row."""
    share = n_bytes / dense_bytes
    return {"side": side, "format": name, "kl_nats": kl_nats, "kv_bytes": n_bytes, "bytes_of_dense": share}


def report(result: dict[str, Any]) -> list[str]:
    """Return the result as Markdown."""
    lines = [
        "# K and V in fewer bits: kvscope and transformers' QuantizedCache",
        "",
        *machine_lines(result["machine"]),
        f"- {result['model']}, {result['length_tokens']} tokens of prompt, {result['steps']} steps, float32",
        "",
        "| side | format | KL to dense, nats | bytes of dense |",
        "|---|---|---|---|",
    ]
    for each in result["rows"]:
        if "kl_nats" in each:
            share = f"{100 * each['bytes_of_dense']:.1f} %"
            lines.append(f"| {each['side']} | {each['format']} | {each['kl_nats']:.2e} | {share} |")
        else:
            lines.append(f"| {each['side']} | {each['format']} | {each['status']}: {each['reason']} | |")
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default: a Qwen3 with random weights")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=300, help="decode steps: two flushes of transformers' residual")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or scratch
        if arguments.model is None:
            make_model(Path(scratch))
        found = []
        for each in rows(folder, length_tokens=arguments.length, steps=arguments.steps, seed=arguments.seed):
            found.append(each)
            say(str(each))
    result = {
        "model": "a Qwen3 with random weights" if arguments.model is None else Path(arguments.model).name,
        "length_tokens": arguments.length,
        "steps": arguments.steps,
        "seed": arguments.seed,
        "machine": machine(),
        "rows": found,
    }
    write_result("quantised_against_transformers", result, report(result), folder=arguments.out)


if __name__ == "__main__":
    main()
