"""What is known of a model behind a server before it is asked anything: its tokenizer, its name, its longest prompt."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from kvscope.errors import UsageError
from kvscope.harness.passes.facts import PromptFacts
from kvscope.harness.passes.libraries import import_libraries
from kvscope.harness.served.address import key_from_environment
from kvscope.harness.served.asking import Api, ServedPrompt
from kvscope.harness.served.client import Client
from kvscope.harness.served.server import Server, describe_server
from kvscope.paths import user_path

if TYPE_CHECKING:
    from kvscope.harness.passes.config import RunConfig

WHERE, UNKNOWN = "server", "unknown"


@dataclass(frozen=True, kw_only=True)
class ServedFacts(PromptFacts):
    """A model behind a server.

    Attributes:
        client: what asks the server.
        server: what it says of itself.
        api: the API that is asked.
        context_from: who says that ``max_length_tokens`` is the longest prompt plus answer.
        tokenizer_sha256: hash of our tokenizer's vocabulary.
    """

    client: Client
    server: Server
    api: Api
    context_from: str
    tokenizer_sha256: str

    def prompt(self, text: str, ids: tuple[int, ...] | None = None) -> ServedPrompt:
        """Return a text as a prompt; its ids are those given, or what the tokenizer makes of it."""
        if ids is None:
            ids = tuple(self.tokenizer(text, add_special_tokens=True)["input_ids"])
        whole = text if self.chat_template is None else self.tokenizer.rendered(text)
        return ServedPrompt(ids=ids, text=whole, message=text)

    @property
    def bos(self) -> str:
        """The beginning of sequence that our tokenizer puts before prompts, as text; empty where it puts none."""
        plain = self.plain_tokenizer
        bos_id = getattr(plain, "bos_token_id", None)
        first = self.tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        return str(plain.bos_token) if bos_id is not None and list(first) == [bos_id] else ""


def describe_served(config: "RunConfig") -> ServedFacts:
    """Describe the model behind a server: from its tokenizer's files, and from what the server lists.

    Raises:
        UsageError: no tokenizer, no server of this API, no such model there, or nobody says how long a prompt may be.
    """
    import_libraries()
    from kvscope.harness.engine.chat import chat_tokenizer

    assert config.tokenizer is not None  # the configuration asks for it
    tokenizer, own_tokens = served_tokenizer(config.tokenizer)
    chat = chat_tokenizer(tokenizer, config.chat_template)
    if config.api == "chat" and chat is None:
        raise UsageError(
            "api: the server puts prompts of the chat API into its template, and without that their length is not "
            "known: give the template with --chat-template FILE, or use --api completions."
        )
    client = Client(
        config.model, key=key_from_environment(), timeout_s=config.request_timeout_s, tries=config.request_tries
    )
    server = describe_server(client, model=config.served_model)
    most_tokens, source = _context(config, server, own_tokens)
    return ServedFacts(
        spec=config.model,
        name=PurePosixPath(server.model).name if server.model.startswith("/") else server.model,
        device=WHERE,
        dtype=UNKNOWN,
        tokenizer=chat or tokenizer,
        chat_template=None if chat is None else chat.sha256,
        max_length_tokens=most_tokens,
        revision=None,
        client=client,
        server=server,
        api="completions" if chat is None or config.api == "completions" else "chat",
        context_from=source,
        tokenizer_sha256=_vocabulary_sha256(tokenizer),
    )


def served_tokenizer(spec: str) -> tuple[Any, int | None]:
    """Return (a transformers tokenizer, the longest context that the config beside it has; None without one).

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    from kvscope.harness.engine.configs import max_length_tokens
    from kvscope.harness.engine.loading import explained, load_config, load_tokenizer
    from kvscope.harness.engine.names import resolve_model
    from kvscope.harness.engine.presets import is_preset

    if is_preset(spec):
        raise UsageError("tokenizer: a preset has none: give --tokenizer a folder, reference or a Hugging Face id.")
    folder = user_path(spec, what="--tokenizer")
    if folder.is_dir() and (folder / "tokenizer_config.json").is_file() and not (folder / "config.json").is_file():
        with explained(spec, "tokenizer"):
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False), None
    where, _ = resolve_model(spec)
    model_config = load_config(spec)
    return load_tokenizer(spec, where, model_config), max_length_tokens(model_config)


def _context(config: "RunConfig", server: Server, own_tokens: int | None) -> tuple[int, str]:
    """Return (longest prompt plus answer, who says so): the server's word is the most, and ours may be less."""
    asked = config.server_context_tokens
    if server.context_tokens is not None:
        if asked is not None and asked > server.context_tokens:
            raise UsageError(
                f"server_context_tokens is {asked:,}, and the server takes {server.context_tokens:,} tokens "
                f"({server.context_from}): give less, or leave it out."
            )
        if asked is None:
            return server.context_tokens, f"the server, {server.context_from}"
    if asked is not None:
        return asked, "server_context_tokens"
    if own_tokens is not None:
        return own_tokens, "the model's config beside the tokenizer"
    raise UsageError(
        f"The server at {server.url} does not say how long a prompt may be, and servers cut longer ones without a "
        "word: give --server-context."
    )


def _vocabulary_sha256(tokenizer: Any) -> str:
    text = json.dumps(sorted(tokenizer.get_vocab().items()))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
