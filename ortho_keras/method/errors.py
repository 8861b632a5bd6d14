"""What goes wrong by a user's input or a machine's state, and is told in one line."""

import re

_TRACED = (
    "in user code:",
    "Graph execution error:",
    "Detected at node ",
    "<stack traces",
    "Exception encountered when calling ",
)


def first_line(error):
    """Returns the first line of an error that says something, without terminal colours, or its type where none does."""
    text = re.sub(r"\x1b\[[0-9;]*m|\{\{function_node .*?\}\} ?", "", str(error))
    if text.startswith(_TRACED[:2]):  # what it says comes behind a traceback
        text = re.sub(r'\A.*File "[^\n]*', "", text, flags=re.DOTALL)
        text = re.sub(r"\A.*?^ *[\w.]+(Error|Exception): ", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_TRACED)]
    return lines[0][:400] if lines else type(error).__name__


class InputError(ValueError):
    """A flag, an argument or a file is not what was expected. The message names it, what was expected and what came."""


class NonFiniteLossError(ArithmeticError):
    """The loss became inf or NaN."""


class WorkerLostError(RuntimeError):
    """Another worker of a run on several machines went away."""


class Interrupted(Exception):
    """The run was asked to stop and has written a checkpoint."""

    def __init__(self, message, signum):
        super().__init__(message)
        self.signum = signum
