"""The ``kvscope`` command: parses, calls, prints. Everything heavy is imported inside the commands.

Exit codes: 0 done, 1 some cells failed, 2 usage, 3 environment, 130 interrupted.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvscope.errors import KvscopeError, UsageError, did_you_mean
from kvscope.harness.indexers.dsa.cli import app as dsa_app
from kvscope.harness.indexers.lsa.cli import app as lsa_app

if TYPE_CHECKING:
    from kvscope.harness.passes.config import RunConfig

EXIT_DONE, EXIT_CELLS_FAILED, EXIT_USAGE, EXIT_ENVIRONMENT, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

app = typer.Typer(
    name="kvscope",
    help="What a KV-cache method keeps in memory, what that costs in accuracy, and what it costs in time.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(lsa_app, short_help="Collect, train and evaluate the indexer of lsa.")
app.add_typer(dsa_app, short_help="Train and evaluate the lightning indexer of dsa.")

#: Option names that are not the configuration key they set.
KEYS = {
    "method": "methods",
    "task": "tasks",
    "length": "lengths_tokens",
    "footprint_length": "footprint_lengths_tokens",
    "gpu_budget": "gpu_budget_bytes",
    "time_limit": "time_limit_s",
}

ConfigFile = Annotated[
    Path | None, typer.Argument(metavar="[CONFIG.yaml]", show_default=False, help="YAML file; flags win over it.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="reference, a folder, a Hugging Face id or preset:NAME.  [default: reference]"),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        "-m",
        metavar="SPEC",
        help="Method as name or name:key=value; repeatable.  [default: dense, sliding_window, recency, random]",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        "-t",
        metavar="SPEC",
        help="Task as name or name:key=value; repeatable.  [default: niah_single_1, niah_multikey_2]",
    ),
]
Lengths = Annotated[
    list[str] | None,
    typer.Option(
        "--length",
        "-l",
        metavar="TOKENS",
        help="Prompt + answer, as 4096, 4k (k = 1024) or 1M; repeatable.  [default: 1k 2k 4k 8k]",
    ),
]
Samples = Annotated[
    str | None, typer.Option("--samples", "-n", metavar="INTEGER", help="Prompts per task and length.  [default: 20]")
]
Seed = Annotated[
    str | None, typer.Option("--seed", metavar="INTEGER", help="Seed of prompts and of random choices.  [default: 0]")
]
From = Annotated[
    str | None,
    typer.Option(
        "--method-from",
        metavar="last_token|question",
        help="First token under the method: the prompt's last, or the question's first.  [default: last_token]",
    ),
]
AnswerNll = Annotated[
    bool | None,
    typer.Option("--answer-nll/--no-answer-nll", help="Also measure the teacher-forced NLL of the answer."),
]
MaxNewTokens = Annotated[
    str | None,
    typer.Option("--max-new-tokens", metavar="TOKENS", help="New tokens per sample.  [default: the task's own]"),
]
AccuracyGraph = Annotated[
    bool | None,
    typer.Option(
        "--accuracy-graph/--no-accuracy-graph",
        help="Answer with decode steps as a CUDA graph, where that can be done and pays.",
    ),
]
PaperSettings = Annotated[
    bool | None,
    typer.Option("--paper-settings/--no-paper-settings", help="Fix recency at 8192 tokens, blocks as in their papers."),
]
Footprint = Annotated[
    bool | None,
    typer.Option("--footprint/--no-footprint", help="Measure memory and latency, a fresh process per cell."),
]
FootprintLengths = Annotated[
    list[str] | None,
    typer.Option("--footprint-length", metavar="TOKENS", help="Lengths of that; repeatable.  [default: --length]"),
]
Kv = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="prefill|synthetic",
        help="Memory and latency after a real prefill, or with pages of random values.  [default: prefill]",
    ),
]
GpuBudget = Annotated[
    str | None,
    typer.Option(
        "--gpu-budget", metavar="SIZE", help="Most device bytes a process may take, as 24GiB.  [default: the card]"
    ),
]
FindMax = Annotated[
    bool | None,
    typer.Option("--find-max", help="Only find each method's longest context (bisection, synthetic KV)."),
]
Throughput = Annotated[
    bool | None,
    typer.Option("--throughput", help="Only find each method's largest batch, and its tokens a second (synthetic KV)."),
]
TimeLimit = Annotated[
    str | None,
    typer.Option("--time-limit", metavar="SECONDS", help="Stop before the next row after this; the same continues."),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.  [default: auto]")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="auto|float32|bfloat16|float16",
        help="auto is float32 on a CPU, bfloat16 on a GPU.  [default: auto]",
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder of the run; the same again resumes.")
]
Sweeps = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="METHOD.OPTION=VALUES",
        help="Run a method once for each value, as lsa.threshold=0.3,0.5; repeatable, every combination.",
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set any configuration key, value as YAML; repeatable, wins."),
]


def build_config(parameters: Mapping[str, Any]) -> "RunConfig":
    """Merge file, flags, ``--set`` and ``--sweep`` of a command; what was not given leaves the file's value."""
    from kvscope.harness.passes.config import load_config

    given = {KEYS.get(name, name): value for name, value in parameters.items() if value is not None and value != []}
    config, sets, sweeps = given.pop("config", None), given.pop("set_", ()), given.pop("sweep", ())
    return load_config(config, flags=given, sets=sets, sweeps=sweeps)


