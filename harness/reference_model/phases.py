"""The phases that the reference model was trained in, and the choice of some of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvscope.errors import UsageError, did_you_mean
from kvscope.harness.reference_model.curriculum import Phase, Shape


def _one(tokens: int, rows: int, questions: int) -> tuple[Shape, ...]:
    return (Shape(tokens=tokens, rows=rows, questions=questions),)


_STORIES = (("long_qa", 0.28), ("vt", 0.1), ("cwe", 0.03), ("fwe", 0.03))
_COMPOSED = (("long_qa_2", 0.35), ("vt", 0.08), ("cwe", 0.04), ("fwe", 0.03))
# Lengths are mixed from 2K on: long rows alone unlearn short prompts (docs/log.md).
_TO_64K = (
    Shape(tokens=2048, rows=24, questions=24, share=0.28),
    Shape(tokens=8192, rows=8, questions=48, share=0.37),
    Shape(tokens=32_768, rows=2, questions=80, share=0.27),
    Shape(tokens=65_536, rows=1, questions=100, share=0.08),
)
_TO_128K = (
    Shape(tokens=2048, rows=24, questions=24, share=0.25),
    Shape(tokens=8192, rows=8, questions=48, share=0.35),
    Shape(tokens=32_768, rows=2, questions=80, share=0.32),
    Shape(tokens=131_072, rows=1, questions=120, share=0.08),
)
# A row of 512K costs as much as a hundred steps of 8K, nearly all of it attention: few of them.
_TO_512K = (
    Shape(tokens=2048, rows=24, questions=24, share=0.2),
    Shape(tokens=8192, rows=8, questions=48, share=0.3),
    Shape(tokens=32_768, rows=2, questions=80, share=0.25),
    Shape(tokens=131_072, rows=1, questions=120, share=0.15),
    Shape(tokens=262_144, rows=1, questions=160, share=0.08),
    Shape(tokens=524_288, rows=1, questions=200, share=0.02),
)
# Many forms of every task, half of the rows; the families before them stay, or they are unlearnt.
_FORMS = (("vt_forms", 0.2), ("needle_forms", 0.16), ("cwe_forms", 0.08), ("fwe_forms", 0.06),
          ("long_qa_2", 0.2), ("vt", 0.06), ("cwe", 0.02), ("fwe", 0.02))  # fmt: skip
# Stories lose a little behind p6 (docs/log.md): more of them than there.
_FORMS_LONG = (("vt_forms", 0.12), ("needle_forms", 0.12), ("cwe_forms", 0.04), ("fwe_forms", 0.04),
               ("long_qa_2", 0.34), ("vt", 0.08), ("cwe", 0.02), ("fwe", 0.02))  # fmt: skip
# Each shape under 128K costs 15 to 20 s of compilation: four.
_FORMS_TO_32K = (
    Shape(tokens=1024, rows=48, questions=12, share=0.25),
    Shape(tokens=4096, rows=14, questions=32, share=0.4),
    Shape(tokens=16_384, rows=4, questions=64, share=0.2),
    Shape(tokens=32_768, rows=2, questions=80, share=0.15),
)
_FORMS_TO_512K = (
    Shape(tokens=4096, rows=14, questions=32, share=0.34),
    Shape(tokens=32_768, rows=2, questions=80, share=0.36),
    Shape(tokens=131_072, rows=1, questions=120, share=0.22),
    Shape(tokens=262_144, rows=1, questions=160, share=0.065),
    Shape(tokens=524_288, rows=1, questions=200, share=0.015),
)
PHASES = (
    Phase(name="p0-128", shapes=_one(128, 256, 4), steps=878, lr=(1.5e-3, 1.5e-3), copy_share=0.3, recall_share=0.4),
    Phase(name="p1-512", shapes=_one(512, 80, 10), steps=1135, lr=(1.5e-3, 1.5e-3), copy_share=0.05,
          documents=(("long_qa", 0.2), ("vt_fixed", 0.1))),
    Phase(name="p2-2k", shapes=(Shape(tokens=512, rows=80, questions=10, share=0.25),
                                Shape(tokens=2048, rows=20, questions=24, share=0.75)),
          steps=1594, lr=(1.5e-3, 1.5e-3),
          documents=(("long_qa", 0.25), ("vt_fixed", 0.1), ("cwe", 0.05), ("fwe", 0.05))),
    Phase(name="p3-64k", shapes=_TO_64K, steps=3736, lr=(1.5e-3, 2e-5), documents=_STORIES),
    Phase(name="p4-128k", shapes=_TO_128K, steps=2890, lr=(1e-3, 1e-4), documents=_COMPOSED, more_uuids=0.25),
    Phase(name="p5-512k", shapes=_TO_512K, steps=561, lr=(5e-4, 1e-5), documents=_COMPOSED, more_uuids=0.25,
          warmup_steps=60),
    Phase(name="p6-forms", shapes=_FORMS_TO_32K, steps=6000, lr=(8e-4, 1e-4), documents=_FORMS, more_uuids=0.2,
          warmup_steps=100),
    Phase(name="p7-forms-long", shapes=_FORMS_TO_512K, steps=700, lr=(2e-4, 1e-5), documents=_FORMS_LONG,
          more_uuids=0.2, warmup_steps=40),
)  # fmt: skip


def phases_of(
    names: str | None,
    steps: str | None,
    phases: Sequence[Phase] = PHASES,
    history: Sequence[Mapping[str, Any]] = (),
) -> tuple[Phase, ...]:
    """Return the phases of comma-separated names (all without), with comma-separated steps of their own.

    Args:
        phases: to choose from.
        history: of the checkpoint to start from; the phase it was stopped in keeps its planned steps.

    Raises:
        UsageError: there is no such phase, or not one number of steps for each.
    """
    known = {phase.name: phase for phase in phases}
    chosen = names.split(",") if names else list(known)
    for name in chosen:
        if name not in known:
            raise UsageError(f"--phases: there is no phase {name!r}.{did_you_mean(name, known)}")
    found = tuple(known[name] for name in chosen)
    if steps is None:
        planned = steps_before(history, found[0].name)[1]
        return (replace(found[0], steps=planned), *found[1:]) if planned else found
    counts = _one_each("--steps", steps, found)
    if not all(count.is_integer() and count > 0 for count in counts):
        raise UsageError(f"--steps {steps!r}: steps are whole numbers from 1 on.")
    return tuple(replace(phase, steps=int(count)) for phase, count in zip(found, counts, strict=True))


def phases_left(phases: Sequence[Phase], history: Sequence[Mapping[str, Any]]) -> tuple[Phase, ...]:
    """Return the phases that a run has not ended, in their order; one broken off keeps its planned steps.

    Args:
        history: ``phases`` of the run's training state.

    Raises:
        UsageError: it has ended them all.
    """
    left = []
    for phase in phases:
        parts = [part for part in history if part["name"] == phase.name]
        if not parts:
            left.append(phase)
        elif not _has_ended(parts[-1]):
            left.append(replace(phase, steps=int(parts[-1]["steps"])))
    if not left:
        raise UsageError("--phases left: the run of --resume has ended every phase; name those to train once more.")
    return tuple(left)


def _has_ended(part: Mapping[str, Any]) -> bool:
    return part.get("ended_by") == "accuracy" or part["steps_done"] >= part["steps"]


def steps_before(history: Sequence[Mapping[str, Any]], name: str) -> tuple[int, int]:
    """Return how many steps of a phase a checkpoint has behind it, and how many were planned; (0, 0) for none.

    Only the phase that a run was stopped in is gone on with; one that came to its end starts anew.

    Args:
        history: ``phases`` of the checkpoint's training_state.json.
    """
    last = history[-1] if history else {}
    if last.get("name") != name or _has_ended(last):
        return 0, 0
    return last["steps_done"], last["steps"]


def seconds_of(seconds: str | None, phases: tuple[Phase, ...]) -> tuple[float, ...] | None:
    """Return the time budgets of comma-separated seconds; None for none.

    Raises:
        UsageError: not one for each phase, or not a time above 0.
    """
    if seconds is None:
        return None
    budgets_s = _one_each("--seconds", seconds, phases)
    if not all(math.isfinite(each) and each > 0 for each in budgets_s):
        raise UsageError(f"--seconds {seconds!r}: give each phase a number of seconds above 0.")
    return budgets_s


def check_age(max_seconds: float | None) -> None:
    """Refuse an age that nothing reaches or that is over before the first step.

    Raises:
        UsageError: it is negative or no finite number.
    """
    if max_seconds is not None and not (math.isfinite(max_seconds) and max_seconds >= 0):
        raise UsageError(f"--max-seconds {max_seconds}: give seconds from 0 on, or leave it out for no limit.")


def _one_each(option: str, text: str, phases: tuple[Phase, ...]) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of numbers: write for example {option} 878,1135.") from None
    if len(values) != len(phases):
        raise UsageError(f"{option} {text!r} is {len(values)} numbers for {len(phases)} phases: give one for each.")
    return values
