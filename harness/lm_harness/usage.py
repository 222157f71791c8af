"""What the sequences under one method held and took, for lm-eval's results and for the line at the end."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from kvscope.methods.base import Footprint


@dataclass
class Usage:
    """What all sequences held and took.

    Attributes:
        sequences: how many ended.
        footprint: sum over the sequences of what each held, a mean over its steps where it was answered, else at its
            end.
        dense_kv_bytes: sum over them of what dense would hold.
        step_s: seconds of each step.
        batch: most sequences of a step.
    """

    sequences: int = 0
    footprint: Footprint = field(default_factory=Footprint)
    dense_kv_bytes: int = 0
    step_s: list[float] = field(default_factory=list)
    batch: int = 0

    def add(self, held: Footprint, *, dense_kv_bytes: int) -> None:
        """Enter a sequence that ended."""
        self.sequences += 1
        self.footprint += held
        self.dense_kv_bytes += dense_kv_bytes

    def summary(self, *, decodes_twice: bool = False) -> dict[str, Any]:
        """Return means over the sequences, and the median of the steps; empty before the first sequence.

        Args:
            decodes_twice: what the method knows costs more than what it keeps, so that bytes and times say nothing,
                and are left out.
        """
        if not self.sequences:
            return {}
        if decodes_twice:
            return {"sequences": self.sequences, "batch": self.batch}
        held = self.footprint.divided_by(self.sequences)
        return {
            "sequences": self.sequences,
            "resident_kv_bytes": held.kv_bytes,
            "metadata_bytes": held.metadata_bytes,
            "host_kv_bytes": held.host_bytes,
            "dense_kv_bytes": self.dense_kv_bytes // self.sequences,
            "share_of_dense": self.footprint.device_bytes / self.dense_kv_bytes if self.dense_kv_bytes else None,
            "tpot_s": statistics.median(self.step_s),
            "batch": self.batch,
        }

    def line(self, label: str, *, decodes_twice: bool = False) -> str:
        """Return the summary in a line, of the method ``label``; empty before the first sequence."""
        found = self.summary(decodes_twice=decodes_twice)
        if not found:
            return ""
        if decodes_twice:
            return f"{label}: {found['sequences']:,} sequences; it decodes twice, and bytes mean nothing"
        share = "" if found["share_of_dense"] is None else f", {found['share_of_dense']:.1%} of dense"
        held_bytes = found["resident_kv_bytes"] + found["metadata_bytes"]
        return (
            f"{label}: {held_bytes:,} B of KV on the device{share}, {found['tpot_s'] * 1e3:.2f} ms a "
            f"token; means of {found['sequences']:,} sequences, median of steps of up to {found['batch']}"
        )
