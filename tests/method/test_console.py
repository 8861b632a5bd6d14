"""What is printed where stdout is no UTF-8 terminal: text of any alphabet, and nothing more where nobody reads."""

import io
import os
import sys

from ortho_keras.method.console import say, start_command, without_notes


def test_any_text_on_a_terminal_of_ascii(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    start_command()
    say("runs/caf\u00e9")
    assert stream.buffer.getvalue() == b"runs/caf\\xe9\n"


def test_a_closed_pipe_and_a_full_disk_do_not_stop_the_process(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    for opened in (writing, "/dev/full"):
        with open(opened, "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            say("lost")
            say("lost, too")
            say("lost as well", stream)


def test_notes_are_left_out_and_nothing_else(capfd):
    with without_notes():
        os.write(2, b"I0 port.cc:153] oneDNN custom operations are on.\nan error\n")
    assert capfd.readouterr().err == "an error\n"
