"""The model ``kvscope`` of lm-eval (0.4.12 and later): any stock task, under a cache method.

Encoding, chat templates and what a generation is cut at are lm-eval's own: the class is its ``HFLM`` but for every
forward, which goes through kvscope's engine. ``HFLM`` scores a continuation in one dense forward without a cache, where
no method ever acts: here it is fed token by token under the method.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

import kvscope
from kvscope.errors import UsageError, shown
from kvscope.harness.engine.backend import form_on
from kvscope.harness.engine.decoding import DecodeResult
from kvscope.harness.engine.identity import eos_ids, not_applied
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.names import resolve_model
from kvscope.harness.engine.self_check import self_check as check_model
from kvscope.harness.lm_harness.answering import Answering, Ask, Continuation, Score
from kvscope.harness.lm_harness.arguments import (
    METHOD_PREFIX,
    check_tokenizer,
    length_tokens,
    method_spec,
    model_spec,
    refuse_unknown,
    require_weights,
    step_sequences,
    switch,
)
from kvscope.harness.lm_harness.generation import generation_of, task_of
from kvscope.harness.passes.contract import check_methods
from kvscope.harness.passes.environment import package_version
from kvscope.methods.registry import create_method

_LOOKED_AT_TOKENS = 4096
"""Prompt length at which a method from outside is asked for what it will be asked."""
REFERENCE = "reference"
_CACHE_OWNER = "kvscope"
"""Key of a file of ``--use_cache`` that says whose answers it keeps; lm-eval's own keys are hashes."""
_log = logging.getLogger(__name__)


