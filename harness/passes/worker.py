"""One cell in a process of its own: ``python -m kvscope.harness.passes.worker``.

The job comes as one JSON line on stdin; JSON lines go out on stdout: ``{"phase": ...}`` as the work proceeds and at the
end ``{"row": ...}``. Whatever libraries print goes to stderr. When stdin closes, the parent is gone and the worker
ends: a killed sweep leaves no process behind on the GPU.
"""

import json
import os
import sys
import threading

from kvscope.harness.passes.job import read_job
from kvscope.harness.passes.measurement import measure
from kvscope.plugins import extend_search_path


def _end_with_parent() -> None:
    """Leave as soon as stdin closes: whoever asked for the row is gone."""
    sys.stdin.read()
    os._exit(1)


def main() -> int:
    """Read the job, measure, write the row."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = read_job(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, name="kvscope-parent-watch", daemon=True).start()
    extend_search_path(job.import_folders)
    row = measure(job, say=answers)
    answers.write(json.dumps({"row": row.model_dump(mode="json")}) + "\n")
    answers.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
