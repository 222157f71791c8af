"""Stands in for a process of the accuracy pass: says rows that were measured before, and dies when it is told to.

Its folder holds ``rows.jsonl`` and ``deaths.json``: how many rows each of its processes says before it dies, in the
order in which they begin; or what else ends them. One that is slow answers a prompt until the time is over.
"""

import json
import os
import signal
import sys
from pathlib import Path


def main() -> int:
    folder = Path(sys.argv[1])
    asked = json.loads(sys.stdin.readline())
    (folder / f"asked-{os.getpid()}.json").write_text(json.dumps(asked))
    rows = {}
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["task"], row["length_tokens"], row["sample"], row["method_label"]] = row
    deaths = json.loads((folder / "deaths.json").read_text())
    before_death = next((death for at, death in enumerate(deaths) if is_mine(folder / f"death-{at}")), None)
    if before_death == "begins not":
        sys.stderr.write("kvscope: The model's weights are cut off.\n")
        return 2
    if before_death == "is killed as it begins":
        os.kill(os.getpid(), signal.SIGKILL)
    say({"ready": True})
    if before_death == "another prompt":
        sys.stdin.readline()
        sys.stderr.write("kvscope: The folder holds another prompt.\n")
        return 2
    for line in sys.stdin:
        shard = json.loads(line)
        for index, labels in shard["prompts"]:
            for label in labels:
                if before_death == 0:
                    sys.stdout.write('{"row": {"task":')  # in the midst of a line
                    sys.stdout.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                say({"row": rows[shard["task"], shard["length_tokens"], index, label]})
                before_death = before_death - 1 if isinstance(before_death, int) else before_death
            if before_death == "is slow":
                (folder / "over").touch()
                break
        say({"done": True})
    return 0


def is_mine(claim: Path) -> bool:
    """Whether no other process was here before."""
    try:
        claim.mkdir()
    except FileExistsError:
        return False
    return True


def say(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
