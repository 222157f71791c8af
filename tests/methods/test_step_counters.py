"""Numbers of a step: sent in one copy, at addresses that stay."""

import pytest
import torch
from masked import masking
from sequences import prefilled
from tiny_models import loaded_model, prompt_ids

from kvscope.methods.base import SequenceCache
from kvscope.methods.lsa.selection import MassSelector, Rule, ScriptedSelector
from kvscope.methods.registry import create_method
from kvscope.methods.step_counters import StepCounters

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_numbers_reach_the_device_together_and_not_before() -> None:
    counters = StepCounters(DEVICE)
    first, second = counters.take(), counters.take()
    counters.send()
    first.set(7)
    second.set(-3)
    assert (int(first.device_1), int(second.device_1)) == (0, 0)
    counters.send()
    assert (int(first.device_1), int(second.device_1)) == (7, -3)
    for value in range(5):  # more often than there are host buffers
        first.set(value)
        counters.send()
    assert (int(first.device_1), int(second.device_1)) == (4, -3)


def test_addresses_stay_while_others_come_and_go() -> None:
    counters = StepCounters(DEVICE)
    kept = counters.take()
    kept.set(11)
    others = [counters.take() for _ in range(3000)]  # several blocks
    addresses = {each.device_1.data_ptr() for each in (kept, *others)}
    assert len(addresses) == 3001
    address = kept.device_1.data_ptr()
    for each in others:
        each.set(5)
        each.release()
    again = [counters.take() for _ in range(3000)]
    counters.send()
    assert kept.device_1.data_ptr() == address
    assert int(kept.device_1) == 11
    assert {each.device_1.data_ptr() for each in again} == addresses - {address}
    assert all(int(each.device_1) == 0 for each in again[::500])  # a place that was given back begins at 0


def test_a_sequence_without_such_steps_says_why() -> None:
    loaded = loaded_model("llama")
    prompt = prefilled(loaded, prompt_ids(40), [])
    sequence = masking(create_method("recency")).open(prompt, "cpu")
    with pytest.raises(ValueError, match="steps cannot run at fixed addresses: "):
        SequenceCache.make_static(sequence, StepCounters(torch.device("cpu")))


def test_a_selector_that_is_asked_at_the_wrong_time_says_when_it_chooses() -> None:
    rule = Rule(n_chunks=1)
    with pytest.raises(TypeError, match="MassSelector chooses in the step"):
        MassSelector(rule).choose()
    with pytest.raises(TypeError, match="ScriptedSelector chooses before the step"):
        ScriptedSelector([]).choose_by_mass(torch.ones(2), torch.zeros(()))
