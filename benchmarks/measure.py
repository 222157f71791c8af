"""What both benchmarks share: a calm machine, its description, ratios of alternating runs, and the result files."""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvscope.errors import KvscopeError
from kvscope.harness.passes.environment import capture_environment
from kvscope.terminal import complain

RESULTS = Path(__file__).resolve().parent / "results"
CALM_LOAD = 0.5


def say(text: str) -> None:
    """Print one line of progress at once."""
    print(text, flush=True)


def is_over(returncode: int, *, took_s: float, limit_s: float) -> bool:
    """Whether ``kvscope run --time-limit`` ended because its time was over: the same command continues then."""
    return returncode == KvscopeError.exit_code and took_s >= limit_s


def ended(main: Callable[[], int | None]) -> int:
    """Run a script and return its exit code; what cannot be done is told in a sentence, as ``kvscope`` does."""
    try:
        return main() or 0
    except KvscopeError as error:
        complain(str(error))
        return error.exit_code


def load_1min() -> float:
    """Return the one-minute load average."""
    return round(os.getloadavg()[0], 2)


def wait_for_calm(*, max_wait_s: float) -> float:
    """Wait until the machine's load is low, ``max_wait_s`` at most, and return the seconds waited."""
    started_s = time.monotonic()
    while load_1min() > CALM_LOAD and time.monotonic() - started_s < max_wait_s:
        say(f"load {load_1min():.2f}, waiting for {CALM_LOAD} or less")
        time.sleep(15)
    return round(time.monotonic() - started_s, 1)


def ratio_summary(ratios: Sequence[float]) -> dict[str, Any]:
    """Return median, smallest and largest of the repetitions' ratios, and the ratios themselves."""
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "repetitions": list(ratios),
    }


def machine() -> dict[str, Any]:
    """Return what the figures were taken on: versions, CPU, memory, commit; no host name and no path."""
    return capture_environment(device="cpu")


def machine_lines(environment: Mapping[str, Any]) -> list[str]:
    """Return the machine's description as Markdown list items."""
    packages = environment["packages"]
    commit = environment["commit"]
    state = (
        "not a checkout" if commit is None else f"{commit[:7]}{' with local changes' if environment['dirty'] else ''}"
    )
    return [
        f"- CPU {environment['cpu']}, {environment['cpu_cores']} cores, {environment['torch_threads']} torch threads, "
        f"{environment['host_memory_bytes'] / 1024**3:.0f} GiB; {environment['os']}; no GPU used",
        f"- kvscope {environment['kvscope']} ({state}), Python {environment['python']}, torch {packages['torch']}, "
        f"transformers {packages['transformers']}",
    ]


def rounded(value: Any) -> Any:
    """Return JSON values with floats cut to a tenth of a millisecond."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def save_result(out: Path, result: Mapping[str, Any], *, indent: int = 2) -> None:
    """Write a result, with the time that it was taken at."""
    out.parent.mkdir(parents=True, exist_ok=True)
    stamped = {"measured_utc": datetime.now(UTC).isoformat(timespec="seconds"), **result}
    out.write_text(json.dumps(stamped, indent=indent) + "\n", encoding="utf-8")


def write_result(name: str, result: Mapping[str, Any], markdown: Sequence[str], *, folder: Path = RESULTS) -> None:
    """Write ``<folder>/<name>.json`` and ``.md``."""
    save_result(folder / f"{name}.json", rounded(result))
    (folder / f"{name}.md").write_text("\n".join(markdown) + "\n", encoding="utf-8")
    say(f"wrote {name}.json and {name}.md")
