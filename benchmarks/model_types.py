"""Every causal-LM type of the installed transformers, tried with kvscope: equal, refused with a reason, or a fault.

    python benchmarks/model_types.py [--only TYPE ...] [--out FILE] [--resume]

Each type runs in a process of its own, with a time limit, on tiny random weights. Ends with 0 when no type is wrong,
raises or is missing. ``--resume`` keeps what FILE already holds for the same versions.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from model_type_check import Outcome, try_type
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

RESULT = Path(__file__).parent / "results" / "model_types.json"
LIMIT_S = 120.0
# The reasons a type may be refused for, and how its message tells. docs/models.md explains them.
REASONS = {
    "encoder-decoder": "encoder-decoder",
    "latent": "latent attention",
    "shared KV": "read another layer's KV",
    "own selection": "backend of its own",
    "chunked attention": "chunked_attention",
    "state": "keep a state that is not",
    "no KV": "names no attention heads",
    "windows only": "every layer is a sliding-window layer",
    "cross attention": "attend to images",
    "attends twice": "attend more than once",
    "layers in cycles": "layers run several times",
    "own mask": "asks for attention",
    "no interface": "transformers' attention interface",
    "layers not found": "layers in `.layers`",
    "layers differ": "layers of one kind differ",
}
GOOD = ("equal", "refused")


def main() -> int:
    """Run the sweep and print its table."""
    args = _arguments()
    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    done: dict[str, dict[str, Any]] = {}
    if args.resume and args.out.is_file():
        stored = json.loads(args.out.read_text())
        done = stored["types"] if stored["versions"] == versions else {}
    wanted = args.only or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for index, model_type in enumerate(wanted, 1):
        if model_type in done:
            continue
        started_s = time.monotonic()
        outcome = _in_a_process(model_type)
        outcome["reason"] = _reason(outcome)
        done[model_type] = outcome
        spent_s = time.monotonic() - started_s
        print(
            f"[{index}/{len(wanted)}] {model_type}: {outcome['status']} {_detail(outcome)} ({spent_s:.1f} s)",
            flush=True,
        )
        args.out.write_text(json.dumps({"versions": versions, "types": done}, indent=1) + "\n")
    return _summary({name: done[name] for name in wanted})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="types to try; all when left out")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file of the result")
    parser.add_argument("--resume", action="store_true", help="skip the types FILE holds for these versions")
    return parser.parse_args()


def _in_a_process(model_type: str) -> dict[str, Any]:
    """Try one type in a fork, so that neither a crash nor a hang ends the sweep."""
    context = multiprocessing.get_context("fork")  # a fork has torch and transformers imported
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_outcome, args=(model_type, sender))
    process.start()
    sender.close()
    lost = Outcome(model_type, status="timeout", message=f"not done after {LIMIT_S:.0f} s")
    try:
        found = receiver.recv() if receiver.poll(LIMIT_S) else lost.as_dict()
    except EOFError:
        process.join()
        found = Outcome(model_type, status="traceback", message=f"the process ended with {process.exitcode}").as_dict()
    process.kill()
    process.join()
    return dict(found)


def _send_outcome(model_type: str, sender: Any) -> None:
    torch.set_num_threads(1)
    sender.send(try_type(model_type).as_dict())


def _reason(outcome: dict[str, Any]) -> str:
    if outcome["status"] != "refused":
        return ""
    return next((reason for reason, words in REASONS.items() if words in outcome["message"]), "unlisted")


def _detail(outcome: dict[str, Any]) -> str:
    if outcome["error"] is not None:
        return f"{outcome['error']:.1e} (own cache {outcome['own_cache_error']:.1e})"
    return outcome["reason"] or outcome["message"][:120]


def _summary(types: dict[str, dict[str, Any]]) -> int:
    counts = Counter(outcome["status"] for outcome in types.values())
    print("\n" + ", ".join(f"{count} {status}" for status, count in counts.most_common()))
    for reason, count in Counter(o["reason"] for o in types.values() if o["reason"]).most_common():
        names = [name for name, outcome in types.items() if outcome["reason"] == reason]
        print(f"  refused, {reason}: {count}: {', '.join(names)}")
    bad = {name: outcome for name, outcome in types.items() if outcome["status"] not in GOOD}
    for name, outcome in bad.items():
        print(f"  {outcome['status']}: {name} at {outcome['stage']}: {_detail(outcome)} {outcome['message'][:200]}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.exit(main())
