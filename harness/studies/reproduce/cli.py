"""The ``kvscope reproduce`` commands: parse, call, print. Everything heavy is imported inside them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kvscope.harness.passes.options import ReproduceOptions, given_values, with_options
from kvscope.terminal import line_width, say, tell

Size = Annotated[str, typer.Option("--profile", metavar="quick|full", help="quick: minutes on a CPU, short lengths.")]
Divisor = Annotated[
    int | None,
    typer.Option("--divisor", min=1, help="Divide the paper's lengths and window by this.  [default: 64, full: 1]"),
]
Lsa = Annotated[str, typer.Option("--lsa", metavar="SPEC", help="lsa with its options; the window is the profile's.")]
ReproduceOut = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder; the same again resumes.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the cells and their prompts; measure nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; tables and paths only.")]
ReproduceModel = Annotated[str, typer.Option("--model", help="As of kvscope run.")]


def reproduce_app(show: Callable[[Path], None]) -> typer.Typer:
    """Return the group of commands.

    Args:
        show: writes and prints the tables of a folder; reports are no matter of the harness.
    """
    app = typer.Typer(
        name="reproduce", help="Measure a paper's claims: claim, measured, verdict.", no_args_is_help=True
    )

    @app.callback()
    def reproduce_root() -> None:
        """Measure a paper's claims: claim, measured, interval and verdict in one table."""

    @app.command("lsa", short_help="FlashMemory's Table 1, row for row, and its other claims.")
    @with_options("overrides", ReproduceOptions, given_values)
    def reproduce_lsa(
        overrides: dict[str, Any],
        *,
        out: ReproduceOut,
        profile: Size = "quick",
        model: ReproduceModel = "reference",
        lsa: Lsa = "lsa",
        divisor: Divisor = None,
        dry_run: DryRun = False,
        quiet: Quiet = False,
    ) -> int:
        """Measure FlashMemory's Table 1 (arXiv 2606.09079) row for row, then hold its claims to the rows.

        Dense, lsa, recency and random under the paper's window, and baselines at lsa's bytes. A verdict needs a whole
        95 % interval inside, or outside, a margin that was fixed before. quick has short lengths and decides nothing.
        """
        return measure(
            "lsa", out, show, size=profile, model=model, lsa=lsa, divisor=divisor, overrides=overrides, dry_run=dry_run,
            quiet=quiet,
        )  # fmt: skip

    @app.command("setup", short_help="How much lsa's result depends on each setting.")
    @with_options("overrides", ReproduceOptions, given_values)
    def reproduce_setup(
        overrides: dict[str, Any],
        *,
        out: ReproduceOut,
        profile: Size = "quick",
        model: ReproduceModel = "reference",
        lsa: Lsa = "lsa",
        dry_run: DryRun = False,
        quiet: Quiet = False,
    ) -> int:
        """Change chunk size, threshold, tau, policy, kv, length and task one at a time, and draw each."""
        return measure(
            "setup", out, show, size=profile, model=model, lsa=lsa, divisor=None, overrides=overrides, dry_run=dry_run,
            quiet=quiet,
        )  # fmt: skip

    @app.command("claims", short_help="Write the claims of a reproduction again.")
    def reproduce_claims(
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of kvscope reproduce, finished or not.")],
    ) -> None:
        """Write tables and figures of a reproduction again from its rows, and print them."""
        show(folder)

    return app


def measure(
    profile: str,
    out: Path,
    show: Callable[[Path], None],
    *,
    size: str,
    model: str,
    lsa: str,
    divisor: int | None,
    overrides: dict[str, Any],
    dry_run: bool,
    quiet: bool,
) -> int:
    """Plan, measure and report a reproduction; return the exit code."""
    from kvscope.harness.passes.config import make_config
    from kvscope.harness.studies.reproduce.planning import make_reproduction, plan_text
    from kvscope.harness.studies.reproduce.running import earlier, reproduce

    time_limit_s = make_config(overrides, source="the options").time_limit_s
    overrides.pop("time_limit_s", None)
    planned = make_reproduction(profile, size=size, model=model, lsa=lsa, divisor=divisor, overrides=overrides)
    earlier(out, planned.plan)
    if dry_run:
        say(plan_text(planned, width=line_width()))
        return 0
    outcome = reproduce(
        planned.plan, planned.pilots, planned.equal, facts=planned.facts, folder=out, overrides=planned.overrides,
        time_limit_s=time_limit_s, progress=not quiet,
    )  # fmt: skip
    show(out)
    for line in outcome.failed:
        tell(line)
    if not outcome.complete:
        tell("Not finished: the same command continues.")
    return 1 if outcome.failed or not outcome.complete else 0
