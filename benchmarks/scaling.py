"""How build, first step and step grow with depth: plain nets on small images, with L2, with the penalty and with modulation.

python benchmarks/scaling.py --depths=20,44,110,200,302,500,1004

Each depth in a process of its own. The time to build the net, to trace a training step, of the first step with tracing in it,
and the median of the steps after it go to `results/scaling/<size>-<batch>-<device>.json`, with the exponent b of a fit
`seconds = a * depth^b` over the depths up to 500, by least squares of the logarithms.
"""

import json
import pathlib
import subprocess
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from arms import SEED, plain_net, training_step
from measured import device, write_result
from runs import ROOT

from ortho_keras import OrthonormalRegularizer, modulate

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "scaling"
FIGURES = ("build_seconds", "trace_seconds", "first_step_seconds", "step_seconds")
FITTED = 500
ARMS = {  # name -> the net's regularizer, and whether it is modulated
    "L2": (lambda: keras.regularizers.L2(0.5e-4), False),
    "OrthonormalRegularizer": (OrthonormalRegularizer, False),
    "OrthonormalRegularizer and modulation": (OrthonormalRegularizer, True),
}

flags.DEFINE_list("depths", ["20", "44", "110", "200", "302", "500", "1004"], "Layers, 6n + 2.")
flags.DEFINE_integer("image_size", 8, "Pixels a side.", lower_bound=1)
flags.DEFINE_integer("batch_size", 32, "Images a step.", lower_bound=1)
flags.DEFINE_integer("steps", 10, "Steps that count.", lower_bound=1)
flags.DEFINE_integer("measure", 0, "Prints the figures of this depth as JSON, and writes nothing.")
flags.DEFINE_enum("arm", "L2", list(ARMS), "With --measure: what is trained.")
flags.DEFINE_string("results", str(RESULTS), "Folder of the result file.")


def measure(depth, arm):
    regularizer, modulated = ARMS[arm]
    shape = (FLAGS.image_size, FLAGS.image_size, 3)
    rng = np.random.default_rng(SEED)
    images = tf.constant(rng.normal(size=(FLAGS.batch_size, *shape)).astype("float32"))
    labels = tf.constant(rng.integers(10, size=FLAGS.batch_size))
    times = [time.perf_counter()]
    model = plain_net(depth, shape)(regularizer())
    step = training_step(modulate(model) if modulated else model)
    times.append(time.perf_counter())
    step.trace(images, labels)
    times.append(time.perf_counter())
    for _ in range(1 + FLAGS.steps):
        step(images, labels)
        times.append(time.perf_counter())
    built, traced, run, *rest = np.diff(times)
    return {name: round(float(value), 4) for name, value in zip(FIGURES, (built, traced, traced + run, np.median(rest)))}


def exponent(rows, name):
    fitted = [(row["depth"], row[name]) for row in rows if row["depth"] <= FITTED]
    return round(float(np.polyfit(*np.log(np.array(fitted)).T, 1)[0]), 3) if len(fitted) > 1 else None


def main(_):
    if FLAGS.measure:
        print(json.dumps(measure(FLAGS.measure, FLAGS.arm)))
        return
    arms = {}
    for name in ARMS:
        rows = []
        for depth in map(int, FLAGS.depths):
            command = [sys.executable, *sys.argv, f"--measure={depth}", f"--arm={name}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append({"depth": depth, **json.loads(done.stdout)})
            print(name, rows[-1], flush=True)
        arms[name] = {"rows": rows, "exponents": {figure: exponent(rows, figure) for figure in FIGURES}}
        print(name, arms[name]["exponents"], flush=True)
    path = pathlib.Path(FLAGS.results, f"{FLAGS.image_size}-{FLAGS.batch_size}-{device()}.json")
    write_result(path, fitted_up_to=FITTED, arms=arms)


if __name__ == "__main__":
    app.run(main)
