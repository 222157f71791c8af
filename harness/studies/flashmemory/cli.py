"""The ``kvscope verify`` commands: parse, call, print. Everything heavy is imported inside them."""

from pathlib import Path
from typing import Annotated

import typer

from kvscope.harness.studies.cli import refuse_existing
from kvscope.terminal import say, tell

app = typer.Typer(name="verify", help="Check printed numbers by arithmetic alone.", no_args_is_help=True)


@app.callback()
def verify_root() -> None:
    """Check printed numbers by arithmetic alone; nothing is measured."""


@app.command(short_help="Check FlashMemory-DeepSeek-V4's numbers.")
def flashmemory(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="CSV", help="Also write them; the file must not exist.")
    ] = None,
) -> None:
    """Recompute what FlashMemory-DeepSeek-V4 (arXiv 2606.09079) printed: from its other numbers and the geometry.

    Each number stands beside what arithmetic gives, with what the difference means. It is a report, so the exit code
    is 0 whatever it finds.
    """
    if out is not None:
        refuse_existing(out)
    from kvscope.files import whole_file
    from kvscope.harness.studies.flashmemory.accuracy import accuracy_groups
    from kvscope.harness.studies.flashmemory.check import checks_csv, checks_json, checks_text
    from kvscope.harness.studies.flashmemory.memory import memory_groups
    from kvscope.harness.studies.flashmemory.serving import serving_groups

    groups = [*memory_groups(), *accuracy_groups(), *serving_groups()]
    say(checks_json(groups) if json else checks_text(groups))
    if out is not None:
        with whole_file(out) as temporary:
            temporary.write_text(checks_csv(groups), encoding="utf-8")
        tell(f"numbers  {out}")
