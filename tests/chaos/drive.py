"""Kills kvscope at random instants, many times: ``python tests/chaos/drive.py [--kills 200] [--seed 0] [--only NAME]``.

Each command is killed by SIGKILL until it has been killed as often as it shall: at a step of its own (``fuse``: files
opened, written in part, synced, renamed), or after a random time, or in a process of its own. In between the disk takes
no file over some size, which must be a sentence and exit code 3. Then the same command ends, and what it leaves is
compared with what an undisturbed one left. Prints a row for each, and JSON with ``--out``.
"""

import argparse
import gc
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from fuse import NEVER, Fuse
from scenarios import Scenario, report_files, scenarios
from stub_server import stub_server

from kvscope.errors import EnvironmentProblem, KvscopeError

MARK = "KVSCOPE_CHAOS"
_END_S = 60.0
"""How long processes of a sweep that was killed may live on."""


class Child:
    """A command in a process of its own, forked from here."""

    def __init__(self, scenario: Scenario, folder: Path, *, at: int = NEVER, most_file_bytes: int = -1) -> None:
        reader, writer = os.pipe()
        self._said = reader
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            status = 1
            try:
                fuse = Fuse(folder, at=at)
                fuse.light()
                sys.dont_write_bytecode = True  # or a part of it is left, see full_disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (most_file_bytes, resource.RLIM_INFINITY))
                scenario.act(folder)
                os.write(writer, str(fuse.n_steps).encode())
                status = 0
            except KvscopeError as error:
                os.write(writer, str(error).encode())
                status = error.exit_code
            except BaseException:  # noqa: BLE001 - a fork of this process must not go on as this process
                os.write(writer, traceback.format_exc()[-2000:].encode())
            finally:
                os._exit(status)
        os.close(writer)

    def end(self) -> tuple[int, str]:
        """Wait for its end; return (wait status, what it said)."""
        with os.fdopen(self._said, "rb") as said:
            text = said.read().decode()
        return os.waitpid(self.pid, 0)[1], text

    def kill_after(self, seconds: float) -> None:
        """Kill it after a while, unless it has ended."""
        time.sleep(seconds)
        os.kill(self.pid, signal.SIGKILL)  # not waited for yet: nobody else has its number

    def kill_worker(self, words: str, seconds: float) -> bool:
        """Kill one of its processes some time after it appears; return whether there was one."""
        me = psutil.Process(self.pid)
        while me.status() != psutil.STATUS_ZOMBIE:
            found = [each for each in _descendants(me) if words in _command(each)]
            if found:
                time.sleep(seconds)
                alive = [each for each in found if each.is_running()]
                if alive:
                    alive[-1].kill()
                    return True
            time.sleep(0.01)
        return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def orphans(mark: str) -> list[int]:
    """Return the processes that a killed sweep left, once they have had the time to see it."""
    until = time.monotonic() + _END_S
    while True:
        found = []
        for each in psutil.process_iter():
            try:
                if each.environ().get(MARK) == mark and each.pid != os.getpid():
                    found.append(each.pid)
            except psutil.Error:
                continue
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.05)


def difference(expected: Any, found: Any, where: str = "") -> str:
    """Return the first place where two values differ, and what is there."""
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        key = next((key for key in expected if expected[key] != found[key]), None)
        return "nothing" if key is None else difference(expected[key], found[key], f"{where} {key}")
    if isinstance(expected, tuple) and isinstance(found, tuple) and len(expected) == len(found):
        at = next(at for at in range(len(expected)) if expected[at] != found[at])
        return difference(expected[at], found[at], where)
    if isinstance(expected, dict) and isinstance(found, dict):
        other = sorted(expected.keys() ^ found.keys())[:5]
        return f"{where}: {len(expected)} expected, {len(found)} found; they differ in {other}"
    return f"{where}: {str(expected)[:200]} expected, {str(found)[:200]} found"


