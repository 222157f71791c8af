"""The plan of a run whose model is behind a server: prompts as ever, one method, and no bytes to predict."""

from dataclasses import dataclass, replace
from typing import Any, Self

from kvscope.errors import UsageError
from kvscope.harness.passes.environment import capture_environment
from kvscope.harness.passes.run_plan import RunPlan
from kvscope.harness.passes.served_facts import ServedFacts
from kvscope.harness.passes.served_keys import SERVED_METHOD
from kvscope.harness.passes.task_names import recorded_task
from kvscope.harness.served.asking import Manner
from kvscope.harness.served.probe import Findings, probe


@dataclass(frozen=True)
class ServedMethod:
    """What a server does with its cache, whatever that is."""

    name: str = SERVED_METHOD
    label: str = SERVED_METHOD

    def describe(self) -> dict[str, Any]:
        """Return the fields of its ``MethodInfo``."""
        return {
            "label": self.label,
            "name": self.name,
            "stays": "what the server keeps; kvscope does not see it",
            "saves": "not known",
            "source": "the server's own documentation",
            "saving_kind": "unknown",
        }


@dataclass(frozen=True, kw_only=True)
class ServedPlan(RunPlan):
    """A checked configuration whose prompts a server answers.

    Attributes:
        manner, findings: how the server is asked, and what it does in silence; None before it was probed.
    """

    facts: ServedFacts
    manner: Manner | None = None
    findings: Findings | None = None

    def ready(self) -> Self:
        """Return the plan with what a probe of the server found.

        Raises:
            UsageError: the server cannot be used (see ``probe``).
        """
        facts = self.facts
        manner, findings = probe(
            facts.client,
            facts.server,
            facts.prompt,
            api=facts.api,
            bos=facts.bos,
            concurrency=self.config.concurrency,
            context_tokens=facts.max_length_tokens,
            context_from=facts.context_from,
        )
        plan = replace(self, manner=manner, findings=findings)
        plan.check_room()
        return plan

    def check_room(self) -> None:
        """Refuse lengths that the server takes by our count, and not by its own.

        Raises:
            UsageError: naming the length.
        """
        longest = max(self.config.lengths_tokens)
        extra = (self.findings.extra_prompt_tokens or 0) if self.findings else 0
        if longest + extra > self.facts.max_length_tokens:
            raise UsageError(
                f"Length {longest:,} is over the {self.facts.max_length_tokens:,} tokens of the server's context "
                f"({self.facts.context_from}), as it counts {extra} tokens more than we do: use a shorter length."
            )

    @property
    def warnings(self) -> list[str]:
        """What the user may not expect, one sentence each."""
        return [*super().warnings, *(self.findings.notes if self.findings else ())]

    def header(self) -> list[str]:
        """Return the plan's lines of the model, tasks and lengths."""
        facts, server = self.facts, self.facts.server
        software = f" ({server.software})" if server.software else ""
        lines = [
            f"model    {server.model} at {server.url}{software}: {facts.api} requests, at most "
            f"{facts.max_length_tokens:,} tokens ({facts.context_from})",
            "probe    run asks it some small prompts first, and says what it does in silence; no memory is measured",
        ]
        if facts.chat_template is not None:
            lines.append(f"chat     prompts are turns of a user by its chat template, {facts.chat_template[:19]}")
        return [*lines, *self.prompts_text()]

    def identity(self) -> dict[str, Any]:
        """Return what rows of one folder have in common: the server, how it is asked, and the prompts."""
        assert self.manner is not None
        config, facts, manner = self.config, self.facts, self.manner
        return {
            "methods": [method.label for method in self.methods],
            "tasks": [recorded_task(spec, task) for spec, task in zip(config.tasks, self.tasks, strict=True)],
            "lengths_tokens": list(config.lengths_tokens),
            "footprint_lengths_tokens": [],
            "samples": config.samples,
            "seed": config.seed,
            "max_new_tokens": config.max_new_tokens,
            "model": {
                "url": facts.server.url,
                "name": facts.server.model,
                "tokenizer": facts.tokenizer_sha256,
                "form": manner.form,
                "bos": [manner.bos, manner.cut_bos],
                "fields": dict(manner.fields),
            },
            **({} if facts.chat_template is None else {"chat_template": facts.chat_template}),
        }

    def environment(self) -> dict[str, Any]:
        """Return where the prompts are made, and what was found of the server."""
        assert self.findings is not None
        return {**capture_environment(), "server": self.findings.plain()}
