"""One model type, tried: kvscope's dense logits against the model's own eager forward, on tiny random weights.

The prompt is longer than the largest window and a prefill chunk together. The model's own forward runs without a cache,
and again with its own cache: where these two differ, the model is no measure for anybody.
"""

from __future__ import annotations

import copy
import inspect
import re
import tempfile
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from model_type_recipes import VOCABULARY, build_tiny, tiny_config

from kvscope.errors import KvscopeError, UsageError
from kvscope.harness.engine.backend import backend_of
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.loading import load_config
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.engine.self_check import self_check
from kvscope.harness.engine.session import Session
from kvscope.harness.passes.facts import describe_model
from kvscope.methods.base import union_collectors
from kvscope.methods.registry import create_method

PAGE_TOKENS = 16
CHUNK_TOKENS = 32
N_PREFILLED, N_STEPS = 105, 4
# Differences are shares of the largest logit. fp32 sums in another order differ by 1e-6 to 1e-5 of it.
TOLERANCE = 2e-5
# A token that nothing but full layers still sees must move the last logits by more than this, or equality says nothing.
LEAST_EFFECT = 1e-3
FULL_BUDGET = (
    "sliding_window:window=512",
    "recency:budget_fraction=1.0",
    "random:fraction=1.0",
    "quest:budget_tokens=512",
    "moba:budget_tokens=512",
    "msa:budget_tokens=512",
)


@dataclass
class Outcome:
    """What was found about one model type.

    Attributes:
        status: equal, refused, wrong, unproven (equal, but the logits hardly depend on the far context), failed (an
            error of kvscope's own, after loading), traceback, timeout, or not_built.
        stage: where it ended: config (ours), build, shape (kvscope's, from the config), code (from the model without
            weights), load, self-check, prefill, decode, compare.
        message: the refusal or the error, one line.
        error: largest difference of kvscope's logits to the model's own, as a share of the largest logit.
        own_cache_error: the same of the model's own forward with its own cache.
        own_chunked_error: the same in the chunks that kvscope prefills in.
        context_effect: the same of the model's own forward when an early token is another one.
        held_of_predicted_bytes: KV bytes dense holds after the steps over what the model's shape foretells.
        self_check: what the check at load found, as a share of the logits.
        methods: full-budget method -> its largest difference to dense, or why it did not run.
        notes: what is odd about the model itself.
    """

    model_type: str
    class_name: str = ""
    status: str = "not_built"
    stage: str = "config"
    message: str = ""
    error: float | None = None
    own_cache_error: float | None = None
    own_chunked_error: float | None = None
    context_effect: float | None = None
    held_of_predicted_bytes: float | None = None
    self_check: float | None = None
    methods: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    shape: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON takes it."""
        return asdict(self)


def try_type(model_type: str, *, methods: bool = True) -> Outcome:
    """Build a model type, load it with kvscope as a user would, and compare."""
    found = Outcome(model_type)
    try:
        _try(found, methods)
    except UsageError as error:
        found.status, found.message = "refused" if found.stage in ("shape", "code", "load") else "failed", _line(error)
    except KvscopeError as error:
        found.status, found.message = "failed", _line(error)
    except Exception as error:  # noqa: BLE001 - the sweep is about which errors there are
        where = traceback.extract_tb(error.__traceback__)[-1]
        file = "/".join(Path(where.filename).parts[-3:])
        found.status = "not_built" if found.stage in ("config", "build") else "traceback"
        found.message = f"{type(error).__name__}: {_line(error)} ({file}:{where.lineno})"
    return found


@torch.inference_mode()
def _try(found: Outcome, methods: bool) -> None:
    config = tiny_config(found.model_type)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / found.model_type  # messages name the folder
        found.stage = "build"
        built = _build(found, config, folder)
        found.stage = "shape"
        from_config = load_config(str(folder))
        backend_of(from_config).shape(from_config, element_bytes=4, page_tokens=PAGE_TOKENS)
        if built is None:
            raise RuntimeError(f"not refused from its config, and its weights cannot be built: {found.notes}")
        found.stage = "code"
        describe_model(str(folder), device="cpu", page_tokens=PAGE_TOKENS)
        found.stage = "load"
        loaded = load_model(str(folder), device="cpu", dtype="float32", page_tokens=PAGE_TOKENS)
    found.shape = _shape_text(loaded)
    found.stage = "self-check"
    found.self_check = self_check(loaded).difference
    ids = torch.randint(3, 250, (N_PREFILLED + N_STEPS,), generator=torch.Generator().manual_seed(1)).tolist()
    own = _own_logits(built, ids)
    scale = float(own.abs().max())
    other = list(ids)
    other[6] = 251
    found.context_effect = float((_own_logits(built, other) - own)[-N_STEPS:].abs().max()) / scale
    found.stage = "own cache"
    found.own_cache_error = _difference(_own_cached_logits(built, ids, N_PREFILLED), own, scale)
    chunked = _own_cached_logits(built, ids, CHUNK_TOKENS)
    found.own_chunked_error = _difference(chunked, own, scale)
    found.stage = "prefill"
    runnable = [loaded.backend.form_of(create_method(spec), loaded.shape) for spec in FULL_BUDGET if methods]
    runnable = [method for method in runnable if not method.unsupported(loaded.shape, loaded.device)]
    collectors = union_collectors(runnable, loaded.shape.layers)
    prompt = prefill(loaded, ids[:N_PREFILLED], collectors=collectors, chunk_tokens=CHUNK_TOKENS)
    found.stage = "decode"
    dense = _logits(loaded, "dense", prompt, ids, found)
    found.error = _difference(dense, own[N_PREFILLED:], scale)
    found.stage = "compare"
    found.status = "equal" if found.error <= TOLERANCE else "wrong"
    if (
        found.status == "wrong"
        and found.own_chunked_error > TOLERANCE
        and _difference(dense, chunked, scale) <= TOLERANCE
    ):
        found.status = "equal"
        found.notes.append(
            "its own forward in chunks differs from its own forward in one piece; kvscope equals the former"
        )
    if found.status == "equal" and found.context_effect < LEAST_EFFECT:
        found.status = "unproven"
    for spec in FULL_BUDGET if methods else ():
        try:
            found.methods[spec] = _difference(_logits(loaded, spec, prompt, ids), dense, scale)
        except KvscopeError as error:
            found.methods[spec] = _line(error)


def _build(found: Outcome, config: Any, folder: Path) -> Any:
    """Save a model of the type; return it as transformers loads it again, or None where it cannot be built."""
    from transformers import AutoModelForCausalLM

    config.save_pretrained(folder)
    try:
        model = build_tiny(config)
    except Exception as error:  # noqa: BLE001 - what kvscope says about the config is asked all the same
        found.notes.append(f"transformers cannot build it: {type(error).__name__}: {_line(error)}")
        return None
    found.class_name = type(model).__name__
    model.save_pretrained(folder)
    if type(model.config) is not type(config):
        config.save_pretrained(folder)
        found.notes.append(f"built as {found.class_name} of the config inside")
    _save_tokenizer(folder)
    try:
        stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    except Exception as error:  # noqa: BLE001 - as above
        found.notes.append(f"AutoModelForCausalLM cannot load what was saved: {type(error).__name__}: {_line(error)}")
        return model
    saved, loaded = model.state_dict(), stock.state_dict()
    changed = [key for key in saved if key not in loaded or not torch.equal(saved[key], loaded[key])]
    if changed:
        found.notes.append(f"saved and loaded weights differ: {changed[:3]}")
    return stock


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<eos>"])
    tokenizer.train_from_iterator([], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def _own_logits(model: Any, ids: list[int]) -> torch.Tensor:
    out = model(input_ids=torch.tensor([ids]), use_cache=False).logits
    logits: torch.Tensor = out.reshape(-1, len(ids), out.shape[-1])[0]
    return logits


def cache_argument(model: Any) -> str:
    """Return what the model's forward calls its cache."""
    parameters = inspect.signature(type(model).forward).parameters
    return next(name for name in ("cache", "past_key_values", "cache_params", "state") if name in parameters)


