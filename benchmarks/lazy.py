"""The penalty at each step against the penalty at some steps: the time of a step, and how orthonormal the kernels end.

python benchmarks/lazy.py --net=plain101_imagenet --data_dir=PATH

Nets that start as identities, with the shifted ReLU, train on the same batches of CIFAR-10, enlarged where the net is for
photographs: with L2, and with the penalty at each step, each fourth and each tenth, 4 and 10 times as large. They take turns,
ten steps each; the ratio is that of ten steps to ten of L2 in the same turn. The residual is the mean of `||W^T W - I||_F`
after all steps. Goes to `results/lazy/<net>-<size>-<batch>-<device>.json`.
"""

import os
import pathlib
import sys
import time

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as train.py does, before TensorFlow starts

import keras
import numpy as np
from absl import app, flags
from arms import SEED, residual, training_step
from measured import device, write_result
from runs import ROOT, timing

from ortho_keras import OrthonormalRegularizer, plain_cnn, plain_imagenet
from ortho_keras.trainer.data import BatchSettings, load_data, training_batches
from ortho_keras.trainer.penalty import arithmetic_share

FLAGS = flags.FLAGS
NETS = {  # depth, function, pixels, images of a step
    "plain8": (8, plain_cnn, 8, 16),
    "plain44": (44, plain_cnn, 32, 128),
    "plain101_imagenet": (101, plain_imagenet, 64, 32),
}
TURN = 10  # steps
ARMS = {"L2": None, "each step": 1, "each 4th": 4, "each 10th": 10}

flags.DEFINE_enum("net", "plain44", list(NETS), "Which net.")
flags.DEFINE_string("dataset", "cifar10", "Which images.")
flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data; by default TFDS's own.")
flags.DEFINE_integer("turns", 20, "Turns of ten steps of each arm.", lower_bound=2)
flags.DEFINE_float("penalty_factor", 0.1, "Strength of the penalty; L2 takes a hundredth.")
flags.DEFINE_string("results", str(ROOT / "benchmarks" / "results" / "lazy"), "Folder of the result files.")


def main(_):
    depth, make, size, batch_size = NETS[FLAGS.net]
    data = load_data(FLAGS.dataset, image_size=size, data_dir=FLAGS.data_dir)
    settings, factor = BatchSettings(batch_size, seed=SEED), FLAGS.penalty_factor
    steps, batches, models, seconds = {}, {}, {}, {name: [] for name in ARMS}
    for name, every in ARMS.items():
        regularizer = OrthonormalRegularizer(factor) if every else keras.regularizers.L2(factor / 200)
        models[name] = make(depth, data.image_shape, regularizer=regularizer, initializer="dirac", relu_shift=1.0, seed=SEED)
        steps[name] = training_step(models[name], every=every or 1, rate=0.005)
        batches[name] = iter(training_batches(data.train, settings, stop=TURN * FLAGS.turns))
    for turn in range(FLAGS.turns):
        for name in list(ARMS)[:: 1 if turn % 2 else -1]:
            taken = [next(batches[name]) for _ in range(TURN)]
            started = time.perf_counter()
            for images, labels in taken:
                loss = steps[name](images / 255.0, labels)
            seconds[name].append((time.perf_counter() - started) / TURN)
            if not np.isfinite(loss):
                sys.exit(f"{name}: the loss became {loss} by step {TURN * (turn + 1)}")
    arms = {}
    for name, own in seconds.items():  # graphs are traced in the first turn
        arms[name] = {**timing(own[1:], seconds["L2"][1:]), "residual": round(residual(models[name]), 5)}
        print(name, arms[name], flush=True)
    path = pathlib.Path(FLAGS.results, f"{FLAGS.net}-{size}-{batch_size}-{device()}.json")
    share = round(arithmetic_share(models["L2"], batch_size), 4)
    write_result(path, steps=TURN * FLAGS.turns, seed=SEED, arithmetic_share=share, arms=arms)


if __name__ == "__main__":
    app.run(main)
