"""How far a stage is: bars on a terminal, plain lines where there is none."""

import contextlib
import logging
import os
import pty
import subprocess
import sys
import termios

import pytest

from flows.stage import Progress, progress
from permllm.batches import batches


@pytest.fixture(autouse=True)
def lines(caplog):
    caplog.set_level(logging.INFO, "permllm")
    return caplog


def test_without_a_terminal_every_step_is_a_line_with_the_time_left(lines):
    assert list(progress("abc", "prune layer", 4, done=1)) == ["a", "b", "c"]
    assert lines.messages[0] == "prune layer: 1 of 4 are done already"
    assert [message.split(",")[0] for message in lines.messages[1:]] == ["prune layer 2/4", "prune layer 3/4", "prune layer 4/4"]
    assert lines.messages[-1].endswith("about 0 s left")


def test_a_step_says_what_came_of_it(lines):
    with Progress("learn epoch", 2) as steps:
        steps.step("held-out loss 0.5")
    assert lines.messages[0].startswith("learn epoch 1/2: held-out loss 0.5, ")


def test_batches_say_nothing_where_there_is_no_terminal(lines):
    assert list(batches("ab", "model.layers.0")) == ["a", "b"]
    assert lines.messages == []


ON_A_TERMINAL = """
import logging, sys
from flows.stage import _bars_on_a_terminal, progress
from permllm.batches import batches
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
with _bars_on_a_terminal():
    for layer in progress(range(2), "calibrate layer", 2):
        for batch in batches([1, 2, 3], f"model.layers.{layer}"):
            pass
        logging.getLogger("permllm").info("a line of the log")
"""


def output_of(terminal):
    with contextlib.suppress(OSError):  # the other side is closed
        while output := os.read(terminal, 4096):
            yield output.decode(errors="replace")


def test_on_a_terminal_batches_have_a_bar_below_that_of_layers(repository):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = os.environ | {"PYTHONPATH": str(repository)}
    child = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], stderr=theirs, env=environment)
    os.close(theirs)
    shown = "".join(output_of(ours))
    os.close(ours)
    assert child.wait() == 0
    assert all(bar in shown for bar in ("calibrate layer: 100%", "model.layers.0:", "model.layers.1:", "2/2"))
    assert shown.count("a line of the log") == 2 and "batch 1 of" not in shown
