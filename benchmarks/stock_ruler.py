"""lm-eval's own RULER tasks under cache methods: prompts and scorer are lm-eval's, answers come from ``kvscope run``.

    python benchmarks/stock_ruler.py prompts --out prompts --samples 100    # on any machine, with lm-eval
    python benchmarks/stock_ruler.py answer --prompts prompts --out runs/stock -m dense -m lsa --samples 50
    python benchmarks/stock_ruler.py score --prompts prompts --answers runs/stock --out stock.json
    python benchmarks/stock_ruler.py table stock.json
    python benchmarks/stock_ruler.py check --prompts prompts --answers runs/stock --task niah_single_1 --length 1024

``answer`` needs no lm-eval: one prefill of a prompt serves all methods, and answers share steps. The same command goes
on where it stopped. ``check`` asks lm-eval itself (``simple_evaluate``) for the first prompts of a cell, through its
model ``kvscope`` or its stock ``hf``, and compares prompts, generations and scores.

Answers are greedy, end with the model's own end of text or the task's last token (``until`` is empty), and have one
token of begin and no chat template, as lm-eval has it by default.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure import ended
from stock_ruler_prompts import LENGTHS, NUMPY_SEED, RANDOM_SEED, TASKS, build, chosen, cut, read_manifest
from stock_ruler_score import answers, label_of, read_result, score, table

import kvscope
from kvscope.units import parse_length

REFERENCE = Path(__file__).resolve().parents[1] / "harness" / "reference_model" / "weights"
METHODS = ("dense", "sliding_window", "quest", "snapkv", "lsa")


def prompts(options: argparse.Namespace) -> None:
    """Build the prompts of some cells by lm-eval's own code, as files; what is there stays."""
    options.task = options.task or list(TASKS)
    options.length = options.length or list(LENGTHS)
    build(options)


def cut_prompts(options: argparse.Namespace) -> None:
    """Write the first prompts of every file of a folder to another one: less to carry."""
    cut(options.prompts, options.out, samples=options.samples)


def answer(options: argparse.Namespace) -> None:
    """Answer the prompts of a folder, or go on with that."""
    cells = chosen(read_manifest(options.prompts), options.task, options.length)
    tasks = [
        {
            "name": "jsonl",
            "data": str(options.prompts / cell["file"]),
            "label": label_of(cell["task"], cell["nominal_tokens"]),
            "new_tokens": cell["max_new_tokens"],
            "stop": "none",
        }
        for cell in cells
    ]
    config: dict[str, Any] = {
        "model": options.model,
        "methods": options.method or list(METHODS),
        "tasks": tasks,
        # A bound for all cells; each prompt has the length it has.
        "lengths_tokens": [max(cell["prompt_tokens"]["max"] + cell["max_new_tokens"] for cell in cells)],
        "samples": min(cell["n"] for cell in cells) if options.samples is None else options.samples,
        "chat_template": "none",
        "footprint": False,
    }
    more = ("device", "dtype", "batch", "jobs", "time_limit_s")
    config |= {key: getattr(options, key) for key in more if getattr(options, key) is not None}
    run = kvscope.run(config, out=options.out)
    left = sorted(set(run.samples["status"]) - {"ok"})
    if left:
        raise SystemExit(f"Some prompts were not answered ({', '.join(left)}): the same command tries them again.")


def write_scores(options: argparse.Namespace) -> None:
    """Score a run, and print its table."""
    found = score(
        kvscope.load_run(options.answers),
        options.prompts,
        label=options.label or Path(options.answers).name,
        command=["python", "benchmarks/stock_ruler.py", *sys.argv[1:]],
        failed=options.failed,
    )
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table([found])))


def print_table(options: argparse.Namespace) -> None:
    """Print the Markdown table of one or more files that `score` wrote."""
    print("\n".join(table([read_result(path) for path in options.file])))


