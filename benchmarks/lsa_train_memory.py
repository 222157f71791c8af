"""Peak host memory of `kvscope lsa train` on shards of an 8B shape, against holding that backbone's weights.

    python benchmarks/lsa_train_memory.py [--documents 8] [--length 16384] [--backbone]

The shards hold random numbers of the shapes that Llama-3.1-8B gives (hidden 4,096, 8 KV heads of 128, 32 query heads, 3
indexed layers, chunks of 64 tokens): memory and time depend on shapes alone. Training runs in a fresh process, whose
resident set the kernel reports (VmHWM). The backbone's bytes are counted on a model without storage (8.03 G parameters
in bf16); with ``--backbone`` it is also built, with random weights, in a fresh process, and its resident set measured.
Needs about 0.1 GiB of disk a document of 16K, and for ``--backbone`` 17 GiB of memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, machine, machine_lines, say

from kvscope.harness.indexers.collection.document import CollectionInfo, Document, DocumentInfo
from kvscope.harness.indexers.collection.shards import write_manifest, write_shard
from kvscope.harness.passes.process import worker_environment

GIB = 1024**3
SHAPE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}
LAYERS = (10, 12, 20)
STEPS = 24


def collection_info(*, length: int, documents: int, features: str) -> CollectionInfo:
    """Return what a collection of that model would say of itself."""
    return CollectionInfo(
        model="shape of Llama-3.1-8B", model_revision="none", dtype="bfloat16", hidden_size=SHAPE["hidden_size"],
        key_features=1024, query_heads=32, head_dim=128, kv_bytes_per_token=131072, layers=LAYERS, label_layers=LAYERS,
        chunk_tokens=64, features=features, top_p=0.9, voters="layer", least_mass=0.02, votes=1,  # type: ignore[arg-type]
        state_tokens=16, tasks=("random",), lengths_tokens=(length,), samples=documents, seed=0,
    )  # fmt: skip


def random_document(info: CollectionInfo, sample: int) -> Document:
    """Return a document of random numbers with 20 positive chunks a step."""
    draws = torch.Generator().manual_seed(sample)
    length = info.lengths_tokens[0]
    n_chunks, L = length // 64, len(LAYERS)
    rows = 3 if info.features == "stats" else 64
    chunks = torch.stack([torch.randperm(n_chunks, generator=draws)[:20].sort().values for _ in range(STEPS)])
    return Document(
        info=DocumentInfo(
            task="random", question_type="random", length_tokens=length, sample=sample, prompt_tokens=length,
            n_steps=STEPS,
        ),
        features=torch.randn((L, n_chunks, rows, 1024), generator=draws).bfloat16(),
        hidden=torch.randn((16 + STEPS, L, 4096), generator=draws).bfloat16(),
        steps=torch.arange(STEPS, dtype=torch.int32),
        segments=torch.zeros(STEPS, dtype=torch.int32),
        indptr=20 * torch.arange(STEPS + 1, dtype=torch.int32),
        indices=chunks.flatten().int(),
        voters=torch.zeros(20 * STEPS, dtype=torch.int16),
        values=torch.full((20 * STEPS,), 0.03).half(),
        rest=torch.full((STEPS, L + L * 32), 0.4).half(),
        mass=torch.full((STEPS, n_chunks), 0.01).half(),
        queries=torch.randn((STEPS, L, 4096), generator=draws).bfloat16(),
    )  # fmt: skip


def write_collection(folder: Path, info: CollectionInfo) -> int:
    """Write the shards, two documents each; return their bytes."""
    folder.mkdir()
    shards: list[dict[str, Any]] = []
    for start in range(0, info.samples, 2):
        made = [random_document(info, sample) for sample in range(start, min(start + 2, info.samples))]
        name = f"shard-{len(shards):05d}.safetensors"
        size_bytes = write_shard(folder / name, made, info)
        shards.append({"file": name, "bytes": size_bytes, "documents": [vars(each.info) for each in made]})
    write_manifest(folder, info, shards, complete=True)
    return sum(shard["bytes"] for shard in shards)


def peak_of(code: str) -> tuple[int, float]:
    """Run code in a fresh process; return its peak resident bytes and its seconds."""
    tail = "\nprint([int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmHWM')][0])"
    started_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, env=worker_environment(), check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.split()[-1]), round(time.perf_counter() - started_s, 1)


def backbone_bytes() -> int:
    """Return the bytes of the backbone's weights in bf16, counted without storage."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    return 2 * sum(int(parameter.numel()) for parameter in model.parameters())


