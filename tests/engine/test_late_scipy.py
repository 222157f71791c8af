"""scipy's assignment problem is not imported until it is solved, and is scipy's then."""

import sys
from importlib import import_module
from typing import Any

import fresh
import numpy as np
import pytest
import scipy

from kvscope.harness.engine.late_scipy import assignment_imported_late

COSTS = np.array([[4, 1, 3], [2, 0, 5], [3, 2, 2]])


@pytest.fixture
def not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was it comes back, for the tests of others: the module, and what its package calls so."""
    monkeypatch.setattr(scipy, "optimize", None, raising=False)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    monkeypatch.delitem(sys.modules, "scipy.optimize")


def columns(solve: Any) -> list[int]:
    found: list[int] = solve(COSTS)[1].tolist()
    return found


@pytest.mark.usefixtures("not_imported")
def test_a_call_imports_it() -> None:
    with assignment_imported_late():
        from scipy.optimize import linear_sum_assignment as late
    assert "scipy.optimize" not in sys.modules
    assert columns(late) == [1, 0, 2]
    from scipy.optimize import linear_sum_assignment

    assert columns(linear_sum_assignment) == [1, 0, 2]
    assert late is not linear_sum_assignment


@pytest.mark.usefixtures("not_imported")
def test_what_else_is_asked_of_it_imports_it() -> None:
    with assignment_imported_late():
        stand_in = sys.modules["scipy.optimize"]
        from scipy.optimize import brentq
    assert brentq(lambda x: x - 0.25, 0, 1) == pytest.approx(0.25)
    assert columns(stand_in.linear_sum_assignment) == [1, 0, 2]
    assert stand_in is not sys.modules["scipy.optimize"]
    assert stand_in.minimize is sys.modules["scipy.optimize"].minimize
    with pytest.raises(AttributeError):
        _ = stand_in.nothing


@pytest.mark.usefixtures("not_imported")
def test_an_error_leaves_nothing_behind() -> None:
    with pytest.raises(IndexError), assignment_imported_late():
        [].pop()
    assert "scipy.optimize" not in sys.modules


def test_where_it_is_imported_it_stays() -> None:
    imported = import_module("scipy.optimize")
    with assignment_imported_late():
        assert sys.modules["scipy.optimize"] is imported
    assert sys.modules["scipy.optimize"] is imported


def test_the_engine_is_imported_without_it_and_losses_have_it() -> None:
    code = (
        "import sys\n"
        "if 'sklearn' in sys.modules: sys.exit(77)\n"
        "assert 'scipy.optimize' not in sys.modules\n"
        "from transformers.loss.loss_for_object_detection import linear_sum_assignment as solve\n"
        f"print(*solve({COSTS.tolist()})[1], 'scipy.optimize' in sys.modules)\n"
    )
    done = fresh.run(["-c", code])
    if done.returncode == 77:
        pytest.skip("transformers 5.17 imports scikit-learn, and so scipy.optimize, where it is installed")
    assert (done.stdout, done.stderr, done.returncode) == ("1 0 2 True\n", "", 0)
