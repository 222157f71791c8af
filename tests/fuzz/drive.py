"""Fuzzes the readers with atheris: ``python tests/fuzz/drive.py [TARGET ...] [--runs N]``, not part of ``make test``.

Each target has a process of its own, guided by coverage of kvscope alone. It ends at the first input that raises
anything but a ``KvscopeError`` of one short sentence, or takes over two seconds; the input is written to ``crash-*``.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 2
MOST_BYTES = 4096


def one(name: str, runs: int) -> None:
    """Fuzz a target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["kvscope"]):
        from fuzz_targets import SEEDS, TARGETS, check
    corpus = Path(tempfile.mkdtemp(prefix=f"corpus-{name}-"))
    for number, seed in enumerate(SEEDS.get(name, (b"{}",))):
        (corpus / f"seed-{number}").write_bytes(seed)
    target = TARGETS[name]
    arguments = [f"-runs={runs}", f"-timeout={SECONDS}", f"-max_len={MOST_BYTES}", "-verbosity=0", "-seed=7"]
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], lambda data: check(target, data))
    atheris.Fuzz()


def main() -> int:
    """Fuzz every target asked for, one after the other; return how many found a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--runs", type=int, default=10_000, help="inputs a target")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        one(asked.targets[0], asked.runs)
        return 0
    from fuzz_targets import TARGETS

    faults = 0
    for name in asked.targets or TARGETS:
        started_s = time.monotonic()
        command = [sys.executable, __file__, name, "--runs", str(asked.runs), "--here"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        took_s = time.monotonic() - started_s
        said = "FAULT" if done.returncode else "no fault"
        sys.stdout.write(f"{name}: {asked.runs:,} inputs, {said} ({took_s:.0f} s)\n")
        if done.returncode:
            faults += 1
            sys.stdout.write(done.stderr[-3000:])
        sys.stdout.flush()
    return faults


if __name__ == "__main__":
    sys.exit(main())
