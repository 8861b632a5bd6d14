"""The time of a training step with TensorFlow's oneDNN operations on and off, against TensorFlow's own choice.

python benchmarks/onednn.py --depth=44 --precision=float32 --rounds=21

TensorFlow reads `TF_ENABLE_ONEDNN_OPTS` once, so each arm is a process of its own; they take turns, one step at a time, in an
order that alternates. The ratio is that of an arm to TensorFlow's choice in the same round; its median and quartiles go to
`results/onednn/<net>-<size>-<batch>-<precision>-cores<cores>.json`.
"""

import contextlib
import functools
import os
import pathlib
import subprocess
import sys

import keras
from absl import app, flags
from arms import SEED, training_step
from measured import write_result
from runs import ROOT, rounds, timing
from step_time import data, kind, net

from ortho_keras import OrthonormalRegularizer
from ortho_keras.trainer.runtime import cpu_cores

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "onednn"
ARMS = {"TensorFlow's choice": None, "TF_ENABLE_ONEDNN_OPTS=1": "1", "TF_ENABLE_ONEDNN_OPTS=0": "0"}

flags.DEFINE_bool("serve", False, "Takes a step for each line read, answers with a line, and writes nothing.")
flags.FLAGS.set_default("results", str(RESULTS))


def serve():
    step, batch = training_step(net()(OrthonormalRegularizer())), data()
    for _ in sys.stdin:
        step(*batch)
        print(flush=True)


def start(value):
    """Starts a process that serves steps with this value of the variable; `None`: without it."""
    environment = {key: text for key, text in os.environ.items() if key != "TF_ENABLE_ONEDNN_OPTS"}
    environment |= {} if value is None else {"TF_ENABLE_ONEDNN_OPTS": value}
    command = [sys.executable, *sys.argv, "--serve"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def take_step(process):
    """Has a process take one step."""
    process.stdin.write("\n")
    process.stdin.flush()
    if not process.stdout.readline():
        sys.exit(f"a process of {FLAGS.precision} steps ended with status {process.wait()} instead of answering")


def main(_):
    keras.config.set_dtype_policy(FLAGS.precision)
    if FLAGS.serve:
        return serve()
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(start(value)) for name, value in ARMS.items()}
        steps = {name: functools.partial(take_step, process) for name, process in processes.items()}
        seconds = rounds(steps, FLAGS.rounds, warm_up=2)
        for process in processes.values():
            process.stdin.close()
    figures = {name: timing(own, seconds[next(iter(ARMS))]) for name, own in seconds.items()}
    name = f"{kind()}-{FLAGS.image_size}-{FLAGS.batch_size}-{FLAGS.precision}-cores{cpu_cores()}.json"
    write_result(pathlib.Path(FLAGS.results, name), rounds=FLAGS.rounds, seed=SEED, arms=figures)
    for name, arm in figures.items():
        low, median, high = arm["ratio_quartiles"]
        print(f"{name}: {1000 * arm['median_seconds']:.3g} ms, {median:.3f} ({low:.3f} to {high:.3f}) times {next(iter(ARMS))}")


if __name__ == "__main__":
    app.run(main)