def check(options: argparse.Namespace) -> None:
    """Ask lm-eval itself for a cell's first prompts, and compare.

    Raises:
        SystemExit: a prompt, a generation or a score differs.
    """
    import lm_eval
    import nltk  # noqa: F401 - its import draws from the generator, so it comes before the seed, as for `prompts`
    from lm_eval.tasks import TaskManager

    from kvscope.harness.lm_harness import register_lm_eval

    (task,), (nominal_tokens,) = options.task, options.length
    run = kvscope.load_run(options.answers)
    ours = [
        each
        for each in answers(run, options.prompts)
        if (each.task, each.nominal_tokens, each.method) == (task, nominal_tokens, options.method)
    ][: options.samples]
    register_lm_eval()
    place = str(REFERENCE if options.model == "reference" else options.model)
    arguments = {"pretrained": place, "tokenizer": place, "dtype": str(run.samples["dtype"].iloc[0])}
    if options.engine == "kvscope":
        arguments["method"] = options.method
    metadata = {**arguments, "max_seq_lengths": [nominal_tokens]}
    ruler = Path(lm_eval.__file__).parent / "tasks" / "ruler"
    found = lm_eval.simple_evaluate(
        options.engine,
        arguments,
        tasks=[task],
        limit=len(ours),
        device="cpu",
        random_seed=RANDOM_SEED,
        numpy_random_seed=NUMPY_SEED,
        task_manager=TaskManager(include_defaults=False, include_path=str(ruler), metadata=metadata),
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    differ = []
    for one, theirs in zip(ours, samples, strict=True):
        same = {
            "prompt": one.prompt["prompt"] == theirs["arguments"][0][0],
            "generation": one.text == theirs["resps"][0][0],
            "score": one.score == theirs[str(one.prompt["meta"]["max_length"])],
        }
        differ += [(theirs["doc_id"], name) for name, equal in same.items() if not equal]
        if not same["generation"]:
            print(f"ours {one.text!r}, lm-eval's {theirs['resps'][0][0]!r}")
    print(json.dumps({"lm_eval": version("lm_eval"), "engine": options.engine, "n": len(ours), "differ": differ}))
    if differ or not ours:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)

    def step(name: str, do: Any, *, of_cells: bool = True) -> argparse.ArgumentParser:
        made = steps.add_parser(name, help=do.__doc__.splitlines()[0])
        made.set_defaults(do=do)
        if of_cells:
            made.add_argument("--task", action="append", choices=TASKS, default=[], help="repeatable; all of them")
            made.add_argument("--length", action="append", type=parse_length, default=[], help="nominal; repeatable")
        return made

    made = step("prompts", prompts)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--samples", type=int, default=100, help="prompts a cell, of the 500 that RULER draws")
    made.add_argument("--tokenizer", type=Path, default=REFERENCE, help="folder of the model they are sized for")
    made.add_argument("--jobs", type=int, default=2)

    made = step("cut", cut_prompts, of_cells=False)
    made.add_argument("--prompts", type=Path, required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--samples", type=int, required=True)

    made = step("answer", answer)
    made.add_argument("--prompts", type=Path, required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--model", default="reference", help="as of kvscope run")
    made.add_argument("-m", "--method", action="append", help=f"repeatable; {', '.join(METHODS)}")
    made.add_argument("--samples", type=int, help="prompts a cell; as many as all cells have")
    made.add_argument("--time-limit", dest="time_limit_s", type=float, metavar="S", help="as of kvscope run")
    for name, kind in (("device", str), ("dtype", str), ("batch", int), ("jobs", int)):
        made.add_argument(f"--{name}", type=kind, help="as of kvscope run")

    made = step("score", write_scores, of_cells=False)
    made.add_argument("--prompts", type=Path, required=True)
    made.add_argument("--answers", type=Path, required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--label", help="what tables call the model; the name of --answers")
    made.add_argument("--failed", type=int, default=0, help="failed generations kept of each cell")

    made = step("table", print_table, of_cells=False)
    made.add_argument("file", type=Path, nargs="+")

    made = step("check", check)
    made.add_argument("--prompts", type=Path, required=True)
    made.add_argument("--answers", type=Path, required=True)
    made.add_argument("--model", default="reference", help="that answered: reference or its folder")
    made.add_argument("-m", "--method", default="dense")
    made.add_argument("--engine", choices=("kvscope", "hf"), default="kvscope")
    made.add_argument("--samples", type=int, default=3)

    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    sys.exit(ended(main))
