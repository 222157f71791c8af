"""Training documents for vt, cwe and fwe."""

from kvscope.harness.reference_model.templates_ruler import random_text, static_text

__all__ = ["random_text", "static_text"]
