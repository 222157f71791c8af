"""Is what the engine computes what the model computes? Measured on the loaded model, not told from its architecture.

A random prompt, longer than a window and a prefill chunk together, goes through the engine under ``dense``: a prefill
in chunks and two decode steps. The model's own eager forward without a cache reads the same tokens in one piece. Their
logits must agree. Windows are shortened for the check, so that the prompt is short on any model.

A difference is a share: the norm of the difference over the norm of the logits about their mean. It may be as large as
what the type of its numbers brings with it; where that does not explain it, the difference of the model's own forward
to itself in a batch of two is measured, too.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig

from kvscope.errors import KvscopeError, UsageError
from kvscope.harness.engine.configs import text_config
from kvscope.harness.engine.glue import cache_argument, decoder_of
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.oom import is_oom
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.engine.session import Session
from kvscope.methods.dense.method import Dense
from kvscope.methods.store import PromptKV

_CHUNK_TOKENS = 64
_WINDOW_TOKENS = 32
_N_STEPS = 2
_MOST_TOKEN_IDS = 50_000
#: Attention in another order of sums, with logits in fp32 in the engine and in the model's type in the eager forward.
LEAST_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
MOST_TOLERANCE = 0.3
_MOST_OWN_DIFFERENCE = 0.1
NOISE_FACTOR = 4.0


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """What a self-check found, each a share of the logits.

    Attributes:
        difference: of the engine's logits to the model's own, the largest over the decode steps.
        tolerance: what it may be.
        n_tokens: of the prompt and the steps.
        own_chunks: whether the model's own forward in the same chunks was the measure: some models give other logits
            in one piece, by ties in what they select.
        where: which layer differs first, as a clause; empty where that is not known.
    """

    difference: float
    tolerance: float
    n_tokens: int
    own_chunks: bool = False
    where: str = ""

    @property
    def passed(self) -> bool:
        """Whether the engine computes what the model computes."""
        return self.difference <= self.tolerance


@torch.inference_mode()
def self_check(loaded: LoadedModel) -> SelfCheck:
    """Check a loaded model; it is as before afterwards.

    Raises:
        UsageError: the engine's logits are not the model's, its cache does not fill, or its forward fails; the message
            gives the size.
        Exception: memory ended, as it was raised.
    """
    try:
        with _short_windows(loaded) as small:
            found = _checked(small)
        if not found.passed and small.shape.sliding_window < loaded.shape.sliding_window:
            # A model that reads its window elsewhere, too, differs for that reason alone.
            found = _checked(loaded)
    except UsageError:
        raise
    except Exception as error:
        if is_oom(error):
            raise  # no property of the model
        what = str(error) if isinstance(error, KvscopeError) else f"its check ended in {type(error).__name__}: {error}"
        what = " ".join(what.split())[:300].rstrip(".")
        raise UsageError(
            f"Model '{loaded.name}' cannot be measured: {what}; --no-self-check runs it all the same."
        ) from error
    if not found.passed:
        raise UsageError(
            f"Model '{loaded.name}' cannot be measured: over {found.n_tokens} random tokens its logits through "
            f"kvscope's cache differ from its own forward by {found.difference:.2g} of their size, and rounding "
            f"explains {found.tolerance:.2g}{found.where}; --no-self-check runs it all the same."
        )
    return found


@contextmanager
def _short_windows(loaded: LoadedModel) -> Iterator[LoadedModel]:
    """Give the model windows and pages of a few tokens, and its own windows back."""
    shape = replace(loaded.shape, page_tokens=min(loaded.shape.page_tokens, _CHUNK_TOKENS))
    own = shape.sliding_window
    if own <= _CHUNK_TOKENS:
        yield replace(loaded, shape=shape)
        return
    modules = list(loaded.model.modules())
    configs = [loaded.model.config, text_config(loaded.model.config)]
    configs += [each.config for each in modules if isinstance(getattr(each, "config", None), PretrainedConfig)]
    holders = {id(each): each for each in (*modules, *configs) if vars(each).get("sliding_window") == own}
    try:
        for each in holders.values():
            each.sliding_window = _WINDOW_TOKENS
        yield replace(loaded, shape=replace(shape, sliding_window=_WINDOW_TOKENS))
    finally:
        for each in holders.values():
            each.sliding_window = own


@contextmanager
def _own_attention(model: Any) -> Iterator[None]:
    """Let the model attend by itself, eagerly, and put the backend's attention back."""
    # The decoder's: the config around that of several models keeps a name of its own.
    before = decoder_of(model).config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _checked(loaded: LoadedModel) -> SelfCheck:
    page_tokens = loaded.shape.page_tokens
    chunk_tokens = -(-_CHUNK_TOKENS // page_tokens) * page_tokens
    reach_tokens = max(chunk_tokens, loaded.backend.reach_tokens(loaded.shape))
    n_tokens = min(chunk_tokens + reach_tokens + chunk_tokens // 4 + _N_STEPS, loaded.max_length_tokens)
    ids = random_ids(loaded, n_tokens)
    prompt = prefill(loaded, ids[:-_N_STEPS], chunk_tokens=chunk_tokens)
    found = _engine_logits(loaded, prompt, ids)
    with _own_attention(loaded.model):
        own = _own_logits(loaded, ids)
        tolerance = LEAST_TOLERANCE[loaded.dtype]
        checked = SelfCheck(difference=difference(found, own), tolerance=tolerance, n_tokens=n_tokens)
        if checked.passed:
            return checked  # the least is enough: what a batch does to the model need not be known
        noise = _noise_of_a_batch(loaded, ids, own)
        tolerance = min(max(tolerance, NOISE_FACTOR * noise), MOST_TOLERANCE)
        checked = replace(checked, tolerance=tolerance)
        if checked.passed:
            return checked
        chunked = _own_chunked_logits(loaded, ids, chunk_tokens)
        in_chunks = replace(checked, difference=difference(found, chunked), own_chunks=True)
        # A model far from itself in chunks has something that its own cache does not keep, either.
        if in_chunks.passed and difference(chunked, own) <= _MOST_OWN_DIFFERENCE:
            return in_chunks
        return replace(checked, where=_where(loaded, prompt, ids, tolerance))


def random_ids(loaded: LoadedModel, n_tokens: int) -> list[int]:
    """Return random tokens, none of them one that the config names: these stand for images, padding or ends."""
    configs = (loaded.model.config, text_config(loaded.model.config))
    named = {
        value
        for config in configs
        for key, value in vars(config).items()
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    n_vocabulary = int(text_config(loaded.model.config).vocab_size)
    usable = [token for token in range(min(n_vocabulary, _MOST_TOKEN_IDS)) if token not in named]
    drawn = torch.randint(len(usable), (n_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    return [usable[index] for index in drawn]


def _engine_logits(loaded: LoadedModel, prompt: PromptKV, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits of the decode steps, [steps, V]."""
    with Session(loaded) as session:
        member = session.add(Dense(), prompt, reserve_tokens=_N_STEPS)
        logits = torch.stack([session.step([token])[0].float() for token in ids[-_N_STEPS:]])
        held_bytes, dense_bytes = (
            member.cache.footprint().kv_bytes,
            loaded.shape.dense_kv_bytes(prompt.n_tokens, _N_STEPS),
        )
        if member.n_tokens != len(ids) or held_bytes == 0:
            raise UsageError(
                f"Model '{loaded.name}' cannot be measured: of {len(ids)} tokens fed its cache holds "
                f"{member.n_tokens}, and {held_bytes} bytes where {dense_bytes} are expected."
            )
        return logits


def _own_logits(loaded: LoadedModel, ids: Sequence[int]) -> torch.Tensor:
    """Return the same of the model's own forward without a cache."""
    tokens_1N = torch.tensor([list(ids)], device=loaded.device)
    own: torch.Tensor = loaded.model(input_ids=tokens_1N, use_cache=False).logits[0, -_N_STEPS:].float()
    if not bool(own.isfinite().all()):
        raise UsageError(
            f"Model '{loaded.name}' cannot be measured: the logits of its own forward over {len(ids)} random tokens in "
            f"{str(loaded.dtype).removeprefix('torch.')} are not finite: its weights are damaged, or need --dtype "
            "bfloat16 or float32."
        )
    if not bool((own != own[:, :1]).any()):
        raise UsageError(
            f"Model '{loaded.name}' cannot be measured: the logits of its own forward are the same for every token, so "
            "nothing of its cache shows in them: its weights are zeros, or damaged."
        )
    return own


def _noise_of_a_batch(loaded: LoadedModel, ids: Sequence[int], own: torch.Tensor) -> float:
    """Return how much these logits of the model's own forward differ in a batch of two, as a share."""
    tokens_1N = torch.tensor([list(ids)], device=loaded.device)
    both = loaded.model(input_ids=torch.cat([tokens_1N, tokens_1N.flip(1)]), use_cache=False).logits
    return difference(both[0, -_N_STEPS:].float(), own)


@torch.inference_mode()
def own_noise(loaded: LoadedModel, ids: Sequence[int]) -> float:
    """Return how much the model's own forward over these tokens differs from itself in a batch of two; a share.

    Raises:
        UsageError: its logits are not finite.
    """
    with _own_attention(loaded.model):
        return _noise_of_a_batch(loaded, ids, _own_logits(loaded, ids))


def _own_chunked_logits(loaded: LoadedModel, ids: Sequence[int], chunk_tokens: int) -> torch.Tensor:
    """Return the same of the model's own forward and cache, in the chunks of the engine."""
    n_prompt = len(ids) - _N_STEPS
    ends = [*range(chunk_tokens, n_prompt, chunk_tokens), *range(n_prompt, len(ids) + 1)]
    cache = DynamicCache(config=loaded.model.config)
    logits = []
    for start, end in pairwise([0, *ends]):
        part = torch.tensor([list(ids[start:end])], device=loaded.device)
        out = loaded.model(input_ids=part, use_cache=True, **{cache_argument(loaded.model): cache})
        logits.append(out.logits[0, -1].float())
    return torch.stack(logits[-_N_STEPS:])


def _where(loaded: LoadedModel, prompt: PromptKV, ids: Sequence[int], tolerance: float) -> str:
    """Return which layer's output differs first, as a clause; empty where the hidden states do not tell."""
    tokens_1N = torch.tensor([list(ids[: prompt.n_tokens])], device=loaded.device)
    out = loaded.model(input_ids=tokens_1N, use_cache=False, output_hidden_states=True)
    entering = getattr(out, "hidden_states", None) or ()
    for layer, own_BNM in enumerate(entering[: loaded.shape.n_layers]):
        last_BM = prompt.last_hidden.get(layer)
        if last_BM is None or last_BM.shape != own_BNM[:, -1].shape:
            return ""
        if difference(last_BM.to(own_BNM.device).float(), own_BNM[:, -1].float()) > tolerance:
            return f" (from layer {layer - 1} on)" if layer else ""
    return ""


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of a row as a share of its norm about the mean; inf where one is not finite."""
    about_mean = expected - expected.mean(-1, keepdim=True)
    share = float(((found - expected).norm(dim=-1) / about_mean.norm(dim=-1)).max())
    return share if math.isfinite(share) else math.inf