def _own_cached_logits(model: Any, ids: list[int], chunk_tokens: int) -> torch.Tensor:
    name = cache_argument(model)
    chunks = [ids[start : min(start + chunk_tokens, N_PREFILLED)] for start in range(0, N_PREFILLED, chunk_tokens)]
    cache, found = None, []
    for part in (*chunks, *([token] for token in ids[N_PREFILLED:])):
        out = model(input_ids=torch.tensor([part]), use_cache=True, **{name: cache})
        cache = out[name]
        found.append(out.logits[0, -1])
    return torch.stack(found[-N_STEPS:])


def _logits(loaded: LoadedModel, spec: str, prompt: Any, ids: list[int], found: Outcome | None = None) -> torch.Tensor:
    with Session(loaded) as session:
        member = session.add(create_method(spec), copy.copy(prompt), reserve_tokens=N_STEPS)
        logits = torch.stack([session.step([token])[0].clone() for token in ids[N_PREFILLED:]])
        if found is not None:
            held_bytes = member.cache.footprint().kv_bytes
            found.held_of_predicted_bytes = held_bytes / loaded.shape.dense_kv_bytes(N_PREFILLED, N_STEPS)
        return logits


def _difference(found: torch.Tensor, expected: torch.Tensor, scale: float) -> float:
    expected = expected[-len(found) :]
    return float((found - expected).abs().max()) / scale if found.shape == expected.shape else float("inf")


def _shape_text(loaded: LoadedModel) -> str:
    shape = loaded.shape
    return (
        f"{shape.n_layers} layers, managed {list(shape.layers)}, windows {list(shape.sliding_layers)}; "
        f"{shape.n_q_heads}/{shape.n_kv_heads} heads of {shape.head_dim}; "
        f"unknown rotation {list(shape.unknown_rotation_layers)}"
    )


def _line(error: BaseException) -> str:
    # Without the temporary folder, so that two runs give the same text.
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+/", "", " ".join(str(error).split()))[:400]
