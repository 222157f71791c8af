"""What disturbs times on a machine, in words: what rows are judged by, and what a run says before it begins."""

MOST_LOAD_PER_CORE = 1.25
"""Load average per core above which a host was busy with more than the measurement: a process that uses every core is a
load of 1 a core by itself."""


def load_doubt(load_1min: float | None, cpu_cores: int | None) -> str:
    """Return `host load 9.0 on 2 cores` where that is too much; empty where it is not, or not known."""
    if load_1min is None or not cpu_cores or load_1min <= MOST_LOAD_PER_CORE * cpu_cores:
        return ""
    return f"host load {load_1min:.1f} on {cpu_cores} cores"


def others_doubt(n_processes: int | None, *, where: str = "the GPU") -> str:
    """Return `2 other processes on the GPU`; empty where there is none, or it is not known."""
    if not n_processes:
        return ""
    return f"{n_processes} other process{'es' if n_processes > 1 else ''} on {where}"
