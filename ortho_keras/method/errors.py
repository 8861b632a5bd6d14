"""The errors that a user's input or the machine causes, and their message in one line."""

import re

_TRACED = "in user code:", "Graph execution error:", "Detected at node ", "<stack traces", "Exception encountered when calling "


def first_line(error):
    """Returns the first informative line of an error's message, without terminal colors, or its type where there is none."""
    text = re.sub(r"\x1b\[[0-9;]*m|\{\{function_node .*?\}\} ?", "", str(error))
    if text.startswith(_TRACED[:2]):  # the message follows a traceback
        text = re.sub(r'\A.*File "[^\n]*', "", text, flags=re.DOTALL)
        text = re.sub(r"\A.*?^ *[\w.]+(Error|Exception): ", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_TRACED)]
    return lines[0][:400] if lines else type(error).__name__


class InputError(ValueError):
    """A flag, an argument or a file is not as expected. The message gives its name, what was expected and what was received."""


class NonFiniteLossError(ArithmeticError):
    """The loss became inf or NaN."""


class WorkerLostError(RuntimeError):
    """Another worker of a run on several machines was lost."""


class Interrupted(Exception):
    """The run was asked to stop and has written a checkpoint."""

    def __init__(self, message, signum):
        super().__init__(message)
        self.signum = signum
