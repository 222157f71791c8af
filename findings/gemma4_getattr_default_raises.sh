#!/usr/bin/env bash
# On a Gemma 4 configuration getattr with a default raises, and so does hasattr.
#
# Versions: transformers 5.23.0, torch 2.13.0, Python 3.11.
# head_dim and the number of KV heads may differ by layer there, so reading them from the whole configuration is refused.
# Seen: getattr(config, 'head_dim', None) raises AmbiguousGlobalPerLayerAttributeError, which is a RuntimeError and no
# AttributeError, so neither the default of getattr nor hasattr catches it.
# Who is hit: every tool that probes configurations with getattr(config, name, default): byte counts, planners, exporters.
# The values stand in config.per_layer_config[layer].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.23.0" "numpy<3"
"$folder/venv/bin/python" - 2> "$folder/stderr" <<'PYTHON' || { tail -5 "$folder/stderr"; exit 1; }
from transformers import Gemma4TextConfig, LlamaConfig

config = Gemma4TextConfig()
raised = {}
for how, probe in (("getattr with a default", lambda: getattr(config, "head_dim", None)), ("hasattr", lambda: hasattr(config, "head_dim"))):
    try:
        probe()
    except Exception as error:
        raised[how] = type(error)
        print(f"{how}: {type(error).__name__}, an AttributeError: {isinstance(error, AttributeError)}")
assert getattr(LlamaConfig(), "no_such_attribute", None) is None
widths = {layer.head_dim for layer in config.per_layer_config}
print(f"widths by layer: {sorted(widths)}")
assert len(raised) == 2 and not any(issubclass(kind, AttributeError) for kind in raised.values()), "it has changed"
assert len(widths) == 2, "it has changed"
PYTHON
