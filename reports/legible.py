"""A run as reports show it: no control character of its texts reaches a page, a table, a figure or a terminal."""

import json
from dataclasses import replace
from typing import Any

import pandas as pd
from pydantic import ValidationError

from kvscope.errors import UsageError
from kvscope.results.frames import Run
from kvscope.results.plain_text import visible
from kvscope.results.rowfile import first_problem
from kvscope.results.run_schema import RunInfo


def legible(run: Run) -> Run:
    """Return the run with every control character of its texts written out (see `visible`).

    What no report shows stays as it is: prompts' targets and outputs, settings (written as JSON).

    Raises:
        UsageError: two methods or tasks look the same afterwards.
    """
    if run.memo.get(__name__):
        return run
    told = run.info.model_dump(mode="json")
    shown = _shown(told)
    info = run.info
    if shown != told:
        try:
            info = RunInfo.model_validate_json(json.dumps(shown))
        except ValidationError as error:
            raise UsageError(f"{run.folder} holds names that cannot be shown: {first_problem(error)}.") from error
    made = replace(
        run,
        info=info,
        samples=_plain(run.samples),
        footprint=_plain(run.footprint),
        max_context=_plain(run.max_context),
        throughput=_plain(run.throughput),
        messages=tuple(map(visible, run.messages)),
    )
    made.memo[__name__] = True
    return made


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(key): _shown(inner) for key, inner in value.items()}
    return [_shown(inner) for inner in value] if isinstance(value, list) else value


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    changed = {}
    for name in frame.columns:
        if frame[name].dtype != "string" or name == "output":
            continue
        texts = {text: visible(text) for text in frame[name].dropna().unique()}
        if any(text != plain for text, plain in texts.items()):
            changed[name] = frame[name].map(texts, na_action="ignore").astype("string")
    return frame.assign(**changed) if changed else frame