class Chaos:
    """Kills one scenario so often, and counts."""

    def __init__(self, scenario: Scenario, base: Path, dice: random.Random, *, by_steps_alone: bool) -> None:
        self.scenario, self.base, self.dice = scenario, base, dice
        self.kinds = ["step"] if by_steps_alone else ["step", "time", *(["worker"] if scenario.workers else [])]
        self.n_kills = 0
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self, n_kills: int) -> dict[str, Any]:
        """Return the counts of ``n_kills`` kills."""
        whole = self.base / "whole"
        self.scenario.prepare(whole)
        began_s = time.monotonic()
        status, said = Child(self.scenario, whole).end()
        assert status == 0, said
        self.whole_s, self.n_steps = time.monotonic() - began_s, int(said)
        self.whole = self._final(whole)
        number = 0
        sizes = [path.stat().st_size for path in whole.rglob("*") if path.is_file()]
        self.most_file_bytes = max(sizes)
        while self.n_kills < n_kills:
            number += 1
            self._one_folder(self.base / f"killed-{number}", n_kills)
        return {"what": self.scenario.name, **self.counts, "problems": self.problems}

    def _final(self, folder: Path) -> Any:
        left = [str(path.name) for path in folder.rglob("*") if ".tmp" in path.name or ".building" in path.name]
        tables = report_files(folder) if self.scenario.name == "report" else {}
        return dict(self.scenario.held(folder)), tables, left

    def _one_folder(self, folder: Path, n_kills: int) -> None:
        """Kill a command on one folder some times, then let it end."""
        self.scenario.prepare(folder)
        held: dict[str, Any] = {}
        parts = self.scenario.kills_a_folder
        for _ in range(parts):
            if self.n_kills >= n_kills:
                break
            kind = self.dice.choice(self.kinds)
            status, said, killed = self._disturb(kind, folder, parts)
            self.counts[f"by {kind}"] += killed
            self.n_kills += killed
            held = self._compare(folder, held, kind)
            if os.WIFEXITED(status) and os.WEXITSTATUS(status):
                self.problems.append(f"{kind}: {said[-600:]}")
        held = self._fill_disk(folder, held)
        for _ in range(3):  # a worker's end is a failed row, which the next call measures again
            status, said = Child(self.scenario, folder).end()
            if status:
                self.problems.append(f"the same command again: {said[-600:]}")
            if self._final(folder) == self.whole:
                break
        self.counts["doubled"] += self.scenario.doubled(folder)
        self.counts["resumed"] += 1
        final = self._final(folder)
        self.counts["equal"] += final == self.whole
        if final != self.whole:
            self.problems.append(difference(self.whole, final))

    def _fill_disk(self, folder: Path, held: dict[str, Any]) -> dict[str, Any]:
        """Let the command meet a disk that takes no file over some size."""
        most_bytes = int(self.most_file_bytes ** self.dice.uniform(0.2, 1))
        status, said = Child(self.scenario, folder, most_file_bytes=most_bytes).end()
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, EnvironmentProblem.exit_code):
            self.problems.append(f"no file over {most_bytes} bytes: exit code {code}: {said[-600:]}")
        self.counts["disk full"] += code == EnvironmentProblem.exit_code
        return self._compare(folder, held, "disk")

    def _disturb(self, kind: str, folder: Path, parts: int) -> tuple[int, str, bool]:
        os.environ[MARK] = mark = f"{os.getpid()}-{self.dice.random()}"
        try:
            if kind == "step":
                child = Child(self.scenario, folder, at=self.dice.randint(1, max(1, 2 * self.n_steps // parts)))
            else:
                child = Child(self.scenario, folder)
            hit = False
            if kind == "time":
                child.kill_after(self.dice.uniform(0, 2 * self.whole_s / parts))
            elif kind == "worker":
                hit = child.kill_worker(str(self.scenario.workers), self.dice.uniform(0, self.whole_s / 2))
            status, said = child.end()
        finally:
            del os.environ[MARK]
        killed = os.WIFSIGNALED(status)
        if killed and self.scenario.workers is not None and (left := orphans(mark)):
            self.problems.append(f"{kind}: {len(left)} processes lived on")
        return status, said, killed or hit

    def _compare(self, folder: Path, before: dict[str, Any], kind: str) -> dict[str, Any]:
        try:
            now = dict(self.scenario.held(folder)) if folder.exists() else {}
        except Exception as error:  # noqa: BLE001 - whatever is damaged is counted
            self.problems.append(f"{kind}: what is there cannot be read: {type(error).__name__}: {str(error)[:300]}")
            return before
        self.counts["looked at"] += len(before)
        self.counts["lost"] += sum(now.get(key) != value for key, value in before.items())
        return now


def _serve(address: Any) -> None:
    with stub_server() as stub:
        address.send(stub.url)
        signal.pause()


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 where something was lost, doubled, left behind or other than undisturbed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a scenario by name; repeatable")
    parser.add_argument("--steps-alone", action="store_true", help="kill at steps, at no time of the clock")
    parser.add_argument("--out", type=Path, help="JSON file of the counts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        server, address = None, None
        if not options.only or "served" in options.only:
            ours, theirs = get_context("fork").Pipe()
            server = get_context("fork").Process(target=_serve, args=(theirs,), daemon=True)
            server.start()
            address = ours.recv()
        every = scenarios(base, server=address)
        chosen = [every[name] for name in options.only or every]
        gc.freeze()
        results = []
        for at, scenario in enumerate(chosen):
            n_kills = options.kills * (at + 1) // len(chosen) - options.kills * at // len(chosen)
            place = base / f"chaos-{at}"
            place.mkdir()
            dice = random.Random(f"{options.seed} {scenario.name}")
            found = Chaos(scenario, place, dice, by_steps_alone=options.steps_alone).run(n_kills)
            results.append(found)
            print(json.dumps(found), flush=True)
        if server is not None:
            server.terminate()
    if options.out is not None:
        options.out.write_text(json.dumps({"seed": options.seed, "scenarios": results}, indent=1) + "\n")
    bad = [each for each in results if each["problems"] or each["lost"] or each["doubled"]
           or each["equal"] < each["resumed"]]  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
