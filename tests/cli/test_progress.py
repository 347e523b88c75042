"""How far slow work has come: a bar on a terminal, one line elsewhere, and one step at a time."""

from __future__ import annotations

import io
import logging

import pytest

from fewtune import progress
from fewtune.progress import counted, duration, shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """No terminal, and no patience."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    caplog.set_level(logging.INFO, "fewtune")
    return caplog


def test_one_line_a_step_without_a_terminal(lines: pytest.LogCaptureFixture) -> None:
    assert list(shown(range(4), "decoding", 4)) == [0, 1, 2, 3]
    assert lines.messages == ["decoding: 1 of 4, about 0 seconds left"]
    with counted("runs") as told:
        told(0, 3)
        told(2, 3)
        told(3, 3)
    assert lines.messages[1:] == ["runs: 2 of 3, about 0 seconds left"]


def test_what_was_done_earlier_took_no_time(lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with counted("runs", before=90) as told:
        told(90, 100)
        told(95, 100)
    assert lines.messages == ["runs: 95 of 100, about 10 seconds left"]


def test_quick_work_says_nothing(lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 60.0)
    assert len(list(shown(range(4), "decoding", 4))) == 4
    assert lines.messages == []


def test_a_step_within_a_step_is_silent(lines: pytest.LogCaptureFixture) -> None:
    for _ in shown(range(2), "search", 2):
        assert list(shown(range(3), "importance", 3)) == [0, 1, 2]
    assert [line.partition(":")[0] for line in lines.messages] == ["search"]
    list(shown(range(2), "test", 2))
    assert len(lines.messages) == 2


def test_other_processes_of_the_terminal_are_silent(
    lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert list(shown(range(3), "importance", 3)) == [0, 1, 2]
    assert lines.messages == []


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fewtune")
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    for _ in shown(range(4), "decoding", 4):
        pass
    assert "decoding" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()
    assert caplog.messages == []


def test_a_step_that_fails_leaves_the_next_one_shown(lines: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError):
        list(shown((1 // n for n in (1, 0)), "first", 2))
    list(shown(range(2), "second", 2))
    assert lines.messages[-1].startswith("second")


def test_durations() -> None:
    assert [duration(s) for s in (8, 120, 7200)] == ["8 seconds", "2 minutes", "2.0 hours"]
