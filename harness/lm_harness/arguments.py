"""What the lm-eval model's own arguments (``model_args``, ``--batch_size``) say, or what is wrong with them."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError, shown
from kvscope.harness.engine.names import resolve_model
from kvscope.harness.engine.presets import is_preset, refuse_preset
from kvscope.harness.served.address import is_url
from kvscope.specs import Spec, parse_spec

ROWS_CPU, ROWS_CUDA = 16, 64
"""Sequences of a step for ``batch_size=auto``."""
METHOD_PREFIX = "kv_"
_HFLM_ARGUMENTS = frozenset(
    {"add_bos_token", "prefix_token_id", "enable_thinking", "think_end_token", "chat_template_args"}
)


def model_spec(pretrained: object) -> str:
    """Return the spec of a model.

    Raises:
        UsageError: it is the model itself.
    """
    if not isinstance(pretrained, str | os.PathLike):
        raise UsageError(
            f"pretrained is {shown(pretrained)}, and kvscope loads models itself: give a name, a folder or an id."
        )
    return str(pretrained)


def require_weights(pretrained: str) -> None:
    """Refuse a spec of no weights that could be loaded here.

    Raises:
        UsageError: it is a preset or a server.
    """
    refuse_preset(pretrained, "ask")
    if is_url(pretrained):
        raise UsageError(
            f"{shown(pretrained)} is a server, and its cache takes no method: ask lm-eval's own local-completions, "
            "or use kvscope run --model URL."
        )


def refuse_unknown(names: Iterable[str]) -> None:
    """Refuse arguments that ``HFLM`` is not handed.

    Raises:
        UsageError: one is among ``names``.
    """
    unknown = sorted(set(names) - _HFLM_ARGUMENTS)
    if unknown:
        raise UsageError(
            f"The lm-eval model kvscope has no argument {shown(unknown[0])}: it takes pretrained, method, kv_NAME "
            "of the method, device, dtype, batch_size, max_length, self_check, "
            f"{', '.join(sorted(_HFLM_ARGUMENTS))}."
        )


def method_spec(method: str | Mapping[str, Any], options: Mapping[str, Any]) -> Spec:
    """Return what ``method`` and ``kv_*`` ask for together.

    Raises:
        UsageError: no spec, or an option that both give.
    """
    spec = parse_spec(method, kind="method")
    for key, value in options.items():
        name = key.removeprefix(METHOD_PREFIX)
        if name in dict(spec.options):
            raise UsageError(f"Option {name!r} of method {spec.name!r} is given twice: in method and as {key}.")
        spec = spec.with_option(name, value)
    return spec


def check_tokenizer(tokenizer: str | None, pretrained: str) -> None:
    """Refuse a tokenizer that is not the model's: prompts of RULER would be built with it, and encoded with another.

    Raises:
        UsageError: it is another.
    """
    if tokenizer in (None, pretrained) or is_url(pretrained) or is_preset(pretrained):
        return
    if Path(str(tokenizer)).resolve() != Path(resolve_model(pretrained)[0]).resolve():
        raise UsageError(
            f"tokenizer is {shown(tokenizer)}, and kvscope takes that of the model, {shown(pretrained)}: leave it out."
        )


def switch(name: str, value: object) -> bool:
    """Return a switch, which lm-eval's command line may hand over as text.

    Raises:
        UsageError: it is neither True nor False.
    """
    if isinstance(value, bool):
        return value
    if str(value).lower() not in ("true", "false"):
        raise UsageError(f"{name} is {shown(value)}, expected True or False.")
    return str(value).lower() == "true"


def step_sequences(batch_size: int | str | None, max_batch_size: int | str | None, device_type: str) -> int:
    """Return the most sequences of a step.

    Raises:
        UsageError: one of the sizes is no number from 1 on.
    """
    if max_batch_size is not None and (not str(max_batch_size).isdecimal() or int(max_batch_size) < 1):
        raise UsageError(f"max_batch_size is {shown(max_batch_size)}, expected a number from 1 on.")
    if batch_size is None or str(batch_size).startswith("auto"):
        rows = ROWS_CUDA if device_type == "cuda" else ROWS_CPU
        return rows if max_batch_size is None else min(rows, int(max_batch_size))
    text = str(batch_size)
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"batch_size is {shown(batch_size)}, expected auto or a number from 1 on.")
    return int(text)


def length_tokens(asked: int | str | None, longest_tokens: int) -> int:
    """Return the longest prompt plus answer; None asks for what the model takes, ``longest_tokens``.

    Raises:
        UsageError: it is no number from 2 to that.
    """
    if asked is None:
        return longest_tokens
    text = str(asked)
    if not text.isdecimal() or not 1 < int(text) <= longest_tokens:
        raise UsageError(
            f"max_length is {shown(asked)}, expected 2 to {longest_tokens:,} tokens, which the model takes."
        )
    return int(text)
