"""The result file of a benchmark, with all that says where it came from."""

import importlib.metadata
import pathlib
import re
import shlex
import sys

import tensorflow as tf
from runs import commit

from ortho_keras.method.files import write_json
from ortho_keras.trainer.result import processor
from ortho_keras.trainer.runtime import cpu_cores


def gpu_name():
    """Returns the name of the GPU that computes, or `None` where it is a processor."""
    gpus = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU") if gpus else None


def device():
    """Returns what computes, for the name of a result file: `cores2`, or the GPU's name as one word."""
    name = gpu_name()
    return re.sub(r"\W+", "_", name) if name else f"cores{cpu_cores()}"


def write_result(path, **figures):
    """Writes what a benchmark measured, with its command, commit, hardware and versions, to the JSON file `path`.

    The command is told without `--data_dir`, which says where the data lie and not what they are.
    """
    path = pathlib.Path(path)
    given = [flag for flag in sys.argv[1:] if not flag.startswith("--data_dir=")]
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = {
        "command": shlex.join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *given]),
        "commit": commit(),
        "cpu_cores": cpu_cores(),
        "processor": processor(),
        **({"gpu": name} if (name := gpu_name()) else {}),
        "versions": {name: importlib.metadata.version(name) for name in ("tensorflow", "keras")},
    }
    write_json(path, {**measured, **figures})
