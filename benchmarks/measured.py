"""The result file of a benchmark, with all that says where it came from."""

import importlib.metadata
import pathlib
import shlex
import sys

from runs import commit

from ortho_keras.files import write_json
from ortho_keras.result import processor
from ortho_keras.runtime import cpu_cores


def write_result(path, **figures):
    """Writes what a benchmark measured, with its command, commit, hardware and versions, to the JSON file `path`."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = {
        "command": shlex.join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit(),
        "cpu_cores": cpu_cores(),
        "processor": processor(),
        "versions": {name: importlib.metadata.version(name) for name in ("tensorflow", "keras")},
    }
    write_json(path, {**measured, **figures})