def main() -> int:
    """Measure, write the result, return 0 when training needs less than half of the backbone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--backbone", action="store_true", help="also build the backbone and measure it")
    args = parser.parse_args()
    result: dict[str, Any] = {"documents": args.documents, "length_tokens": args.length, "indexed_layers": LAYERS}
    for features in ("stats", "tokens"):
        info = collection_info(length=args.length, documents=args.documents, features=features)
        with tempfile.TemporaryDirectory() as scratch:
            say(f"{features}: writing {args.documents} documents of {args.length:,} tokens")
            disk_bytes = write_collection(Path(scratch) / "data", info)
            command = ["lsa", "train", "--data", f"{scratch}/data", "--out", f"{scratch}/out", "--epochs", "1",
                       "--device", "cpu", "--quiet"]  # fmt: skip
            code = f"from kvscope.cli import run_cli\nassert run_cli({command!r}) == 0"
            peak_bytes, took_s = peak_of(code)
        result[features] = {"disk_bytes": disk_bytes, "train_rss_peak_bytes": peak_bytes, "train_s": took_s}
        say(f"{features}: peak {peak_bytes / GIB:.2f} GiB in {took_s} s, {disk_bytes / GIB:.2f} GiB of shards")
    result["import_rss_peak_bytes"], _ = peak_of("import kvscope.harness.indexers.lsa.train")
    result["backbone_weights_bytes"] = backbone_bytes()
    if args.backbone:
        code = (
            "import torch\nfrom transformers import AutoModelForCausalLM, LlamaConfig\n"
            "torch.set_default_dtype(torch.bfloat16)\n"
            f"model = AutoModelForCausalLM.from_config(LlamaConfig(**{SHAPE!r}))"
        )
        result["backbone_rss_peak_bytes"], _ = peak_of(code)
    environment = machine()
    weights_gib = result["backbone_weights_bytes"] / GIB
    lines = [
        "# Peak memory of training an indexer, against its backbone",
        "",
        *machine_lines(environment),
        f"- {args.documents} documents of {args.length:,} tokens, 3 indexed layers, chunk 64, one epoch, warm start",
        "",
        "| | resident peak, GiB | of the backbone's weights |",
        "|---|---|---|",
    ]
    for features in ("stats", "tokens"):
        peak_gib = result[features]["train_rss_peak_bytes"] / GIB
        lines.append(f"| `lsa train`, features {features} | {peak_gib:.2f} | {peak_gib / weights_gib:.0%} |")
    lines.append(f"| imports alone | {result['import_rss_peak_bytes'] / GIB:.2f} | |")
    lines.append(f"| backbone, weights in bf16 (counted) | {weights_gib:.2f} | 100% |")
    if args.backbone:
        lines.append(f"| backbone, loaded (measured) | {result['backbone_rss_peak_bytes'] / GIB:.2f} | |")
    text = "\n".join(lines) + "\n"
    say(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "lsa_train_memory.md").write_text(text, encoding="utf-8")
    (RESULTS / "lsa_train_memory.json").write_text(
        json.dumps({"environment": environment, **result}, indent=1) + "\n", encoding="utf-8"
    )
    worst_bytes = max(result[features]["train_rss_peak_bytes"] for features in ("stats", "tokens"))
    return 0 if worst_bytes < result["backbone_weights_bytes"] / 2 else 1


if __name__ == "__main__":
    sys.exit(main())
