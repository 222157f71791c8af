"""What is known of a model before its weights load: shape, tokenizer, longest context, bytes of weights.

``plan`` needs no more, and ``run`` refuses a bad length in a second instead of after minutes of loading.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvscope.methods.base import ModelShape


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model described by its configuration files alone.

    Attributes:
        spec: the model as asked for.
        device: where it will compute, ``auto`` resolved: ``cpu`` or ``cuda:N``.
        dtype: element type of weights and KV cache, ``auto`` resolved, e.g. ``float32``.
        weights_bytes: bytes of the weights in ``dtype``; None when the configuration does not tell.
        max_length_tokens: longest context the model takes.
    """

    spec: str
    device: str
    dtype: str
    shape: "ModelShape"
    tokenizer: Any
    max_length_tokens: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    weights_bytes: int | None
    revision: str | None
    attention_backend: str

    def prefill_peak_bytes(self, n_tokens: int, *, chunk_tokens: int) -> int:
        """Estimate device bytes of a layer-major prefill besides weights.

        Hidden states of all tokens, the KV of one layer, and one chunk's activations (MLP gate, up and product;
        queries, keys, values and output).
        """
        element_bytes = self.shape.element_bytes
        hidden_bytes = n_tokens * self.hidden_size * element_bytes
        layer_kv_bytes = self.shape.dense_kv_bytes(n_tokens) // max(1, len(self.shape.layers))
        chunk = min(chunk_tokens, n_tokens)
        activation_bytes = chunk * (3 * self.intermediate_size + 6 * self.hidden_size) * element_bytes
        return hidden_bytes + layer_kv_bytes + activation_bytes


def safetensors_elements(folder: Path) -> int | None:
    """Return the number of weight elements in a folder's safetensors files, read from their headers alone."""
    elements = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        for name, tensor in header.items():
            if name != "__metadata__":
                count = 1
                for size in tensor["shape"]:
                    count *= size
                elements += count
    return elements or None
