"""The time of a training step on Keras's other backends: the penalty, and modulation, over L2.

python benchmarks/backends.py --backends=jax,torch

A process of each backend, which must be installed, takes a step of each arm in turn by Keras's `train_on_batch`. The ratio is
that of an arm to L2 in the same round; median and quartiles go to
`results/backends/<backend>-plain<depth>-<size>-<batch>-<device>.json`.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import time

import keras
import numpy as np
from absl import app, flags
from runs import ROOT, rounds, timing

FLAGS = flags.FLAGS

flags.DEFINE_list("backends", ["jax", "torch"], "Which backends.")
flags.DEFINE_integer("depth", 44, "Layers of the plain net.", lower_bound=8)
flags.DEFINE_integer("image_size", 32, "Pixels a side.", lower_bound=1)
flags.DEFINE_integer("batch_size", 128, "Images a step.", lower_bound=1)
flags.DEFINE_integer("rounds", 10, "Steps of each arm that count.", lower_bound=1)
flags.DEFINE_bool("measure", False, "Measures the backend of this process, prints the figures as JSON, and writes nothing.")
flags.DEFINE_string("results", str(ROOT / "benchmarks" / "results" / "backends"), "Folder of the result files.")


def measure():
    """Returns `{arm: figures}`."""
    import ortho_keras

    shape, rng = (FLAGS.image_size, FLAGS.image_size, 3), np.random.default_rng(0)
    images = rng.normal(size=(FLAGS.batch_size, *shape)).astype("float32")
    labels = rng.integers(10, size=FLAGS.batch_size)
    penalty = ortho_keras.OrthonormalRegularizer(1e-4)

    def net(regularizer):
        return ortho_keras.plain_cnn(FLAGS.depth, shape, regularizer=regularizer, initializer="dirac", relu_shift=1.0, seed=0)

    arms = {"L2": net(keras.regularizers.L2(0.5e-4)), "OrthonormalRegularizer": net(penalty)}
    for reference in ("neighbour", "anchor"):
        modulated = ortho_keras.modulate(net(penalty), reference=reference)
        arms[f"OrthonormalRegularizer and modulation by the {reference}"] = modulated
    steps, first = {}, {}
    for name, model in arms.items():
        model.compile(keras.optimizers.SGD(0.01, 0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        steps[name] = functools.partial(model.train_on_batch, images, labels)
        started = time.perf_counter()
        steps[name]()
        first[name] = round(time.perf_counter() - started, 2)
    seconds = rounds(steps, FLAGS.rounds, warm_up=1)
    return {name: {"first_step_seconds": first[name], **timing(own, seconds["L2"])} for name, own in seconds.items()}


def main(_):
    if FLAGS.measure:
        print(json.dumps(measure()))
        return
    from measured import device, write_result

    for backend in FLAGS.backends:
        environment = {**os.environ, "KERAS_BACKEND": backend}
        command = [sys.executable, *sys.argv, "--measure"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        arms = json.loads(done.stdout.splitlines()[-1])
        name = f"{backend}-plain{FLAGS.depth}-{FLAGS.image_size}-{FLAGS.batch_size}-{device()}.json"
        write_result(pathlib.Path(FLAGS.results, name), backend=backend, rounds=FLAGS.rounds, arms=arms)
        for arm, figures in arms.items():
            print(backend, arm, figures, flush=True)


if __name__ == "__main__":
    app.run(main)
