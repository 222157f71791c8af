"""The options of ``kvscope run`` and ``kvscope plan``, each written once. Nothing heavy is imported: help is quick."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from kvscope.units import parse_length

if TYPE_CHECKING:
    from kvscope.harness.passes.config import RunConfig

ResultT = TypeVar("ResultT")

Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (float32 on a CPU, bfloat16 on a GPU), float32, ...")]


class RunOptions:
    """One annotation an option, in the order of the help. Names are keys of the configuration, but for the last two.

    None, or an empty list, is an option that was not given: the file's value stays.
    """

    config: Annotated[Path | None, typer.Argument(show_default=False, help="YAML file; flags win over it.")]
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="reference, a folder, a Hugging Face id, preset:NAME, or a server's URL.  [default: reference]",
        ),
    ]
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="SPEC",
            help="Method as name or name:key=value; repeatable.  [default: dense, sliding_window, recency, random]",
        ),
    ]
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "-t",
            metavar="SPEC",
            help="Task as name or name:key=value; repeatable.  [default: niah_single_1, niah_multikey_2]",
        ),
    ]
    lengths_tokens: Annotated[
        list[str] | None,
        typer.Option(
            "--length",
            "-l",
            metavar="TOKENS",
            help="Prompt + answer, as 4096, 4k (k = 1024) or 1M; repeatable.  [default: 1k 2k 4k 8k]",
        ),
    ]
    samples: Annotated[
        str | None,
        typer.Option("--samples", "-n", metavar="INTEGER", help="Prompts per task and length.  [default: 20]"),
    ]
    seed: Annotated[
        str | None,
        typer.Option("--seed", metavar="INTEGER", help="Seed of prompts and of random choices.  [default: 0]"),
    ]
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="DIR", help="Folder of the run; the same again resumes.")
    ]
    method_from: Annotated[
        str | None,
        typer.Option(
            "--method-from",
            metavar="last_token|question",
            help="First token under the method: the prompt's last, or the question's first.  [default: last_token]",
        ),
    ]
    answer_nll: Annotated[
        bool | None,
        typer.Option("--answer-nll/--no-answer-nll", help="Also measure the teacher-forced NLL of the answer."),
    ]
    max_new_tokens: Annotated[
        str | None,
        typer.Option("--max-new-tokens", metavar="TOKENS", help="New tokens per sample.  [default: the task's own]"),
    ]
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template",
            metavar="auto|none|FILE",
            help="Prompts as a user's turn; auto: by the tokenizer's own template, if it has one.  [default: auto]",
        ),
    ]
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="auto|N",
            help="Answers that are decoded in one step; auto is what memory holds.  [default: auto]",
        ),
    ]
    jobs: Annotated[
        str | None,
        typer.Option("--jobs", "-j", metavar="N", help="Processes on each device that answer prompts.  [default: 1]"),
    ]
    gpus: Annotated[
        str | None,
        typer.Option("--gpus", metavar="all|0,1", help="GPUs that answer prompts.  [default: the one of --device]"),
    ]
    executor: Annotated[
        str | None,
        typer.Option(
            "--executor",
            metavar="processes|ray",
            help="Who answers prompts; ray: a cluster's nodes.  [default: processes]",
        ),
    ]
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="HOST:PORT|auto|local",
            help="That cluster; auto: a running one, else local.  [default: auto]",
        ),
    ]
    accuracy_graph: Annotated[
        bool | None,
        typer.Option(
            "--accuracy-graph/--no-accuracy-graph",
            help="Answer with decode steps as a CUDA graph, where that can be done and pays.",
        ),
    ]
    self_check: Annotated[
        bool | None,
        typer.Option(
            "--self-check/--no-self-check",
            help="Compare the model through kvscope's cache with its own forward before anything is answered.",
        ),
    ]
    paper_settings: Annotated[
        bool | None,
        typer.Option(
            "--paper-settings/--no-paper-settings", help="Fix recency at 8192 tokens, blocks as in their papers."
        ),
    ]
    footprint: Annotated[
        bool | None,
        typer.Option("--footprint/--no-footprint", help="Measure memory and latency, a fresh process per cell."),
    ]
    footprint_lengths_tokens: Annotated[
        list[str] | None,
        typer.Option("--footprint-length", metavar="TOKENS", help="Lengths of that; repeatable.  [default: --length]"),
    ]
    footprint_batch: Annotated[
        str | None,
        typer.Option(
            "--footprint-batch",
            metavar="N",
            help="Sequences alike a cell of that, for KV below the driver's resolution.  [default: 1]",
        ),
    ]
    kv: Annotated[
        str | None,
        typer.Option(
            "--kv",
            metavar="prefill|synthetic",
            help="Memory and latency after a real prefill, or with pages of random values.  [default: prefill]",
        ),
    ]
    gpu_budget_bytes: Annotated[
        str | None,
        typer.Option(
            "--gpu-budget", metavar="SIZE", help="Most device bytes a process may take, as 24GiB.  [default: the card]"
        ),
    ]
    find_max: Annotated[
        bool | None,
        typer.Option("--find-max", help="Only find each method's longest context (bisection, synthetic KV)."),
    ]
    throughput: Annotated[
        bool | None,
        typer.Option(
            "--throughput", help="Only find each method's largest batch, and its tokens a second (synthetic KV)."
        ),
    ]
    time_limit_s: Annotated[
        str | None,
        typer.Option("--time-limit", metavar="SECONDS", help="Begin nothing new after this; the same continues."),
    ]
    retry: Annotated[
        bool | None,
        typer.Option("--retry/--no-retry", help="Measure failed and oom rows again, once a call.  [default: retry]"),
    ]
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.  [default: auto]")]
    device_map: Annotated[
        str | None,
        typer.Option(
            "--device-map",
            metavar="auto|balanced|FILE",
            help="A model over several GPUs: over all of them, or as a JSON file says (module: device).",
        ),
    ]
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="auto|float32|bfloat16|float16",
            help="auto is float32 on a CPU, bfloat16 on a GPU.  [default: auto]",
        ),
    ]
    served_model: Annotated[
        str | None,
        typer.Option("--served-model", metavar="NAME", help="Server: its name for the model.  [default: its only one]"),
    ]
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="MODEL", help="Server: its model's tokenizer; folder, reference or an id."),
    ]
    api: Annotated[
        str | None,
        typer.Option(
            "--api",
            metavar="auto|completions|chat",
            help="Server: which API; auto is chat where there is a chat template.  [default: auto]",
        ),
    ]
    server_context_tokens: Annotated[
        str | None,
        typer.Option(
            "--server-context",
            metavar="TOKENS",
            help="Server: longest prompt + answer.  [default: what it says, else the model's config]",
        ),
    ]
    concurrency: Annotated[
        str | None,
        typer.Option(
            "--concurrency", metavar="N", help="Server: requests at a time, if that changes no answer.  [default: 1]"
        ),
    ]
    request_timeout_s: Annotated[
        str | None,
        typer.Option("--request-timeout", metavar="SECONDS", help="Server: longest silence.  [default: 600]"),
    ]
    server_pid: Annotated[
        str | None,
        typer.Option("--server-pid", metavar="PID", help="Server: its process here, whose GPU memory NVML tells."),
    ]
    sweeps: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="METHOD.OPTION=VALUES",
            help="Run a method once for each value, as lsa.threshold=0.3,0.5; repeatable, every combination.",
        ),
    ]
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set any configuration key, value as YAML; repeatable, wins."),
    ]


class SameAnswersOptions:
    """The options of ``kvscope same-answers``: those of a run that mean something of two servers."""

    __annotations__ = {
        name: RunOptions.__annotations__[name]
        for name in (
            *(
                "tasks",
                "lengths_tokens",
                "samples",
                "seed",
                "out",
                "max_new_tokens",
                "chat_template",
                "tokenizer",
                "api",
            ),
            *("server_context_tokens", "concurrency", "request_timeout_s", "time_limit_s", "device", "dtype"),
        )
    }


class ReproduceOptions:
    """The options of ``kvscope reproduce``: those of a run that decide no value of a claim's rows."""

    __annotations__ = {
        name: RunOptions.__annotations__[name] for name in ("device", "dtype", "batch", "jobs", "gpus", "time_limit_s")
    }


