"""The command `ortho-train`; `python train.py` is the same from a clone.

Importing this module starts TensorFlow with the settings of our commands, before the package can start it without them.
"""

import os
import platform
import sys


def refuse(message):
    """Ends the process with one line."""
    print(message, file=sys.stderr)
    sys.exit(2)


if os.environ.setdefault("KERAS_BACKEND", "tensorflow") != "tensorflow":
    refuse(f"KERAS_BACKEND must be tensorflow, or not set. Received: {os.environ['KERAS_BACKEND']!r}")
os.environ["MPLBACKEND"] = "agg"  # the commands draw into files
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides TensorFlow's notes on its build
if platform.machine().lower() in ("x86_64", "amd64"):  # halves the time of convolutions where TensorFlow leaves it off
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # several runs can share a GPU's memory

try:
    from ortho_keras.method.console import start_command, tf
except KeyboardInterrupt:
    sys.exit(130)
except AssertionError:  # TensorFlow's own, on the floatx in that file
    refuse("Keras's configuration file, ~/.keras/keras.json, must have floatx float32. Received: a type unknown to TensorFlow")

from absl import app, logging

start_command()
logging.set_verbosity(logging.WARNING)
tf.get_logger().setLevel("WARNING")


def main():
    """Runs the command line of this process."""
    from ortho_keras.trainer import command  # it defines train.py's flags, which other scripts do not have

    script = sys.modules["__main__"]
    script.__doc__ = script.__doc__ or command.__doc__  # which `--help` begins with
    command.show_flags_in_help()
    app.run(command.main, flags_parser=command.parse_flags)
