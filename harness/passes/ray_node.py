"""A worker of the accuracy pass on a node of a Ray cluster: the actor that starts it and passes its lines on.

Nothing of Ray is imported here. The worker is the process that answers shards on one machine, too: what ends it ends
neither the actor nor the node, and how it ended is told.
"""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

from kvscope.harness.passes.pools import WORKER_COMMAND, last_line
from kvscope.harness.passes.process import worker_environment


class NodeWorker:
    """Starts one worker process on its node.

    Args:
        task: the worker's first line.
        folder: the sweep's working directory, which relative paths of the configuration are meant from; where the
            node has none, they lead nowhere and the worker says so.
    """

    def __init__(self, task: dict[str, Any], folder: str) -> None:
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - as long as it
        self._process = subprocess.Popen(
            WORKER_COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=worker_environment(),
            cwd=folder if os.path.isdir(folder) else None,
        )
        self.give(json.dumps(task) + "\n")

    def give(self, text: str | None) -> None:
        """Send the worker a line; None lets it end."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has died: lines() says so
            if text is None:
                self._process.stdin.close()
            else:
                self._process.stdin.write(text)
                self._process.stdin.flush()

    def lines(self) -> Iterator[str]:
        """Yield what the worker says, line by line, and at last how it ended: ``{"code": ..., "last": ...}``."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # cut short by a kill otherwise
                yield line
        code = self._process.wait()
        self._stderr.seek(0)
        yield json.dumps({"code": code, "last": last_line(self._stderr.read())})
