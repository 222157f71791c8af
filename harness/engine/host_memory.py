"""What the host's memory has left."""

from pathlib import Path

#: Where a container's memory limit is told: folder, limit, use, and the reclaimable part of the use; versions 2 and 1.
_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def total_host_bytes() -> int:
    """Return the host memory this process may have in all: the machine's, or its container's limit."""
    import psutil

    rooms = [int(psutil.virtual_memory().total)]
    for folder, limit, *_ in _CGROUPS:
        try:
            rooms.append(int((folder / limit).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue  # another version of cgroups, or no limit ("max")
    return min(rooms)


def free_host_bytes() -> int:
    """Return the host memory this process may still take: what is free, or what its container's limit leaves."""
    import psutil

    rooms = [int(psutil.virtual_memory().available)]
    for folder, limit, used, cache in _CGROUPS:
        try:
            limit_bytes = int((folder / limit).read_text(encoding="ascii"))
            used_bytes = int((folder / used).read_text(encoding="ascii"))
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):
            continue  # another version of cgroups, or no limit ("max")
        # Clean file pages count as used and are dropped on demand.
        cache_bytes = sum(int(line.split()[1]) for line in lines if line.startswith(f"{cache} "))
        rooms.append(max(0, limit_bytes - used_bytes + cache_bytes))
    return min(rooms)
