"""The command line's surface: frozen, quick to show, and true."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

import kvscope
from kvscope import cli
from kvscope.harness.passes.options import RunOptions, build_config
from kvscope.harness.passes.process import worker_environment

SHARED = [
    "--accuracy-graph", "--answer-nll", "--api", "--batch", "--chat-template", "--concurrency", "--device",
    "--device-map", "--dtype", "--executor", "--find-max", "--footprint", "--footprint-batch", "--footprint-length",
    "--gpu-budget", "--gpus", "--jobs", "--kv", "--length", "--max-new-tokens", "--method", "--method-from", "--model",
    "--no-accuracy-graph", "--no-answer-nll", "--no-footprint", "--no-paper-settings", "--no-retry", "--no-self-check",
    "--out", "--paper-settings", "--ray-address", "--request-timeout", "--retry", "--samples", "--seed", "--self-check",
    "--served-model", "--server-context", "--server-pid", "--set", "--sweep", "--task", "--throughput", "--time-limit",
    "--tokenizer", "-j", "-l", "-m", "-n", "-o", "-t", "config",
]  # fmt: skip
SURFACE = {
    "run": sorted([*SHARED, "--no-report", "--quiet", "--report", "-q"]),
    "same-answers": [
        "--api", "--chat-template", "--concurrency", "--device", "--dtype", "--json", "--length", "--max-new-tokens",
        "--out", "--quiet", "--request-timeout", "--samples", "--seed", "--served-model-a", "--served-model-b",
        "--server-context", "--task", "--time-limit", "--tokenizer", "-l", "-n", "-o", "-q", "-t", "a", "b",
    ],
    "plan": sorted([*SHARED, "--host-memory", "--json", "--target"]),
    "report": [
        "--format", "--label", "--methods", "--no-prompts", "--no-title", "--prompts", "--style", "--title", "--width",
        "folder",
    ],
    "compare": ["--fail-if", "--json", "--pair", "folders"],
    "samples": [
        "--differs-from", "--failed", "--json", "--length", "--limit", "--method", "--model", "--prompt", "--task",
        "-l", "-m", "-t", "folder",
    ],
    "list": ["--json", "kind"],
    "show": ["--json", "name"],
    "doctor": ["--json", "--out", "-o"],
    "models fetch": ["name"],
    "tasks fetch": ["name"],
    "lsa collect": [
        "--answers", "--chat-template", "--chunk-tokens", "--device", "--dtype", "--features", "--layers",
        "--least-mass", "--length", "--model", "--out", "--quiet", "--samples", "--seed", "--shard-documents",
        "--states", "--task", "--token-samples", "--top-p", "--voters", "--votes", "-l", "-n", "-o", "-q", "-t",
    ],
    "lsa train": [
        "--batch-documents", "--batch-rows", "--chunk-tokens", "--cold-start", "--data", "--device", "--encoder",
        "--encoder-width", "--epochs", "--gamma", "--heads", "--held-out", "--keep", "--key-dim", "--label-layers",
        "--layers", "--least-mass", "--lookback", "--lr", "--negatives", "--neighbours", "--out", "--patience",
        "--quiet", "--rank", "--recency-tokens", "--revive", "--seed", "--segment-tokens", "--sink-tokens", "--start",
        "--target-recall", "--tau", "--top-p", "--voters", "--votes", "--warm-start", "--weight-decay", "-o", "-q",
    ],
    "lsa calibrate": [
        "--cap-fraction", "--cap-tokens", "--chunk-tokens", "--data", "--device", "--dtype", "--indexer",
        "--label-layers", "--least-fraction", "--least-mass", "--least-tokens", "--out", "--quiet", "--recency-tokens",
        "--sink-tokens", "--target-kept", "--target-recall", "--tau", "--threshold", "--top-p", "--voters", "--votes",
        "-o", "-q",
    ],
    "lsa eval": [
        "--chunk-tokens", "--data", "--device", "--dtype", "--gate", "--indexer", "--label-layers", "--least-mass",
        "--model", "--out", "--quiet", "--recency-tokens", "--samples", "--seed", "--sink-tokens", "--tau", "--top-p",
        "--voters", "--votes", "-n", "-o", "-q",
    ],
    "dsa train": [
        "--batch-documents", "--batch-rows", "--cold-start", "--data", "--device", "--epochs", "--heads", "--held-out",
        "--key-dim", "--lr", "--out", "--patience", "--quiet", "--seed", "--warm-start", "--weight-decay", "-o", "-q",
    ],
    "study attention-mass": [
        "--device", "--dtype", "--length", "--model", "--out", "--samples", "--seed", "--task", "-l", "-n", "-o", "-t",
    ],
    "study block-ranks": [
        "--device", "--dtype", "--length", "--method", "--model", "--out", "--samples", "--seed", "--sweep", "--task",
        "-l", "-m", "-n", "-o", "-t",
    ],
    "verify flashmemory": ["--json", "--out", "-o"],
    "reproduce lsa": [
        "--batch", "--device", "--divisor", "--dry-run", "--dtype", "--gpus", "--jobs", "--lsa", "--model", "--out",
        "--profile", "--quiet", "--time-limit", "-j", "-o", "-q",
    ],
    "reproduce setup": [
        "--batch", "--device", "--dry-run", "--dtype", "--gpus", "--jobs", "--lsa", "--model", "--out", "--profile",
        "--quiet", "--time-limit", "-j", "-o", "-q",
    ],
    "reproduce claims": ["folder"],
    "study noise-floor": ["--method", "-m", "first", "second"],
    "study attention-figure": ["--out", "-o", "csv"],
    "backbone train": [
        "--architecture", "--max-seconds", "--optimizer", "--out", "--phases", "--replicas", "--resume", "--seconds",
        "--seed", "--steps", "--workers", "-o",
    ],
    "backbone evaluate": [
        "--batch-tokens", "--closed-book", "--length", "--max-seconds", "--out", "--samples", "--seed", "--task",
        "--workers", "-l", "-n", "-o", "-t", "folder",
    ],
    "backbone controls": [
        "--batch", "--length", "--out", "--samples", "--seed", "--task", "--workers", "-l", "-n", "-o", "-t", "folder",
    ],
    "backbone exclude-types": ["--model", "rows"],
    "lsa fit": [
        "--chat-template", "--chunk-tokens", "--device", "--dtype", "--length", "--minutes", "--out", "--quiet",
        "--seed", "--target-recall", "--task", "--tau", "-l", "-o", "-q", "-t", "model",
    ],
    "lm-eval": ["--dtype", "--method", "--model", "--no-self-check", "--self-check", "-m"],
    "dsa eval": ["--data", "--device", "--indexer", "--out", "--quiet", "--seed", "-o", "-q"],
}  # fmt: skip


def every_command() -> Iterator[tuple[str, Any]]:
    """Every command with its full name; groups are entered."""
    root = typer.main.get_command(cli.app)
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name, command
        else:
            assert command.short_help or command.help, name
            yield from ((f"{name} {sub}", each) for sub, each in inner.items())


def test_the_surface_is_frozen() -> None:
    """A change here is a change for every script and document: make it on purpose."""
    found = {}
    for name, command in every_command():
        words: list[str] = []
        for parameter in command.params:
            words += [*parameter.opts, *parameter.secondary_opts]
        found[name] = sorted(words)
    assert found == SURFACE


def test_every_option_and_command_has_help() -> None:
    for name, command in every_command():
        assert command.short_help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_help_text_names_the_real_defaults() -> None:
    from kvscope.harness.passes.config import RunConfig

    root = typer.main.get_command(cli.app)
    helps = {p.opts[0]: p.help for p in root.commands["run"].params if p.opts[0].startswith("-")}  # type: ignore[attr-defined]
    defaults = RunConfig()
    assert f"[default: {defaults.model}]" in helps["--model"]
    assert f"[default: {', '.join(map(str, defaults.methods))}]" in helps["--method"]
    assert f"[default: {', '.join(map(str, defaults.tasks))}]" in helps["--task"]
    assert f"[default: {' '.join(f'{n // 1024}k' for n in defaults.lengths_tokens)}]" in helps["--length"]
    assert f"[default: {defaults.samples}]" in helps["--samples"]
    assert f"[default: {defaults.seed}]" in helps["--seed"]
    assert f"[default: {defaults.method_from}]" in helps["--method-from"]


def test_every_option_of_a_run_is_a_key_of_the_configuration() -> None:
    from kvscope.harness.passes.config import RunConfig

    assert set(RunOptions.__annotations__) - set(RunConfig.model_fields) == {"config", "sets", "sweeps"}


def test_every_shared_option_reaches_the_configuration() -> None:
    values = {
        "model": "m", "methods": ["dense"], "tasks": ["niah_single_1"], "lengths_tokens": ["2k"], "samples": 3,
        "seed": 4, "out": "o", "method_from": "question", "answer_nll": True, "max_new_tokens": 5,
        "paper_settings": True, "footprint": True, "footprint_lengths_tokens": ["4k"], "device": "cpu",
        "dtype": "float16", "accuracy_graph": True,
    }  # fmt: skip
    config = build_config({**values, "config": None, "sets": ["page_tokens=32"]})
    assert config.lengths_tokens == (2048,)
    assert config.footprint_lengths_tokens == (4096,)
    assert (config.model, config.samples, config.seed, config.out) == ("m", 3, 4, "o")
    assert (config.method_from, config.answer_nll, config.max_new_tokens) == ("question", True, 5)
    assert config.accuracy_graph is True
    assert (config.paper_settings, config.device, config.dtype, config.page_tokens) == (True, "cpu", "float16", 32)


def test_an_option_not_given_leaves_the_default() -> None:
    from kvscope.harness.passes.config import RunConfig

    assert build_config({"model": None, "methods": None, "tasks": [], "config": None, "sets": None}) == RunConfig()


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plan", "--help"], ["--version"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; from kvscope.cli import run_cli; run_cli({arguments!r});"
        "heavy = {'torch', 'transformers', 'triton', 'pandas', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=worker_environment())
    assert done.returncode == 0, done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_cli(["--version"]) == 0
    assert capsys.readouterr().out == f"kvscope {kvscope.__version__}\n"


def test_no_argument_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_cli([]) == 0
    assert "doctor" in capsys.readouterr().out


@pytest.mark.parametrize("group", ["dsa", "lsa", "models", "reproduce", "study", "tasks", "verify", "backbone"])
def test_a_group_without_a_command_is_help(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_cli([group]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"Usage: kvscope {group} ")
    assert "\nCommands:\n" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(("typed", "words"), [("kvscope co", ["compare"]), ("kvscope compare --f", ["--fail-if"])])
def test_a_shell_completes_commands_and_options(
    typed: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_KVSCOPE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
    with pytest.raises(SystemExit):
        cli.run_cli([])
    assert capsys.readouterr().out.split() == words
