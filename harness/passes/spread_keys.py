"""Which keys of a configuration are of one device, and so mean nothing of a model on several (``device_map``)."""

from collections.abc import Set as AbstractSet

from kvscope.errors import UsageError

_OF_ONE_DEVICE = {
    "device": "it says where all of a model is",
    "gpus": "each of them would hold a whole model",
    "jobs": "each process would hold a whole model",
    "gpu_budget_bytes": "it is of one GPU's memory",
    "find_max": "it searches in one GPU's memory",
    "throughput": "its steps are captured, on one GPU",
}
"""Key -> why."""


def check_spread(device_map: str, decode_graph: str, *, changed: AbstractSet[str]) -> None:
    """Refuse what is of one device where a model may be on several.

    Args:
        device_map, decode_graph: of the configuration.
        changed: keys whose values are not the defaults.

    Raises:
        UsageError: naming the first.
    """
    if device_map == "none":
        return
    for key, why in _OF_ONE_DEVICE.items():
        if key in changed:
            raise UsageError(f"{key}: {why}, and device_map puts one on several: leave out one of the two.")
    if decode_graph == "on":
        raise UsageError("decode_graph: on: a captured step is of one device, and device_map names several: take auto.")
