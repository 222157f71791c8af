"""Which prompt tokens the eviction methods keep: kvscope against kvpress, layer by layer and head by head.

Same model, same token ids, same budget, float32 on both sides. kvpress (PyPI) lives in an environment of its own, which
this script makes where it is missing. The model is a Llama, a Mistral, a Phi3, a Qwen2 or a Qwen3: kvpress computes the
queries of these anew. `kvscope models fetch smollm2-135m` brings one.

    python benchmarks/eviction_against_kvpress.py --model FOLDER
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from against_kvpress import DEFAULT_VENV, kvpress_python, make_model
from measure import RESULTS, machine, machine_lines, say, write_result

from kvscope.units import format_length, parse_length

#: A line of its own: pyramidkv's scores cut to the layer sizes of kvpress, so that nothing but scores can differ.
PYRAMID_SIZES = "pyramidkv, kvpress's sizes"
#: kvscope's method -> its options beside the budget, and why sets may differ.
METHODS = {
    "snapkv": ("window_tokens={window}", "the same rule; only scores that are equal but for rounding"),
    "pyramidkv": (
        "window_tokens={window}",
        "layer sizes: kvpress's pyramid holds the window in it, the authors' and kvscope's stands beside it",
    ),
    PYRAMID_SIZES: ("window_tokens={window}", "the same rule and sizes; only scores that are equal but for rounding"),
    "adakv": ("window_tokens={window}", "the same rule; only scores that are equal but for rounding"),
    "expected_attention": ("", "the same rule; only scores that are equal but for rounding"),
    "knorm": ("", "the same rule; in the first layer equal tokens have equal keys, and rounding breaks the tie"),
    "tova": ("", "kvpress keeps the last token whatever its weight, the authors and kvscope do not"),
}
WINDOW_TOKENS = 64
TASK = "niah_multikey_2"

Kept = Sequence[Sequence[Sequence[int]]]
"""Layer -> KV head -> positions."""


def specs(n_kept: int) -> dict[str, str]:
    """Return kvscope's spec of each method for a budget in tokens."""
    found = {}
    for name, (options, _) in METHODS.items():
        parts = [f"budget_tokens={n_kept}", *([options.format(window=WINDOW_TOKENS)] if options else [])]
        found[name] = f"{name.partition(',')[0]}:{','.join(parts)}"
    return found


def kvscope_kept(loaded: Any, ids: Sequence[int], n_kept: int, pyramid: Kept) -> dict[str, Kept]:
    """Prefill a prompt once and return what each method keeps of it.

    Args:
        pyramid: what kvpress's PyramidKVPress kept.
    """
    from kvscope.harness.engine.prefill import prefill
    from kvscope.methods.base import union_collectors
    from kvscope.methods.eviction.choice import top_tokens
    from kvscope.methods.registry import create_method

    methods: dict[str, Any] = {name: create_method(spec) for name, spec in specs(n_kept).items()}
    prompt = prefill(loaded, ids, collectors=union_collectors(methods.values(), loaded.shape.layers))
    found = {}
    for name, method in methods.items():
        if name == "tova":
            rows = {layer: top_tokens(method.scores(prompt, layer), n_kept) for layer in loaded.shape.layers}
            kept = {layer: [row[0]] * loaded.shape.n_kv_heads for layer, row in rows.items()}
        elif name == PYRAMID_SIZES:
            sizes = [len(heads[0]) for heads in pyramid]
            kept = {
                layer: top_tokens(method.scores(prompt, layer), size)
                for layer, size in zip(loaded.shape.layers, sizes, strict=True)
            }
        else:
            kept = method.kept(prompt)
        found[name] = [[head.tolist() for head in kept[layer]] for layer in loaded.shape.layers]
    return found


def agreement(own: Sequence[int], theirs: Sequence[int]) -> float:
    """Return the tokens both keep over those the larger set has: 1 where the sets are equal."""
    return len(set(own) & set(theirs)) / max(len(own), len(theirs), 1)


