"""The accuracy pass of four or eight comparable methods, end to end: kvscope against kvpress.

Same model, same prompts as token ids, same stop rule, same cap, same dtype and threads. Each side is one fresh process
that imports, loads the model and answers; the two alternate. kvpress (PyPI) lives in an environment of its own, which
this script makes where it is missing, or in a folder of packages for this Python.

    python benchmarks/against_kvpress.py
    python benchmarks/against_kvpress.py --methods eight
    python benchmarks/against_kvpress.py --device cuda --length 16k --samples 8 --kvpress-packages FOLDER
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpress_report import markdown
from measure import RESULTS, load_1min, machine, ratio_summary, say, wait_for_calm, write_result

import kvscope
from kvscope.harness.passes.sweep import failures
from kvscope.units import format_length, parse_length

KVPRESS_VERSION = "0.5.5"
#: A method, and how many times the share asked for it keeps.
METHODS = {
    "four": (("dense", None), ("sliding_window", 1), ("recency", 1), ("random", 1)),
    "eight": (
        ("dense", None), ("sliding_window", 1), ("recency", 1), ("random", 1),
        ("sliding_window", 2), ("recency", 2), ("random", 2), ("knorm", 1),
    ),
}  # fmt: skip
PRESSES = {
    "sliding_window": "StreamingLLMPress({:g}, n_sink=4)",
    "recency": "StreamingLLMPress({:g}, n_sink=0)",
    "random": "RandomPress({:g}, seed={})",
    "knorm": "KnormPress({:g})",
}
TASK = "niah_multikey_2"
TARGET_RATIO = 3.2
DEFAULT_VENV = Path(tempfile.gettempdir()) / "kvpress-venv"


def kvpress_python(folder: Path) -> Path:
    """Return the Python of kvpress's environment; make the environment where it is missing.

    Raises:
        subprocess.CalledProcessError: venv or pip failed; their own words are on the terminal.
    """
    import torch

    python = folder / "bin" / "python"
    asked = [
        str(python),
        "-c",
        f"from importlib.metadata import version; assert version('kvpress') == '{KVPRESS_VERSION}'",
    ]
    if not python.exists() or subprocess.run(asked, capture_output=True, check=False).returncode:
        say(f"installing kvpress {KVPRESS_VERSION} into an environment of its own")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        same_torch = f"torch=={torch.__version__.partition('+')[0]}"
        subprocess.run([python, "-m", "pip", "install", "-q", same_torch, f"kvpress=={KVPRESS_VERSION}"], check=True)
    return python


def their_side(arguments: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Return the command of kvpress's Python, and its environment."""
    if arguments.kvpress_packages is None:
        return [str(kvpress_python(arguments.venv))], dict(os.environ)
    return [sys.executable], {**os.environ, "PYTHONPATH": str(arguments.kvpress_packages)}


def make_model(folder: Path) -> None:
    """Write a Qwen3 of the reference model's size with random weights and the reference tokenizer.

    The reference model itself cannot be compared: most of its layers are local, and kvpress would compress those, too.
    Answers of random weights mean nothing, but both sides must give the same ones.
    """
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from kvscope.harness.engine.models import load_model

    tokenizer = AutoTokenizer.from_pretrained(load_model("reference", device="cpu").model.config.name_or_path)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=65_536, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM._from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compared(arguments: argparse.Namespace) -> list[tuple[str, float | None, str]]:
    """Return what is compared: a method's name, the fraction of the prompt that it keeps, and kvscope's spec of it."""
    found: list[tuple[str, float | None, str]] = []
    for name, times in METHODS[arguments.methods]:
        keep = None if times is None else times * arguments.keep
        found.append((name, keep, name if keep is None else f"{name}:budget_fraction={keep:g}"))
    return found


