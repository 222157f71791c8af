"""Recall: chunks land bit for bit in their slots and nothing else is written. Shapes: see the module."""

import pytest
import torch
from kernel_tools import DEVICE, generator, randn

from kvscope.methods.kernels.host_gather import gather as gather_module
from kvscope.methods.kernels.host_gather.gather import HostGather, gather_backend, unsupported_gather
from kvscope.methods.kernels.host_gather.kernel import gather, layer_distances
from kvscope.methods.kernels.host_gather.reference import host_gather_reference

ON_GPU = DEVICE.type == "cuda"
BACKENDS = ["uva", pytest.param("copies", marks=pytest.mark.gpu), pytest.param("contiguous", marks=pytest.mark.gpu)]


def ints(values, device=DEVICE):
    return torch.tensor(values, dtype=torch.int32, device=device)


def store(*, P, U, dtype=torch.float16, n_pages=12, n_slots=20, H=2, D=16):
    mirror = randn(n_pages, H, 2, P, D, seed=P + U, dtype=dtype).cpu()
    slots = torch.full((n_slots, H, 2, U, D), torch.nan, dtype=dtype, device=DEVICE)
    return (mirror.pin_memory() if ON_GPU else mirror), slots


def run(backend, mirror, slots, chunks, chunk_slots, n, *, units_per_chunk=1, n_programs=3):
    """The kernel itself on either device; the host backends through their interface, on a GPU."""
    if backend == "uva":
        layers_L2 = layer_distances([mirror], [slots])
        options = {"units_per_chunk": units_per_chunk, "n_programs": n_programs, "layers_L2": layers_L2}
        gather(mirror, slots, ints(chunks), ints(chunk_slots), ints([n]), **options)
    else:
        move = HostGather(mirror, slots, backend=backend, units_per_chunk=units_per_chunk)
        move(ints(chunks, "cpu"), ints(chunk_slots, "cpu"), ints([n], "cpu"))
    if ON_GPU:
        torch.cuda.synchronize()


@pytest.mark.parametrize(("P", "U"), [(16, 16), (16, 4)])
def test_several_layers_in_one_launch(P, U):
    stores = [store(P=P, U=U, n_slots=6) for _ in range(3)]
    mirrors, slots = [mirror * (layer + 1) for layer, (mirror, _) in enumerate(stores)], [held for _, held in stores]
    if ON_GPU:
        mirrors = [mirror.pin_memory() for mirror in mirrors]
    chunks, chunk_slots, n = [7, 0, 3, 9], [4, 0, 5, 2], 3
    expected = [held.clone() for held in slots]
    for mirror, held in zip(mirrors, expected, strict=True):
        host_gather_reference(mirror, held, ints(chunks[:n]), ints(chunk_slots[:n]), units_per_chunk=1)
    layers_L2 = layer_distances(mirrors, slots)
    gather(mirrors[0], slots[0], ints(chunks), ints(chunk_slots), ints([n]),
           layers_L2=layers_L2, units_per_chunk=1, n_programs=3)  # fmt: skip
    if ON_GPU:
        torch.cuda.synchronize()
    for held, wanted in zip(slots, expected, strict=True):
        assert torch.equal(held.view(torch.int16), wanted.view(torch.int16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("P", "U", "per_chunk"), [(16, 16, 1), (16, 16, 2), (16, 4, 1), (16, 4, 3), (8, 1, 5)])
def test_chunks_land_in_their_slots_and_nowhere_else(P, U, per_chunk, backend):
    mirror, slots = store(P=P, U=U, n_slots=6 * per_chunk)
    n_chunks = 12 * P // U // per_chunk
    chunks = torch.randperm(n_chunks, generator=generator(1))[:5].tolist()
    chunk_slots = [4, 0, 5, 2, 1]
    expected = slots.clone()
    n = 4
    host_gather_reference(mirror, expected, ints(chunks[:n]), ints(chunk_slots[:n]), units_per_chunk=per_chunk)
    run(backend, mirror, slots, chunks, chunk_slots, n, units_per_chunk=per_chunk)
    assert torch.equal(slots.view(torch.int16), expected.view(torch.int16))  # NaN where nothing was written
    assert int(slots.isnan().any((1, 2, 3, 4)).sum()) == 2 * per_chunk


def test_the_reference_copies_tokens():
    mirror, slots = store(P=16, U=4)
    host_gather_reference(mirror, slots, ints([9]), ints([3]), units_per_chunk=2)
    tokens = torch.cat([slots[6].cpu(), slots[7].cpu()], 2)
    assert torch.equal(tokens, mirror[4, :, :, 8:16])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 1, 5, 99])
