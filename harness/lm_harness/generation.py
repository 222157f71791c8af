"""What a task asks of an answer (its ``generation_kwargs``), held to greedy decoding, and the text it gets.

Reading and cutting are lm-eval's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from kvscope.errors import UsageError, shown
from kvscope.harness.engine.identity import STOCK_APPLIES

#: What greedy decoding has no use for, so that any value means the same.
_WITHOUT_EFFECT = frozenset({"do_sample", "temperature", "top_p", "top_k", "min_p", "max_length", "until"})


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Where an answer ends.

    Attributes:
        max_new_tokens: longest answer.
        until: it is cut before the first of these; the model's end of text is among them.
    """

    max_new_tokens: int
    until: list[str]

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Of ``until`` what decoding can end at."""
        return tuple(filter(None, self.until))

    def text(self, ids: Sequence[int], *, decode: Callable[[list[int]], str], think_end: int | str | None) -> str:
        """Return the text of an answer's tokens, without the thoughts before ``think_end``: a token, or a text."""
        if isinstance(think_end, int) and think_end in ids:
            last = len(ids) - 1 - list(reversed(ids)).index(think_end)
            answer, think_end = decode(list(ids[last + 1 :])).lstrip(), None
        else:
            answer = decode(list(ids))
        return str(postprocess_generated_text(answer, self.until, think_end if isinstance(think_end, str) else None))


def generation_of(request: Instance, *, default_tokens: int, end_of_text: str) -> Generation:
    """Return what a request asks of its answer, ``default_tokens`` long at most where it does not say.

    Raises:
        UsageError: it asks for other than greedy decoding, for no token, or for an end that is no text.
    """
    given = request.args[1]
    settings = normalize_gen_kwargs(given, default_tokens)
    max_new_tokens = int(settings.pop("max_gen_toks"))
    if max_new_tokens < 1:
        raise UsageError(
            f"{task_of(request)}: max_gen_toks is {max_new_tokens}, and an answer has one token at least: "
            "leave it out, or give --gen_kwargs max_gen_toks=N."
        )
    _require_greedy(settings, given)
    until = handle_stop_sequences(_stops(request, settings.get("until")), eos=end_of_text)
    return Generation(max_new_tokens=max_new_tokens, until=until)


def task_of(request: object) -> str:
    """Return what an error calls a request."""
    return getattr(request, "task_name", None) or "A request"


def _stops(request: Instance, until: Any) -> Any:
    if isinstance(until, list) and (other := [each for each in until if not isinstance(each, str | None)]):
        raise UsageError(f"{task_of(request)}: until holds {shown(other[0])}, which is no text: write it in quotes.")
    return until


def _require_greedy(settings: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    if settings.get("do_sample"):
        raise UsageError(
            f"A task asks for sampling ({shown(dict(given))}); kvscope decodes greedily: set do_sample=False."
        )
    other = sorted(key for key in settings if key not in _WITHOUT_EFFECT and settings[key] != STOCK_APPLIES.get(key))
    if other:
        raise UsageError(
            f"A task asks for {other[0]}={shown(settings[other[0]])}, which greedy decoding under a cache method does "
            "not have: take it out with --gen_kwargs, or leave the task out."
        )
