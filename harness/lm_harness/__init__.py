"""kvscope as a model of lm-eval: stock tasks under a cache method."""

from kvscope.harness.lm_harness.register import register_lm_eval

__all__ = ["register_lm_eval"]