def given_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in given.items() if value is not None and value != []}


def build_config(given: Mapping[str, Any]) -> "RunConfig":
    """Merge file, flags, ``--set`` and ``--sweep`` of a command, named as in :class:`RunOptions`.

    Raises:
        UsageError: an unknown key, or a value that cannot be.
    """
    from kvscope.harness.passes.config import load_config

    flags = given_values(given)
    path, sets, sweeps = flags.pop("config", None), flags.pop("sets", ()), flags.pop("sweeps", ())
    return load_config(path, flags=flags, sets=sets, sweeps=sweeps)


def with_options(
    name: str, holder: type, build: Callable[[dict[str, Any]], Any]
) -> Callable[[Callable[..., ResultT]], Callable[..., ResultT]]:
    """Give a command the options of a class in place of one of its parameters.

    Args:
        name: of that parameter.
        holder: one annotation an option; its attributes are the defaults, None where there is none.
        build: makes of all of them, by name, what the parameter gets.
    """
    shared = get_type_hints(holder, include_extras=True)

    def decorate(command: Callable[..., ResultT]) -> Callable[..., ResultT]:
        @wraps(command)
        def wrapper(**given: Any) -> ResultT:
            made = build({option: given.pop(option) for option in shared})
            return command(**{name: made}, **given)

        kind = inspect.Parameter.KEYWORD_ONLY
        parameters: list[inspect.Parameter] = []
        for own in inspect.signature(command).parameters.values():
            if own.name != name:
                parameters.append(own.replace(kind=kind))
                continue
            for option, annotation in shared.items():
                default = getattr(holder, option, None)
                parameters.append(inspect.Parameter(option, kind, default=default, annotation=annotation))
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorate


def with_run_options(command: Callable[..., ResultT]) -> Callable[..., ResultT]:
    """Give a command the options of a run in place of ``config``, the configuration they make."""
    return with_options("config", RunOptions, build_config)(command)


def lengths_of(texts: Sequence[str]) -> tuple[int, ...]:
    """Read lengths as commands take them (4096, 4k, 1M), shortest first, each once.

    Raises:
        UsageError: one is no length.
    """
    return tuple(sorted({parse_length(text) for text in texts}))
