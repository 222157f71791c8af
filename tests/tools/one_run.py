"""A program that runs a configuration (JSON, the first argument) and prints its rows; tests vary its surroundings."""

import gc
import io
import json
import sys
from typing import Any

from kvscope.harness.passes import measurement, process_pass
from kvscope.harness.passes.libraries import import_libraries
from kvscope.harness.passes.sweep import run
from kvscope.results.frames import records


def rows_of(values: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Run a configuration and return its rows by kind."""
    result = run(values, progress=False)
    return {"samples": records(result.samples), "footprint": records(result.footprint)}


def main() -> None:
    """Measure footprints in this process: the same measurement without another start."""

    def run_worker(job: Any, **options: Any) -> Any:
        return measurement.measure(job, say=io.StringIO())

    process_pass.run_worker = run_worker  # type: ignore[assignment]
    # As where workers are forked: a measurement collects again and again, and would look through all modules.
    import_libraries()
    gc.freeze()
    sys.stdout.write(json.dumps(rows_of(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
