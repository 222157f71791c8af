"""Another machine that ``kvscope plan --target`` plans for: its memory, and the bandwidths that were measured on it.

Numbers that were measured name the committed file that holds them; tests hold the two together. A number of a data
sheet says so, and what nobody knows is None.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kvscope.errors import UsageError, shown
from kvscope.harness.passes.config import RunConfig
from kvscope.units import BYTES, whole_number

#: Most seconds a layer that a captured step of one sequence took beyond its floor: ``sliding_window``, which turns its
#: keys anew in every step. Others took 0.07 to 0.15 ms.
LAYER_S = 0.19e-3
#: No card has less memory: `24` is 24 bytes, and GiB are meant.
LEAST_BYTES = 64 << 20
LAYER_SOURCE = "results/reference/h100/footprint-llama-3.1-8b-synthetic"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A card, and the host it is in.

    Attributes:
        name: as asked for.
        memory_bytes: what a process finds on an empty card.
        memory_source: who says so.
        copy_bytes_per_s: of a copy in the card's memory, read and written; None where nobody measured it.
        copy_source: who did.
        is_measured: whether that is a measurement, not a data sheet's figure, which no program reaches.
        bus_bytes_per_s, bus_source: the same of copies from pinned host memory.
        host_bytes: of the host; None: not told, so nothing is held against it.
    """

    name: str
    memory_bytes: int
    memory_source: str
    copy_bytes_per_s: float | None = None
    copy_source: str = ""
    is_measured: bool = False
    bus_bytes_per_s: float | None = None
    bus_source: str = ""
    host_bytes: int | None = None

    def lines(self) -> list[str]:
        """Return what is known of it, and from where."""
        said = [f"target   {self.name}: {self.memory_bytes / 2**30:.1f} GiB of device memory ({self.memory_source})"]
        if self.copy_bytes_per_s is None:
            said.append("         no bandwidth is known of it, so times are not predicted")
        else:
            said.append(f"         {self.copy_bytes_per_s / 1e9:,.0f} GB/s in its memory ({self.copy_source})")
        if self.bus_bytes_per_s is not None:
            said.append(f"         {self.bus_bytes_per_s / 1e9:.1f} GB/s from host memory ({self.bus_source})")
        host = (
            f"{self.host_bytes / 2**30:.1f} GiB" if self.host_bytes else "not told, so not held against: --host-memory"
        )
        return [*said, f"         host memory {host}"]


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        each.name: each
        for each in (
            Target(
                name="h100",
                memory_bytes=85_017_493_504,
                memory_source="H100 80GB, benchmarks/results/kernels.json",
                copy_bytes_per_s=3_011.8e9,
                copy_source="measured, benchmarks/results/kernels.json",
                is_measured=True,
                bus_bytes_per_s=55.0e9,
                bus_source="measured, benchmarks/results/kernels.json",
            ),
            Target(
                name="h200",
                memory_bytes=150_109_880_320,
                memory_source="H200, benchmarks/results/decode_step_h200.json",
                copy_bytes_per_s=4_078.7e9,
                copy_source="measured, benchmarks/results/shared_steps_h200.json",
                is_measured=True,
                bus_bytes_per_s=55.0e9,
                bus_source="measured, benchmarks/results/shared_steps_h200.json",
            ),
            Target(
                name="a100-40",
                memory_bytes=40_000_000_000,
                memory_source="A100 40GB, data sheet",
                copy_bytes_per_s=1_555e9,
                copy_source="data sheet, which no program reaches; nothing was measured on this card",
            ),
        )
    }
)


def parse_target(text: str, *, host_memory: str | None = None) -> Target:
    """Return the machine that a command names.

    Args:
        text: a name of ``TARGETS``, or the size of a card's memory (``24GiB``).
        host_memory: size of the host's memory.

    Raises:
        UsageError: it is neither, or a size is none.
    """
    from dataclasses import replace

    known = TARGETS.get(text.lower())
    size_bytes = whole_number(text, BYTES) if known is None else None
    if known is None and (size_bytes is None or size_bytes < LEAST_BYTES):
        raise UsageError(f"--target: {shown(text)} is no machine: write {', '.join(TARGETS)} or a size as 24GiB.")
    target = known or Target(name=text, memory_bytes=size_bytes or 0, memory_source="as asked for")
    if host_memory is None:
        return target
    host_bytes = whole_number(host_memory, BYTES)
    if host_bytes is None or host_bytes <= 0:
        raise UsageError(f"--host-memory: {shown(host_memory)} is no size: {BYTES.hint}.")
    return replace(target, host_bytes=host_bytes)


def check_target(config: RunConfig) -> None:
    """Refuse what says where to compute here: the plan is for elsewhere.

    Raises:
        UsageError: naming the option.
    """
    if config.served:
        raise UsageError("--target plans for a model that kvscope runs itself; nobody knows a server's bytes.")
    if config.device != "auto":
        raise UsageError("--target says for which machine the plan is: leave out --device.")
    if config.device_map != "none":
        raise UsageError("--target plans for one card: leave out --device-map.")
    if config.gpus is not None:
        raise UsageError("--target plans for one card: leave out --gpus.")
