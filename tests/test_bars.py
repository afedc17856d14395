"""A bar is drawn for whoever reads it: often for a person, seldom into a file."""

import io
import sys
import time

from probdiff import bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawings(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in bars.bar(range(6), desc="work"):
        time.sleep(0.12)
    return stream.getvalue().strip().split("\r")


def test_a_terminal_sees_every_step_and_a_file_both_ends(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    watched = drawings(Terminal(), monkeypatch)
    kept = drawings(io.StringIO(), monkeypatch)
    assert all(any(f" {n}/6 " in text for text in watched) for n in range(7))
    assert len(kept) == 2
    assert " 0/6 " in kept[0] and " 6/6 " in kept[1]


def test_a_notebook_is_watched(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert len(drawings(io.StringIO(), monkeypatch)) >= 7