class KvscopeLM(HFLM):  # type: ignore[misc]  # lm-eval comes without types
    """A model under a cache method.

    Args:
        pretrained: as ``kvscope run --model``: ``reference``, a folder, a GGUF file, a public model, a hub id.
        method: as ``kvscope run -m``: a spec such as ``quest:budget_tokens=1k``, or a mapping with ``name``.
        batch_size: most sequences of a step; ``auto`` is 16 on a CPU and 64 on a GPU, or ``max_batch_size`` where
            that is less. Halved where memory ends.
        device, dtype: as ``kvscope run``.
        self_check: whether the model through kvscope's cache is compared with its own forward first.
        max_length: longest prompt plus answer in tokens, where it is to be less than the model's. A longer prompt is
            refused: nothing is cut.
        tokenizer: where the model's is, for tasks that read it of the arguments; another is refused.
        kwargs: those of ``HFLM`` that say how text becomes tokens (``add_bos_token``, ``prefix_token_id``,
            ``enable_thinking``, ``think_end_token``, ``chat_template_args``), and options of the method as
            ``kv_NAME=VALUE``.

    Raises:
        UsageError: no such model or method, one that cannot run here, or an argument that is none.
        EnvironmentProblem: the device asked for is not there.
    """

    latest: ClassVar[KvscopeLM | None] = None
    """The one made last: lm-eval's command line does not hand it out."""

    def __init__(
        self,
        pretrained: str = REFERENCE,
        *,
        method: str | Mapping[str, Any] = "dense",
        batch_size: int | str | None = "auto",
        device: str | None = None,
        dtype: str = "auto",
        self_check: bool | str = True,
        max_length: int | str | None = None,
        tokenizer: str | None = None,
        max_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        pretrained = model_spec(pretrained)
        check_tokenizer(tokenizer, pretrained)
        checks = switch("self_check", self_check)
        options = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith(METHOD_PREFIX)}
        refuse_unknown(kwargs)
        chosen = create_method(method_spec(method, options))
        require_weights(pretrained)
        loaded = load_model(pretrained, device=device or "auto", dtype=dtype)
        if loaded.tokenizer is None:
            raise UsageError(f"Model '{pretrained}' has no tokenizer, and tasks of lm-eval are text: take another.")
        # As stock generate has it: of generation config and tokenizer, not of the config.
        generation = getattr(loaded.model, "generation_config", None)
        self.loaded = replace(loaded, eos_ids=eos_ids(generation, loaded.tokenizer) or loaded.eos_ids)
        self.method = form_on(loaded.backend, chosen, loaded.shape)
        self.method.require(loaded.shape)
        if reasons := self.method.unsupported(loaded.shape, loaded.device):
            raise UsageError(f"Method {self.method.label!r} cannot run on '{loaded.name}': {'; '.join(reasons)}.")
        check_methods([self.method], loaded.shape, loaded.device, lengths_tokens=[_LOOKED_AT_TOKENS])
        if checks:
            check_model(loaded)
        self._self_check = checks
        with _no_word_of_the_model():
            super().__init__(
                pretrained=loaded.model,
                tokenizer=loaded.tokenizer,
                batch_size=1,
                max_length=length_tokens(max_length, loaded.max_length_tokens),
                **kwargs,
            )
        # A prompt's text is the same for both, and its tokens or answers are not.
        self._answers_of = f"{Path(resolve_model(pretrained)[0]).absolute()}, {loaded.dtype}, {self.method.label}"
        self._answers_of += "".join(f", {key}={value}" for key, value in sorted(kwargs.items()))
        self._answering = Answering(
            self.loaded, self.method, rows=step_sequences(batch_size, max_batch_size, loaded.device.type)
        )
        self._ignored = not_applied(generation)
        KvscopeLM.latest = self
        for text in self._ignored:
            _log.warning(
                "kvscope answers greedily and leaves out the model's own %s, which stock generate applies.", text
            )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> KvscopeLM:
        """Make the model of arguments; ``tokenizer`` is added to them.

        RULER's tasks build prompts with the tokenizer that the same mapping names, and know no name of kvscope's.
        """
        made: KvscopeLM = super().create_from_arg_obj(arg_dict, additional_config)
        arg_dict.setdefault("tokenizer", resolve_model(str(arg_dict.get("pretrained", REFERENCE)))[0])
        return made

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take what keeps answers for a later call (``--use_cache``); lm-eval asks that before the model.

        Raises:
            UsageError: it keeps answers of another model or method: they are stored by the prompt alone.
        """
        kept = getattr(cache_hook, "dbdict", None)
        if kept is not None:
            said = self._answers_of
            there = kept.get(_CACHE_OWNER) or ("another model" if len(kept) else said)
            if there != said:
                raise UsageError(
                    f"use_cache: that file keeps answers of {there}, which would be taken for those of {said}: give "
                    "--use_cache another path for each model and method."
                )
            kept[_CACHE_OWNER] = said
        super().set_cache_hook(cache_hook)

    # -- answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer every request greedily under the method.

        Raises:
            UsageError: before the first answer, where one asks for other than greedy decoding or is too long.
        """
        end_of_text = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        asks, asked = [], []
        for request in requests:
            wanted = generation_of(request, default_tokens=self.max_gen_toks, end_of_text=end_of_text)
            ids = tuple(self.tok_batch_encode([request.args[0]])[0][0].tolist())
            if not ids:
                raise UsageError(
                    f"{task_of(request)}: a prompt is empty, and the tokenizer of '{self.loaded.name}' puts no token "
                    "before it: there is nothing to go on from."
                )
            self._require_room(len(ids), wanted.max_new_tokens, request)
            asks.append(Ask(ids=ids, max_new_tokens=wanted.max_new_tokens, stop_strings=wanted.stop_strings))
            asked.append(wanted)
        texts = [""] * len(requests)
        with self._bar(len(requests), "answers", disable=disable_tqdm) as bar:

            def done(place: int, result: DecodeResult) -> None:
                texts[place] = asked[place].text(result.ids, decode=self.tok_decode, think_end=self.think_end_token)
                self.cache_hook.add_partial("generate_until", requests[place].args, texts[place])
                bar.update(1)

            self._answering.answer(asks, done)
        return texts

    # -- scores

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score continuations, each token fed under the method.

        Raises:
            UsageError: before the first, where one is empty or too long.
        """
        del override_bs
        asked = []
        for texts, context_ids, ids in requests:
            if not ids:
                raise UsageError(f"A continuation of the context {shown(texts[0][-40:])} has no token to score.")
            self._require_room(len(context_ids), len(ids), texts)
            asked.append(Continuation(context_ids=tuple(context_ids), ids=tuple(ids)))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with self._bar(len(requests), "continuations", disable=disable_tqdm) as bar:

            def done(place: int, score: Score) -> None:
                found[place] = score.log_likelihood, score.is_greedy
                self.cache_hook.add_partial("loglikelihood", requests[place][0], found[place])
                bar.update(1)

            self._answering.score(asked, done)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refuse perplexity of whole texts: it has no context that a method could keep less of.

        Raises:
            UsageError: always.
        """
        del disable_tqdm
        name = requests[0].task_name if requests else "this task"
        raise UsageError(
            f"{name} asks for the perplexity of whole texts (loglikelihood_rolling), which have no context that a "
            "cache method could keep less of: take tasks of generate_until, loglikelihood or multiple_choice."
        )

    # -- what lm-eval writes down

    def get_model_info(self) -> dict[str, Any]:
        """Return what ran, for the config of lm-eval's results: model, method, bytes and times."""
        loaded = self.loaded
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
            "model_dtype": str(loaded.dtype).removeprefix("torch."),
            "model_revision": loaded.revision,
            "kvscope": {
                "version": kvscope.__version__,
                "transformers_version": package_version("transformers"),
                "torch_version": package_version("torch"),
                "model": loaded.name,
                "device": str(loaded.device),
                "method": self.method.name,
                "method_label": self.method.label,
                "saving_kind": self.method.saving_kind,
                "attention_backend": loaded.attention_backend,
                "self_check": "passed" if self._self_check else "skipped",
                "not_applied": self._ignored,
                **self._answering.usage.summary(decodes_twice=self._decodes_twice),
            },
        }

    @property
    def _decodes_twice(self) -> bool:
        """Whether what the method knows costs more than what it keeps, so that only its answers mean something."""
        return self.method.rehearsal() is not None

    @property
    def summary(self) -> str:
        """What all sequences so far held and took, in a line; empty before the first."""
        return self._answering.usage.line(self.method.label, decodes_twice=self._decodes_twice)

    def _require_room(self, n_context: int, n_more: int, request: object) -> None:
        if n_context + n_more > self.max_length:
            raise UsageError(
                f"{task_of(request)}: a prompt of {n_context:,} tokens and {n_more:,} for its answer are over the "
                f"{self.max_length:,} tokens that model '{self.loaded.name}' takes, and nothing is cut: leave out the "
                "longest samples (--samples, --limit, a smaller length in --metadata), or take another model."
            )

    @staticmethod
    def _bar(total: int, what: str, *, disable: bool) -> Any:
        return tqdm(total=total, desc=f"kvscope: {what}", disable=disable or None)


@contextmanager
def _no_word_of_the_model() -> Iterator[None]:
    """Keep two warnings back that lm-eval has for models that others have built."""
    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
