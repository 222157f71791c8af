"""CUDA's Multi-Process Service for processes that share a GPU.

Without it a card runs one process at a time, in slices, and a small model's steps (a few hundred short kernels each)
wait for fourteen others. With it kernels of all processes run side by side. Answers are the same; times are not those
of a process alone, which shared processes do not claim.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kvscope.errors import UsageError

CONTROL = "nvidia-cuda-mps-control"
#: Where drivers mounted into a container have their programs, which the PATH need not name.
_DRIVER_PROGRAMS = ("/usr/local/nvidia/bin", "/usr/bin")
_START_S = 20.0
_PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
#: Where a service that the machine's owner started listens, unless they say another place: looked for, never written.
_OWNERS_PIPE = Path("/tmp/nvidia-mps/control")  # nosec B108


def control_program() -> str:
    """Return the path of the service's control program.

    Raises:
        UsageError: it is not installed.
    """
    found = shutil.which(CONTROL) or shutil.which(CONTROL, path=os.pathsep.join(_DRIVER_PROGRAMS))
    if found is None:
        raise UsageError(
            f"{CONTROL} is neither on the PATH nor in {' or '.join(_DRIVER_PROGRAMS)}: install the driver's "
            "compute utilities."
        )
    return found


@contextmanager
def multi_process_service() -> Iterator[dict[str, str]]:
    """Run the service; yield what its clients need in their environment. Other processes on the card stay outside it.

    Raises:
        UsageError: it is not installed or does not start.
    """
    program = control_program()
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        names = {_PIPE_VARIABLE: "pipe", "CUDA_MPS_LOG_DIRECTORY": "log"}
        clients = {variable: str(Path(folder, name)) for variable, name in names.items()}
        for path in clients.values():
            Path(path).mkdir()
        environment = {**os.environ, **clients, "PATH": f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}"}
        try:
            subprocess.run([program, "-d"], env=environment, check=True, capture_output=True, timeout=_START_S)
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
            raise UsageError(f"{program} -d failed ({error}) {said}".rstrip() + ".") from error
        try:
            yield clients
        finally:
            # Whatever it answers: the work is done, and the daemon ends with its last client.
            subprocess.run([program], input=b"quit\n", env=environment, capture_output=True, check=False)


@contextmanager
def side_by_side(devices: Sequence[str], *, note: Callable[[str], None]) -> Iterator[dict[str, str]]:
    """Let processes that share a GPU run side by side where the driver can; yield what their environment needs.

    A service of the machine's owner is used as it is. Without one, and without the program, they take turns.

    Args:
        devices: of each process, as ``cuda:0``.
        note: takes a line that says which of these it is.
    """
    shared = [device for device in dict.fromkeys(devices) if device != "cpu" and devices.count(device) > 1]
    if not shared:
        yield {}
        return
    where = " and ".join(shared)
    with ExitStack() as stack:
        clients: dict[str, str] = {}
        if os.environ.get(_PIPE_VARIABLE) or _OWNERS_PIPE.exists():
            note(f"Processes share {where} through the Multi-Process Service that runs already.")
        else:
            try:
                clients = stack.enter_context(multi_process_service())
                note(f"Processes share {where} through CUDA's Multi-Process Service, started for them.")
            except UsageError as error:
                note(f"Processes on {where} take turns, which is slower: {error}")
        yield clients
