"""What a checkpoint lacks, or has too much of: nothing that transformers made up runs under its name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kvscope.errors import UsageError
from kvscope.harness.engine.configs import text_config
from kvscope.harness.engine.glue import decoder_of, layers_of

_NAMED = 3


def check_weights(name: str, model: Any, loading: Mapping[str, Any]) -> None:
    """Refuse a model whose tensors are not all those of its checkpoint.

    Args:
        name: what the user asked for.
        model: as built.
        loading: transformers' account of it (``output_loading_info``), tied weights left out of it.

    Raises:
        UsageError: tensors that the checkpoint lacks or has in another shape, which transformers fills with random
            numbers; or tensors of the checkpoint that a module of the model has no place for.
    """
    missing = {str(key) for key in loading.get("missing_keys", ())}
    missing |= {str(key[0] if isinstance(key, tuple) else key) for key in loading.get("mismatched_keys", ())}
    if missing:
        raise UsageError(
            f"Model '{name}' cannot be run: its weights lack {_some(missing)}, or have another shape for them, and "
            "transformers would fill them with random numbers; mend the checkpoint or its config."
        )
    # Of a module with parameters: a bias beside a weight. Towers and heads of other tasks are no modules here.
    own = {path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    unexpected = [str(key) for key in loading.get("unexpected_keys", ())]
    ignored = {key for key in unexpected if key.rpartition(".")[0] in own} | set(surplus_layers(unexpected, model))
    if ignored:
        raise UsageError(
            f"Model '{name}' cannot be run: its config leaves no place for {_some(ignored)} of its weights, so it "
            "would compute another model; mend its config."
        )


def surplus_layers(names: Collection[str], model: Any) -> list[str]:
    """Return the names of a decoder's layers that the model does not have, though its checkpoint does.

    Layers that predict further tokens (multi-token prediction) follow the decoder's in some checkpoints, and are no
    part of what ``generate`` runs.
    """
    layers = layers_of(decoder_of(model))
    prefix = next((path for path, module in model.named_modules() if module is layers[0]), "").rpartition(".")[0]
    inner = {name for name, _ in layers[0].named_parameters()}
    n_further = getattr(text_config(model.config), "num_nextn_predict_layers", None) or 0
    found = []
    for name in names:
        number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        if name.startswith(f"{prefix}.") and number.isdecimal() and rest in inner:
            found += [name] if int(number) >= len(layers) + n_further else []
    return found


def _some(keys: Collection[str]) -> str:
    first = ", ".join(sorted(keys)[:_NAMED])
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return f"{len(keys)} tensor{'s' if len(keys) > 1 else ''} ({first}{more})"