def test_counts(n, backend):
    mirror, slots = store(P=16, U=16)
    run(backend, mirror, slots, [1, 2, 3, 4, 5], [0, 1, 2, 3, 4], n)
    assert int((~slots.isnan()).all(4).all(3).all(2).all(1).sum()) == min(n, 5)  # no more than the list


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_churn_twenty_times(backend):
    mirror, slots = store(P=16, U=16, dtype=torch.float32)
    for step in range(20):
        chunks = torch.randperm(12, generator=generator(step)).tolist()
        run(backend, mirror, slots, chunks, list(range(12)), 12)
        assert torch.equal(slots[:12].cpu(), mirror[chunks])


def test_blocks_of_a_large_unit():
    mirror, slots = store(P=64, U=64, n_pages=3, n_slots=3, H=3, D=48)  # 18,432 words a page / 2: no whole blocks
    run("uva", mirror, slots, [2, 0], [0, 2], 2)
    assert torch.equal(slots[[0, 2]].cpu(), mirror[[2, 0]])
    assert slots[1].isnan().all()


def test_on_a_cpu_the_reference_runs_and_says_so():
    mirror, slots = store(P=16, U=4)
    slots = slots.cpu()
    move = HostGather(mirror, slots, backend="uva", units_per_chunk=2)
    assert move.backend == "reference"
    move(ints([3, 1], "cpu"), ints([0, 4], "cpu"), ints([1], "cpu"))
    assert torch.equal(torch.cat([slots[0], slots[1]], 2), mirror[1, :, :, 8:16])
    assert slots[2:].isnan().all()


def test_every_reason_is_given():
    mirror, slots = store(P=16, U=16)
    wrong = torch.empty(3, 2, 2, 5, 16, dtype=torch.float32)
    reasons = unsupported_gather("uva", mirror, wrong)
    assert len(reasons) == 2
    with pytest.raises(ValueError, match="do not fit pages"):
        HostGather(mirror, wrong, backend="copies")
    assert unsupported_gather("dma", mirror, slots) == ["there is no backend 'dma', only uva, copies, contiguous"]
    with pytest.raises(ValueError, match="16 bytes"):
        gather(
            torch.zeros(2, 1, 2, 4, 2, dtype=torch.float16),
            torch.zeros(2, 1, 2, 2, 2, dtype=torch.float16),
            ints([0]),
            ints([0]),
            ints([1]),
            layers_L2=torch.zeros((1, 2), dtype=torch.int64),
            units_per_chunk=1,
            n_programs=1,
        )


@pytest.mark.gpu
def test_pageable_memory_is_refused():
    mirror, slots = store(P=16, U=16)
    with pytest.raises(ValueError, match="not in pinned memory"):
        HostGather(mirror.clone(), slots, backend="uva")


@pytest.mark.gpu
def test_a_captured_graph_recalls_other_chunks():
    mirror, slots = store(P=16, U=16)
    chunks, chunk_slots, n = ints([1, 2, 3]), ints([0, 1, 2]), ints([3])
    move = HostGather(mirror, slots, backend="uva")
    move(chunks, chunk_slots, n)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        move(chunks, chunk_slots, n)
    slots.fill_(torch.nan)
    chunks.copy_(ints([7, 8, 9]))
    chunk_slots.copy_(ints([5, 4, 3]))
    n.fill_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(slots[[5, 4]].cpu(), mirror[[7, 8]])
    assert slots[:4].isnan().all()


@pytest.mark.parametrize(("P", "U", "H", "expected"), [
    (64, 64, 8, "copies"),  # 256 KiB: the transfer hides what a copy costs
    (64, 64, 2, "contiguous"),
    (64, 32, 16, "contiguous"),  # part of a page is many runs
])  # fmt: skip
def test_without_the_kernel_the_size_of_a_unit_decides(P, U, H, expected, monkeypatch):
    mirror, slots = (torch.empty(2, H, 2, tokens, 128, dtype=torch.float16) for tokens in (P, U))
    assert gather_backend(mirror, slots) == "uva"  # on a CPU the reference takes its place, and says so
    monkeypatch.setattr(gather_module, "unsupported_gather", lambda *args: ["no kernel"])
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    assert gather_backend(mirror, slots) == expected
