"""The floor of a step, from bytes and bandwidths."""

import pytest
import torch
from tiny_models import loaded_model

from kvscope.harness.passes.chunks import accuracy_chunk_tokens, memory_chunk_tokens
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.facts import describe_model
from kvscope.harness.passes.floor import bus_bytes_per_s, copy_bytes_per_s, floor_s, weights_read_bytes


def test_bytes_over_bandwidths() -> None:
    speeds = {"copy_bytes_per_s": 4e12, "bus_bytes_per_s": 5e10}
    assert floor_s(8e10, 0, recalls_behind=False, **speeds) == pytest.approx(0.02)
    # A recall that the step waits for is added; one that runs behind counts where it is the longer.
    assert floor_s(8e10, 5e8, recalls_behind=False, **speeds) == pytest.approx(0.03)
    assert floor_s(8e10, 5e8, recalls_behind=True, **speeds) == pytest.approx(0.02)
    assert floor_s(8e10, 5e9, recalls_behind=True, **speeds) == pytest.approx(0.1)
    assert floor_s(8e10, 5e9, copy_bytes_per_s=4e12, bus_bytes_per_s=None, recalls_behind=False) == pytest.approx(0.02)


def test_a_cpu_has_a_copy_and_no_bus() -> None:
    assert copy_bytes_per_s(torch.device("cpu")) > 1e6
    assert bus_bytes_per_s(torch.device("cpu")) is None


@pytest.mark.gpu
def test_a_gpu_has_both() -> None:
    device = torch.device("cuda")
    assert copy_bytes_per_s(device) > bus_bytes_per_s(device) > 1e8  # type: ignore[operator]


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_table_is_read_where_it_projects_the_output(tied: bool) -> None:
    loaded = loaded_model("llama")
    table = loaded.model.get_input_embeddings().weight
    output = loaded.model.get_output_embeddings()
    output.weight = table if tied else torch.nn.Parameter(table.detach().clone())
    total = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    assert weights_read_bytes(loaded) == total - (0 if tied else table.numel() * table.element_size())


def test_chunks_of_a_prefill() -> None:
    facts = describe_model("preset:tiny", device="cpu")
    default, told = (
        make_config({"methods": ["dense"]}),
        make_config({"methods": ["dense"], "prefill_chunk_tokens": 512}),
    )
    assert [memory_chunk_tokens(default), memory_chunk_tokens(told)] == [2048, 512]
    assert [accuracy_chunk_tokens(default, facts), accuracy_chunk_tokens(told, facts)] == [2048, 512]
