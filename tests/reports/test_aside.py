"""Work that a forked process does beside the rest: its files, its errors, and its end."""

import os
import signal
import sys
import time
from functools import partial

import pytest

from kvscope.reports.aside import aside


def ended(process_id):
    """Whether a process is gone, or dead and waited for by nobody."""
    try:
        with open(f"/proc/{process_id}/stat", encoding="ascii") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(happened):
    until_s = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until_s
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="no process is forked elsewhere")
def test_another_process_does_the_work(tmp_path):
    place = tmp_path / "id"
    with aside([lambda: place.write_text(str(os.getpid()), encoding="utf-8")]):
        wait_for(lambda: place.exists() and place.read_text(encoding="utf-8"))
    assert int(place.read_text(encoding="utf-8")) != os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="no process is forked elsewhere")
def test_behind_the_block_both_do_what_is_left_each_part_once(tmp_path):
    """The other process stays at the first part until all others are done here."""
    own = os.getpid()

    def part(k):
        with (tmp_path / str(k)).open("x", encoding="utf-8") as file:
            file.write(str(os.getpid()))
        if os.getpid() != own:
            wait_for(lambda: len(list(tmp_path.iterdir())) == 5)

    with aside([partial(part, k) for k in range(5)]):
        wait_for((tmp_path / "0").exists)
    done_by = [int((tmp_path / str(k)).read_text(encoding="utf-8")) == own for k in range(5)]
    assert done_by == [False, True, True, True, True]


def test_nothing_to_do():
    with aside([]):
        pass


@pytest.mark.parametrize("platform", ["darwin", sys.platform])
def test_where_no_process_is_to_be_had_the_work_is_done_here_at_the_end(tmp_path, monkeypatch, platform):
    def no_room():
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "fork", no_room)
    order = []
    with aside([partial(order.append, "first"), partial(order.append, "second")]):
        order.append("block")
    assert order == ["block", "first", "second"]


def test_an_error_of_the_work_is_raised_here():
    def fails():
        raise ValueError("no picture")

    with pytest.raises(ValueError, match="no picture"), aside([fails]):
        pass


def test_a_process_that_is_killed_leaves_its_work_to_this_one(tmp_path):
    own = os.getpid()

    def once():
        if os.getpid() != own:
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / "done").write_text("here", encoding="utf-8")

    with aside([once]):
        pass
    assert (tmp_path / "done").read_text(encoding="utf-8") == "here"


@pytest.mark.skipif(sys.platform != "linux", reason="no process is forked elsewhere")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_block_ends_the_process(tmp_path, error):
    place = tmp_path / "id"

    def never_ends():
        place.with_suffix(".new").write_text(str(os.getpid()), encoding="utf-8")
        place.with_suffix(".new").rename(place)
        time.sleep(3600)

    def fails():
        with aside([never_ends]):
            wait_for(place.exists)
            raise error

    with pytest.raises(error):
        fails()
    assert ended(int(place.read_text(encoding="utf-8")))


@pytest.mark.skipif(sys.platform != "linux", reason="no process is forked elsewhere")
def test_a_killed_report_leaves_no_process(tmp_path):
    """The lock of the report folder would live on in it."""
    place = tmp_path / "id"

    def never_ends():
        place.with_suffix(".new").write_text(str(os.getpid()), encoding="utf-8")
        place.with_suffix(".new").rename(place)
        time.sleep(3600)

    report = os.fork()
    if report == 0:
        with aside([never_ends]):
            time.sleep(3600)
    wait_for(place.exists)
    os.kill(report, signal.SIGKILL)
    os.waitpid(report, 0)
    wait_for(lambda: ended(int(place.read_text(encoding="utf-8"))))
