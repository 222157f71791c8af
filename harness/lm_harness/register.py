"""Makes ``kvscope`` a name of lm-eval's models, without importing what it needs."""

NAME = "kvscope"
_TARGET = "kvscope.harness.lm_harness.model:KvscopeLM"


def register_lm_eval() -> None:
    """Let ``lm_eval.simple_evaluate(model="kvscope", model_args=...)`` find the model. Twice is once."""
    import lm_eval.models  # noqa: F401 - it fills the registry, which then takes ours
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=_TARGET)