def make_job(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return kvpress's job: model folder, prompts as ids, split where kvscope splits them, and the stop rule as ids."""
    from kvscope.harness.engine.models import load_model
    from kvscope.tasks.registry import create_task

    loaded = load_model(str(arguments.model), device="cpu")  # the tokenizer alone is used
    task = create_task(TASK)
    task.max_new_tokens = arguments.max_new_tokens
    samples = [
        task.build(loaded.tokenizer, length_tokens=length_tokens, sample=index, seed=arguments.seed)
        for length_tokens in arguments.length
        for index in range(arguments.samples)
    ]
    # No token of a byte-level vocabulary holds part of a newline, so these ids end an answer where the text would.
    newline_ids = [i for i in range(len(loaded.tokenizer)) if "\n" in loaded.tokenizer.decode([i])]
    return {
        "model": str(loaded.model.config.name_or_path),
        "device": arguments.device,
        "dtype": dtype(arguments),
        "methods": [
            {"name": name, "label": spec, "compression_ratio": None if keep is None else 1 - keep}
            for name, keep, spec in compared(arguments)
        ],
        "max_new_tokens": arguments.max_new_tokens,
        "seed": arguments.seed,
        "stop_ids": sorted({*loaded.eos_ids, *newline_ids}),
        "prompts": [
            {
                "length_tokens": sample.length_tokens,
                "sample": sample.sample,
                # kvscope's default: all but the last token is prefilled, the last one is fed under the method.
                "context_ids": list(sample.ids[:-1]),
                "question_ids": list(sample.ids[-1:]),
                "targets": list(sample.targets),
            }
            for sample in samples
        ],
    }


def dtype(arguments: argparse.Namespace) -> str:
    """Return the number format of both sides."""
    return "float32" if arguments.device == "cpu" else "bfloat16"


def run_kvscope(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run ``kvscope run`` in a fresh process and return its wall time and rows."""
    command = [sys.executable, "-m", "kvscope.cli", "run", "--no-footprint"]
    for option, values in (
        ("--model", [arguments.model]),
        ("--device", [arguments.device]),
        ("--dtype", [dtype(arguments)]),
        ("-m", [spec for *_, spec in compared(arguments)]),
        ("--task", [TASK]),
        ("--length", arguments.length),
        ("--samples", [arguments.samples]),
        ("--seed", [arguments.seed]),
        ("--max-new-tokens", [arguments.max_new_tokens]),
        ("--out", [folder]),
    ):
        for value in values:
            command += [option, str(value)]
    load = load_1min()
    started_s = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall_s = time.perf_counter() - started_s
    run = kvscope.load_run(folder)
    failed = failures(run)
    if failed:
        raise RuntimeError("; ".join(failed))
    samples: list[Any] = list(run.samples.itertuples())
    rows = [
        {
            "method": row.method_label,
            "length_tokens": int(row.length_tokens),
            "sample": int(row.sample),
            "output": row.output,
            "score": float(row.score),
            "prefill_s": float(row.prefill_s),
            "decode_s": float(row.decode_s),
            "batch": int(row.batch),
            "decode_tokens": int(row.decode_tokens),
            "kept_fraction": float(row.resident_kv_bytes / row.dense_kv_bytes),
        }
        for row in samples
    ]
    return {"wall_s": wall_s, "load_1min_before": load, "rows": rows}


def run_kvpress(arguments: argparse.Namespace, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run kvpress's side in a fresh process and return its wall time and rows, scored by kvscope's task."""
    from kvscope.tasks.base import contains_all_score

    folder.mkdir()
    job_file, answers_file = folder / "job.json", folder / "answers.json"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    script = Path(__file__).resolve().with_name("kvpress_side.py")
    command, environment = their_side(arguments)
    load = load_1min()
    started_s = time.perf_counter()
    subprocess.run([*command, script, job_file, answers_file], check=True, env=environment)
    wall_s = time.perf_counter() - started_s
    answers: dict[str, Any] = json.loads(answers_file.read_text(encoding="utf-8"))
    targets = {(prompt["length_tokens"], prompt["sample"]): prompt["targets"] for prompt in job["prompts"]}
    for row in answers["rows"]:
        row["output"] = row["output"].partition("\n")[0]
        row["score"] = contains_all_score(targets[row["length_tokens"], row["sample"]], row["output"])
    return {"wall_s": wall_s, "load_1min_before": load, **answers}


def same_answers(
    labels: Sequence[str], kvscope_rows: Sequence[dict[str, Any]], kvpress_rows: Sequence[dict[str, Any]]
) -> dict[str, str]:
    """Return "equal of all" answers by method.

    Dense must agree everywhere and so must recency, where both sides keep the same tokens; the others differ by design.
    """
    theirs = {(row["method"], row["length_tokens"], row["sample"]): row["output"].strip() for row in kvpress_rows}
    counts = {}
    for name in labels:
        own = [row for row in kvscope_rows if row["method"] == name]
        equal = sum(theirs[name, row["length_tokens"], row["sample"]] == row["output"].strip() for row in own)
        counts[name] = f"{equal} of {len(own)}"
    return counts


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Warm both sides up at 1K, then alternate them; the second repetition goes the other way round, and so on."""
    their_side(arguments)
    labels = [spec for *_, spec in compared(arguments)]
    repetitions = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.model is None:
            arguments.model = folder / "model"
            make_model(arguments.model)
        job = make_job(arguments)
        say("warm-up at 1K")
        small = argparse.Namespace(**{**vars(arguments), "length": [1024], "samples": 1})
        run_kvscope(small, folder / "kvscope-warm")
        run_kvpress(arguments, make_job(small), folder / "kvpress-warm")
        waited_s = wait_for_calm(max_wait_s=arguments.max_wait_s)
        for index in range(arguments.repetitions):
            sides: dict[str, Any] = {}
            for side in ("kvscope", "kvpress") if index % 2 == 0 else ("kvpress", "kvscope"):
                place = folder / f"{side}-{index}"
                sides[side] = run_kvscope(arguments, place) if side == "kvscope" else run_kvpress(arguments, job, place)
                say(f"repetition {index + 1}: {side} {sides[side]['wall_s']:.2f} s (load {load_1min():.2f})")
            sides["ratio"] = sides["kvpress"]["wall_s"] / sides["kvscope"]["wall_s"]
            sides["same_answers"] = same_answers(labels, sides["kvscope"]["rows"], sides["kvpress"]["rows"])
            repetitions.append(sides)
    ratio = ratio_summary([sides["ratio"] for sides in repetitions])
    lengths = [format_length(length_tokens).lower() for length_tokens in arguments.length]
    return {
        "benchmark": "against_kvpress",
        "command": "python benchmarks/against_kvpress.py --length "
        + " --length ".join(lengths)
        + f" --samples {arguments.samples} --repetitions {arguments.repetitions} --keep {arguments.keep}"
        f" --max-new-tokens {arguments.max_new_tokens} --seed {arguments.seed} --methods {arguments.methods}"
        f" --device {arguments.device}",
        "model": "qwen3 with random weights" if arguments.model.name == "model" else str(arguments.model.name),
        "task": TASK,
        "lengths_tokens": arguments.length,
        "samples": arguments.samples,
        "seed": arguments.seed,
        "max_new_tokens": arguments.max_new_tokens,
        "kept_fraction": arguments.keep,
        "dtype": dtype(arguments),
        "kvscope_methods": labels,
        "kvpress_presses": [
            "none" if keep is None else PRESSES[name].format(1 - keep, arguments.seed)
            for name, keep, _ in compared(arguments)
        ],
        "target": f"at least {arguments.target:g}",
        "target_met": ratio["min"] >= arguments.target,
        "ratio": ratio,
        "repetitions": repetitions,
        "waited_for_calm_s": waited_s,
        "environment": machine(),
    }


def main() -> int:
    """Measure, write, and return 0 when the target is met in every repetition."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder; default a Qwen3 of the reference's size, random weights")
    parser.add_argument("--length", type=parse_length, action="append", help="repeatable; default 4k and 8k")
    parser.add_argument("--samples", type=int, default=2, help="prompts per length")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--methods", choices=sorted(METHODS), default="four")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--target", type=float, default=TARGET_RATIO, help="least ratio asked of every repetition")
    parser.add_argument("--keep", type=float, default=0.25, help="fraction of the prompt kept (of some: twice as much)")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--venv", type=Path, default=DEFAULT_VENV, help="kvpress's environment, made where missing")
    parser.add_argument("--kvpress-packages", type=Path, help="folder of packages for this Python, in place of --venv")
    parser.add_argument("--name", default="against_kvpress", help="of the result files")
    parser.add_argument("--max-wait-s", type=float, default=0.0, help="longest wait for a calm machine")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    arguments = parser.parse_args()
    arguments.length = arguments.length or [4096, 8192]
    result = measure(arguments)
    write_result(arguments.name, result, markdown(result), folder=arguments.out)
    say(f"ratio {result['ratio']['median']:.2f} ({result['ratio']['min']:.2f} to {result['ratio']['max']:.2f})")
    return 0 if result["target_met"] else 1


if __name__ == "__main__":
    sys.exit(main())
