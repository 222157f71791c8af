"""The decode that some methods need before the one that is measured (``CacheMethod.rehearsal``)."""

from __future__ import annotations

from dataclasses import replace

from kvscope.harness.engine.batch_decode import BatchDecode
from kvscope.harness.engine.decoding import Request
from kvscope.harness.engine.loaded import LoadedModel


def rehearsed(loaded: LoadedModel, request: Request) -> Request:
    """Return what is to be measured: the request as it is, or, after a first decode, with what its method learnt.

    The first decode has eager steps of its own, whoever shares those of the second.

    Raises:
        UsageError, NotFinite: as ``decode``.
    """
    rehearsal = request.method.rehearsal()
    if rehearsal is None:
        return request
    with BatchDecode(loaded) as single:
        row = single.add(replace(request, method=rehearsal.method))
        while not row.has_ended:
            single.step()
    if row.error is not None:
        raise row.error
    return replace(request, method=rehearsal.learnt())
