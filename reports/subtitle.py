"""What a run is in one line, for pictures and for the terminal: this needs no matplotlib, which takes half a second."""

from collections.abc import Sequence

from kvscope.reports.coverage import coverage
from kvscope.results.frames import Run
from kvscope.results.plain_text import shortened
from kvscope.results.run_schema import RunInfo


def subtitle_of(run: Run) -> str:
    """Model, machine and options that no label repeats, under a title; an unfinished run says so in every picture."""
    device = shortened(device_of(run.info), most=80)
    shared = shared_options([method.label for method in run.info.methods])
    device += "".join(f"; every {name}: {', '.join(parts)}" for name, parts in shared.items())
    state = coverage(run)
    model = shortened(run.info.model, most=120)
    if state.complete:
        return f"{model} on {device}"
    rows = f"{state.samples_present} of {state.samples_expected} sample rows"
    if state.footprint_expected:
        rows += f", {state.footprint_present} of {state.footprint_expected} footprint rows"
    return f"{model} on {device}; unfinished run ({rows})"


def device_of(info: RunInfo) -> str:
    """Where the model of a run computed, in words."""
    return "a server" if info.served else str(info.environment.get("gpu") or "CPU")


def shared_options(labels: Sequence[str]) -> dict[str, list[str]]:
    """Method name -> the options that all methods of that name have in common, where there are several."""
    options: dict[str, list[list[str]]] = {}
    for label in labels:
        name, _, text = label.partition(":")
        options.setdefault(name, []).append(text.split(",") if text else [])
    shared = {
        name: [part for part in found[0] if all(part in other for other in found[1:])]
        for name, found in options.items()
        if len(found) > 1
    }
    return {name: parts for name, parts in shared.items() if parts}
