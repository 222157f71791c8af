"""Commands that train an indexer in a process where no backbone, and nothing of a prompt, can be imported."""

import subprocess
import sys
from pathlib import Path

from kvscope.harness.passes.process import worker_environment

_CODE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        for word in ("transformers", "tokenizers", "kvscope.harness.engine.models", "kvscope.harness.engine.prefill",
                     "kvscope.harness.engine.decode", "kvscope.harness.engine.glue", "kvscope.tasks"):
            if name == word or name.startswith(word + "."):
                raise ImportError("backbone: " + name)
sys.meta_path.insert(0, Refuse())
from kvscope.cli import run_cli
code = run_cli(sys.argv[1:])
bad = [name for name in sys.modules if name.split(".")[0] in ("transformers", "tokenizers")]
sys.exit(code or repr(bad) if bad else code)
"""


def train_without_backbone(kind: str, data: Path, out: Path, *options: str) -> None:
    """Train an indexer of a kind (``lsa``, ``dsa``) on a collection for an epoch, and find its weights."""
    command = [kind, "train", "--data", str(data), "--out", str(out), "--epochs", "1", *options]
    command += ["--device", "cpu", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", _CODE, *command], capture_output=True, text=True, env=worker_environment()
    )
    assert done.returncode == 0, done.stderr
    assert (out / "indexer.safetensors").is_file()