def print_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        import kvscope

        typer.echo(f"kvscope {kvscope.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """What a KV-cache method keeps in memory, what that costs in accuracy, and what it costs in time."""


@app.command(short_help="Measure methods, then write tables and figures.")
def run(
    config: ConfigFile = None,
    model: Model = None,
    method: Methods = None,
    task: Tasks = None,
    length: Lengths = None,
    samples: Samples = None,
    seed: Seed = None,
    out: Out = None,
    method_from: From = None,
    answer_nll: AnswerNll = None,
    max_new_tokens: MaxNewTokens = None,
    accuracy_graph: AccuracyGraph = None,
    paper_settings: PaperSettings = None,
    footprint: Footprint = None,
    footprint_length: FootprintLengths = None,
    kv: Kv = None,
    gpu_budget: GpuBudget = None,
    find_max: FindMax = None,
    throughput: Throughput = None,
    time_limit: TimeLimit = None,
    device: Device = None,
    dtype: Dtype = None,
    sweep: Sweeps = None,
    set_: Sets = None,
    report: Annotated[
        bool,
        typer.Option("--report/--no-report", help="Tables and figures at the end; kvscope report makes them, too."),
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; tables and paths only.")] = False,
) -> int:
    """Measure accuracy, memory and time of every method at every length, then write tables and figures.

    Each row is on disk as soon as it exists. The same command again continues where it stopped.
    """
    parameters = {name: value for name, value in locals().items() if name not in ("quiet", "report")}
    run_config = build_config(parameters)
    from kvscope.harness.passes.sweep import failures
    from kvscope.harness.passes.sweep import run as run_sweep

    measured = run_sweep(run_config, progress=not quiet)
    if report:
        print_report(measured.folder)
    else:
        typer.echo(f"rows     {measured.folder}")
    failed = failures(measured)
    for line in failed:
        typer.echo(line, err=True)
    return EXIT_CELLS_FAILED if failed else EXIT_DONE


@app.command(short_help="Say what run would do; run nothing.")
def plan(
    config: ConfigFile = None,
    model: Model = None,
    method: Methods = None,
    task: Tasks = None,
    length: Lengths = None,
    samples: Samples = None,
    seed: Seed = None,
    out: Out = None,
    method_from: From = None,
    answer_nll: AnswerNll = None,
    max_new_tokens: MaxNewTokens = None,
    accuracy_graph: AccuracyGraph = None,
    paper_settings: PaperSettings = None,
    footprint: Footprint = None,
    footprint_length: FootprintLengths = None,
    kv: Kv = None,
    gpu_budget: GpuBudget = None,
    find_max: FindMax = None,
    throughput: Throughput = None,
    time_limit: TimeLimit = None,
    device: Device = None,
    dtype: Dtype = None,
    sweep: Sweeps = None,
    set_: Sets = None,
) -> None:
    """Print what `run` with the same options would do: cells, predicted bytes, forecasts. Runs nothing."""
    parameters = dict(locals())
    run_config = build_config(parameters)
    from kvscope.harness.passes.plan import make_plan

    typer.echo(make_plan(run_config).text())


@app.command(short_help="Write the tables and figures of a run again.")
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run, finished or not.")],
) -> None:
    """Write tables, figures and report.html of a run into DIR/report, and print the summary.

    A folder of runs gets one report a run, each in its own folder.
    """
    from kvscope.results.store import run_folders

    folders = run_folders(folder)
    for run_folder in folders:
        if run_folder != folder:
            typer.echo(f"{run_folder.name}\n{'=' * len(run_folder.name)}")
        print_report(run_folder)


def print_report(folder: Path) -> None:
    """Make the report of a folder; print the summary tables and where everything is."""
    from kvscope.results.frames import load_run

    loaded = load_run(folder)
    for message in loaded.messages:
        typer.echo(message, err=True)
    from kvscope.reports import make_report
    from kvscope.reports.summary import summary_text

    typer.echo(summary_text(loaded))
    paths = make_report(folder)
    html = [path for path in paths if path.suffix == ".html"]
    typer.echo(f"\n{len(paths)} files under {folder / 'report'}")
    for path in html:
        typer.echo(f"report   {path}")


@app.command("list", short_help="List methods, tasks or models.")
def list_(
    kind: Annotated[str, typer.Argument(metavar="methods|tasks|models", help="What to list.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON, options included.")] = False,
) -> None:
    """List methods, tasks or models, each with one clause."""
    from kvscope.harness.info.catalog import entries, list_text

    if json:
        from json import dumps

        typer.echo(dumps(entries(kind), indent=2))
    else:
        typer.echo(list_text(kind))


@app.command(short_help="Explain one method, task or model.")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A method, task or model.")],
) -> None:
    """Print what stays, what is read, options with types and defaults, cost and source of a method, task or model."""
    from kvscope.harness.info.catalog import show_text

    typer.echo(show_text(name))


@app.command(short_help="Check this machine.")
def doctor(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where results would go.")] = Path(),
) -> int:
    """Check this machine: Python, packages, GPU, NVML, reference model, memory, disk. Exit 3 when a need is missing."""
    from kvscope.harness.info.doctor import failed, run_checks

    checks = run_checks(out)
    width = max(len(check.name) for check in checks)
    for check in checks:
        mend = f" ({check.mend})" if check.mend else ""
        typer.echo(f"{check.status:<4}  {check.name:<{width}}  {check.finding}{mend}")
    return EXIT_ENVIRONMENT if failed(checks) else EXIT_DONE


def check_command(arguments: Sequence[str], command: Any) -> None:
    """Refuse an unknown command with the nearest known one."""
    if not arguments[0].startswith("-") and arguments[0] not in command.commands:
        raise UsageError(f"There is no command {arguments[0]!r}.{did_you_mean(arguments[0], command.commands)}")


def run_cli(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every error is one sentence on stderr, never a traceback."""
    command = typer.main.get_command(app)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        arguments = ["--help"]
    # What the log says is printed by the commands themselves, once.
    logging.getLogger("kvscope").addHandler(logging.NullHandler())
    try:
        check_command(arguments, command)
        code = command.main(args=arguments, prog_name="kvscope", standalone_mode=False)
    except KvscopeError as error:
        typer.echo(f"kvscope: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough (`kvscope list tasks | head`).
        sys.stderr.close()
        return EXIT_DONE
    except Exception as error:
        # typer's usage errors: their classes moved between versions, their method did not.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        typer.echo(f"kvscope: {format_message()}", err=True)
        return EXIT_USAGE
    if code == EXIT_INTERRUPTED:  # newer typers turn the interrupt into this code themselves
        typer.echo("kvscope: interrupted; every finished row is kept, and the same command continues.", err=True)
    return code if isinstance(code, int) else EXIT_DONE


def main() -> None:
    """Console script."""
    sys.exit(run_cli())


if __name__ == "__main__":
    main()
