"""The keys of a configuration that say who answers prompts, and where, and those that make no sense together."""

import re

from kvscope.errors import UsageError, shown


def checked_device(value: str) -> str:
    """Return a device.

    Raises:
        UsageError: it is none.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", value):
        raise UsageError(f"device: {shown(value)} is not a device: write auto, cpu, cuda or cuda:N.")
    return value


def checked_gpus(value: str) -> str:
    """Return which GPUs answer: ``all``, or their numbers.

    Raises:
        UsageError: it is neither.
    """
    if value == "all":
        return value
    numbers = value.split(",")
    if not all(re.fullmatch(r"[0-9]{1,3}", number) for number in numbers) or len(set(numbers)) < len(numbers):
        raise UsageError(f"gpus: {shown(value)} names no GPUs: write all, or different numbers as 0,1.")
    return value


def checked_ray_address(value: str) -> str:
    """Return where a cluster is.

    Raises:
        UsageError: it is no address of one.
    """
    if not re.fullmatch(r"auto|local|[\w.-]{1,255}:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}", value):
        raise UsageError(f"ray_address: {shown(value)} is no cluster: write HOST:PORT, local or auto.")
    return value


def check_executor(executor: str, *, device: str, gpus: str | None, ray_address: str | None) -> None:
    """Refuse what a cluster settles itself, and a cluster's address without one.

    Args:
        executor, device, gpus, ray_address: of the configuration.

    Raises:
        UsageError: naming the first.
    """
    if executor != "ray":
        if ray_address is not None:
            raise UsageError("ray_address: it is about a cluster: give --executor ray, too, or leave it out.")
        return
    if gpus is not None:
        raise UsageError("gpus: they are those of this machine, and Ray gives out those of its nodes: leave it out.")
    if ":" in device:
        raise UsageError("device: Ray gives out the GPUs of its nodes: write cuda without a number.")
