"""Commands called in the test's own process, or started as processes; benchmark scripts with flags of their own."""

import contextlib
import importlib
import pathlib
import subprocess
import sys
import time

from absl import flags
from absl.testing import flagsaver

from ortho_keras.trainer import command

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = ("--image_size=0", "--augment=none", "--depth=8", "--width=2", "--warmup_steps=0", "--bn_batches=2")


def invoke(capsys, *arguments, main=command.main, program="train.py"):
    """Calls a command with train.py's flags in this process; returns exit status, stdout and stderr."""
    capsys.readouterr()
    with flagsaver.flagsaver():
        try:
            status = main(command.parse_flags([program, *map(str, arguments)], program))
        except SystemExit as stop:
            status = stop.code
    return status, *capsys.readouterr()


def start(*arguments):
    """Starts Python as a process of its own in the repository's root."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


@contextlib.contextmanager
def script(monkeypatch, path, *arguments):
    """Imports a script whose flags are not train.py's, parses its arguments, and yields its module.

    absl has one space of flags, and the scripts import each other: both are put back at the end.
    """
    path = ROOT / path
    flag_values, modules = vars(flags.FLAGS), dict(sys.modules)
    held = dict(flag_values)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(path.parent)
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        flag_values.clear()
        flag_values.update(vars(flags.FlagValues()))
        _forget(path.parent)
        try:
            module = importlib.import_module(path.stem)
            flags.FLAGS(sys.argv)
            yield module
        finally:
            flag_values.clear()
            flag_values.update(held)
            _forget(path.parent)
            sys.modules |= {name: module for name, module in modules.items() if name not in sys.modules}


def _forget(folder):
    """Removes the modules of a folder from those that are imported."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(f"{folder}/"):
            del sys.modules[name]