def compare(own: Kept, theirs: Kept) -> dict[str, Any]:
    """Return the agreement of each layer and head, and sizes a layer, mean over heads."""
    by_head = [[agreement(*pair) for pair in zip(*layers, strict=True)] for layers in zip(own, theirs, strict=True)]
    return {
        "agreement_by_layer_and_head": by_head,
        "kvscope_tokens_by_layer": [statistics.mean(map(len, layer)) for layer in own],
        "kvpress_tokens_by_layer": [statistics.mean(map(len, layer)) for layer in theirs],
        "kvscope_most_tokens": max(len(head) for layer in own for head in layer),
        "kvpress_most_tokens": max(len(head) for layer in theirs for head in layer),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Give both sides the same prompts and compare."""
    from kvscope.harness.engine.models import load_model
    from kvscope.tasks.registry import create_task

    python = kvpress_python(arguments.venv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.model is None:
            arguments.model = folder / "model"
            make_model(arguments.model)
        loaded = load_model(str(arguments.model), device="cpu", dtype="float32")
        task = create_task(TASK)
        prompts = [
            list(task.build(loaded.tokenizer, length_tokens=arguments.length, sample=i, seed=arguments.seed).ids[:-1])
            for i in range(arguments.samples)
        ]
        job = {
            "model": str(loaded.model.config.name_or_path),
            "methods": [name for name in METHODS if name != PYRAMID_SIZES],
            "keep": arguments.keep,
            "window_tokens": WINDOW_TOKENS,
            "prompts": prompts,
        }
        job_file, answers_file = folder / "job.json", folder / "answers.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        script = Path(__file__).resolve().with_name("eviction_kvpress_side.py")
        subprocess.run([python, script, job_file, answers_file], check=True)
        answers: dict[str, Any] = json.loads(answers_file.read_text(encoding="utf-8"))
        say("kvpress is done")
        rows: list[dict[str, Any]] = []
        for index, (ids, theirs) in enumerate(zip(prompts, answers.pop("kept"), strict=True)):
            # kvpress rounds a ratio to tokens in its own way: its number is the budget of both.
            n_kept = len(theirs["snapkv"][0][0])
            own = kvscope_kept(loaded, ids, n_kept, theirs["pyramidkv"])
            for name in METHODS:
                found = compare(own[name], theirs[name.partition(",")[0]])
                rows.append({"sample": index, "method": name, "budget_tokens": n_kept, **found})
    return {
        "benchmark": "eviction_against_kvpress",
        "command": f"python benchmarks/eviction_against_kvpress.py --model FOLDER --length "
        f"{format_length(arguments.length).lower()} --samples {arguments.samples} --keep {arguments.keep} --seed "
        f"{arguments.seed}",
        "model": loaded.name if arguments.model.name != "model" else "qwen3 with random weights",
        "task": TASK,
        "length_tokens": arguments.length,
        "samples": arguments.samples,
        "window_tokens": WINDOW_TOKENS,
        "kvpress": answers,
        "rows": rows,
        "environment": machine(),
    }


def markdown(result: Mapping[str, Any]) -> list[str]:
    """Return the result as Markdown lines."""
    kvpress = result["kvpress"]
    lines = [
        "# Which tokens stay: kvscope against kvpress",
        "",
        "For each layer and KV head: agreement is the tokens that both keep, over those the larger set has.",
        "",
        "| method | agreement, mean | least head | equal sets | tokens of the largest head, kvscope / kvpress |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in METHODS:
        rows = [row for row in result["rows"] if row["method"] == name]
        values = [v for row in rows for layer in row["agreement_by_layer_and_head"] for v in layer]
        most = [max(row[f"{side}_most_tokens"] for row in rows) for side in ("kvscope", "kvpress")]
        lines.append(
            f"| `{name}` | {100 * statistics.mean(values):.2f} % | {100 * min(values):.1f} % | "
            f"{sum(v == 1 for v in values)} of {len(values)} | {most[0]} / {most[1]} |"
        )
    lines += ["", "Why sets can differ:", ""]
    lines += [f"- `{name}`: {why}." for name, (_, why) in METHODS.items()]
    lines += [
        "- `h2o` has no counterpart: kvpress's ObservedAttentionPress takes a mean over the queries that see a key, "
        "and keeps no recent tokens.",
        "",
        "Agreement by layer, mean over heads and prompts, in %:",
        "",
        f"| layer | {' | '.join(METHODS)} |",
        "|---:|" + "---:|" * len(METHODS),
    ]
    for layer in range(len(result["rows"][0]["agreement_by_layer_and_head"])):
        cells = []
        for name in METHODS:
            rows = [row for row in result["rows"] if row["method"] == name]
            cells.append(statistics.mean(v for row in rows for v in row["agreement_by_layer_and_head"][layer]))
        lines.append(f"| {layer} | {' | '.join(f'{100 * cell:.1f}' for cell in cells)} |")
    budget = result["rows"][0]["budget_tokens"]
    return [
        *lines,
        "",
        f"- Prompts: {result['samples']} of {result['task']} at {format_length(result['length_tokens'])}; {budget} "
        f"tokens stay; window {result['window_tokens']}, pooled over 5, on both sides.",
        f"- Model {result['model']} ({kvpress['model_class']}), float32 on both sides; "
        f"{'on' if kvpress['in_supported_models'] else 'not on'} kvpress's list of models.",
        *machine_lines(result["environment"]),
        f"- kvpress {kvpress['packages']['kvpress']}, Python {kvpress['python']}, torch "
        f"{kvpress['packages']['torch']}, transformers {kvpress['packages']['transformers']}",
        f"- `{result['command']}`",
    ]


def main() -> int:
    """Compare and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder; default a Qwen3 of the reference's size, random weights")
    parser.add_argument("--length", type=parse_length, default=2048)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.25, help="fraction of the prompt that stays")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--venv", type=Path, default=DEFAULT_VENV, help="kvpress's environment, made where missing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    arguments = parser.parse_args()
    result = measure(arguments)
    write_result("eviction_against_kvpress", result, markdown(result), folder=arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
