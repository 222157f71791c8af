"""Scripts of several steps, each of which is done once: where it stands, and how the time is shared out."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError
from kvscope.files import whole_file

Step = Callable[[float], dict[str, Any]]
"""Takes the time at which it is to end (``time.time``), and returns what it did; ``unfinished`` says why it has to go
on."""


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def deadlines_s(
    steps: Sequence[str], minutes: float, *, now_s: float, thought_minutes: Mapping[str, float]
) -> dict[str, float]:
    """Return when each step is to end: the time is shared out by what they are thought to take."""
    whole = sum(thought_minutes[step] for step in steps)
    found, until_s = {}, now_s
    for step in steps:
        until_s += 60 * minutes * thought_minutes[step] / whole
        found[step] = until_s
    return found


def run_steps(
    steps: Mapping[str, Step],
    asked: Sequence[str],
    out: Path,
    *,
    minutes: float | None,
    thought_minutes: Mapping[str, float],
    record: Mapping[str, Any],
    note: Callable[[str], None],
) -> bool:
    """Run the steps that were asked for and are not done, in order; what was made of one is made anew after it.

    Args:
        minutes: of this call; None: what its steps are thought to take.
        record: goes into every step's file.

    Returns:
        Whether no step found what it tests not passed.

    Raises:
        SystemExit: with a sentence, where one failed or has to go on.
    """
    asked = [step for step in steps if step in asked]
    left = [step for step in asked if not (out / f"{step}.json").is_file()]
    for step in asked:
        if step not in left:
            note(f"== {step}: done, see {out / step}.json")
    minutes = minutes or sum(thought_minutes[step] for step in left)
    passed = True
    for step, until_s in deadlines_s(left, minutes, now_s=time.time(), thought_minutes=thought_minutes).items():
        began_s = time.time()
        note(f"== {step}, {until_s - began_s:.0f} s for it")
        for later in list(steps)[list(steps).index(step) :]:
            (out / f"{later}.json").unlink(missing_ok=True)
        try:
            found = steps[step](until_s)
        except UsageError as error:
            raise SystemExit(f"{step}: {error}") from error
        if found.get("unfinished"):
            raise SystemExit(f"{step}: {found['unfinished']}; the same command goes on")
        write_json(
            out / f"{step}.json", {"step": step, **record, **found, "step_seconds": round(time.time() - began_s, 1)}
        )
        note(f"== {step}: {time.time() - began_s:.0f} s")
        passed = passed and found.get("passed") is not False
    return passed
