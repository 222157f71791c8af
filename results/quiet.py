"""What disturbs times on a machine, in words: what rows are judged by, and what a run says before it begins."""

MOST_LOAD_PER_CORE = 1.25
"""Load average per core above which a host was busy with more than the measurement: a process that uses every core is a
load of 1 a core by itself."""


def load_doubt(load_1min: float | None, cpu_cores: int | None) -> str:
    """Return `host load 9.0 on 2 cores` where that is too much; empty where it is not, or not known."""
    if load_1min is None or not cpu_cores or load_1min <= MOST_LOAD_PER_CORE * cpu_cores:
        return ""
    return f"host load {load_1min:.1f} on {cpu_cores} cores"


def load_class_doubt(load_1min: float | None, cpu_cores: int | None) -> str:
    """Return `host load over 8 on 2 cores`, of steps that double: rows of about the same load share a note."""
    if not load_doubt(load_1min, cpu_cores):
        return ""
    assert load_1min is not None
    assert cpu_cores is not None
    passed = MOST_LOAD_PER_CORE * cpu_cores
    step = 2 * cpu_cores
    while step < load_1min:
        passed, step = step, 2 * step
    return f"host load over {passed:g} on {cpu_cores} cores"


def others_doubt(n_processes: int | None, *, where: str = "the GPU") -> str:
    """Return `2 other processes on the GPU`; empty where there is none, or it is not known."""
    if not n_processes:
        return ""
    return f"{n_processes} other process{'es' if n_processes > 1 else ''} on {where}"
