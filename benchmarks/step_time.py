"""The time of a training step, arm against arm: interleaved in one process, so that what disturbs the machine disturbs both.

python benchmarks/step_time.py --compare=regularizers --depth=44 --precision=mixed_bfloat16 --rounds=20

Each round runs one step of each arm, in an order that alternates. The ratio is that of an arm to the first in the same
round; its median and quartiles go to `results/step_time/<compare>-<depth>-<size>-<batch>-<precision>-cores<cores>.json`.
"""

import importlib.metadata
import json
import os
import pathlib
import shlex
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from runs import ROOT, commit

from ortho_keras import (
    ConvOrthogonalRegularizer,
    DoubleSoftOrthogonalRegularizer,
    FusedBatchNormalization,
    MutualCoherenceRegularizer,
    OrthonormalRegularizer,
    ShiftedReLU,
    SRIPRegularizer,
    modulate,
    plain_cnn,
)
from ortho_keras.experiment import processor
from ortho_keras.kernels import as_matrices, at_least_float32
from ortho_keras.regularizers import KernelRegularizer

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "step_time"
SEED = 0

flags.DEFINE_enum("compare", "layers", ["layers", "regularizers"], "Which arms.")
flags.DEFINE_integer("depth", 44, "Layers.", lower_bound=8)
flags.DEFINE_integer("image_size", 32, "Pixels a side.", lower_bound=1)
flags.DEFINE_integer("batch_size", 128, "Images a step.", lower_bound=1)
flags.DEFINE_enum("precision", "mixed_bfloat16", ["float32", "mixed_bfloat16", "mixed_float16"], "Type of the arithmetic.")
flags.DEFINE_integer("rounds", 20, "Steps of each arm that count.", lower_bound=1)
flags.DEFINE_string("results", str(RESULTS), "Folder of the result files.")


class Maximum(ShiftedReLU):
    """The same values with TensorFlow's own gradient."""

    def call(self, inputs):
        return tf.maximum(inputs, tf.cast(-self.shift, inputs.dtype))


def with_layers(replaced):
    """A function from a model to the same model with other layers: `replaced` maps types to the types in their place."""

    def clone(layer):
        return replaced.get(type(layer), type(layer)).from_config(layer.get_config())

    return lambda model: keras.models.clone_model(model, clone_function=clone)


class KerasOrthogonal(keras.regularizers.OrthogonalRegularizer):
    """Keras's, on the kernel as a matrix: it takes no other rank."""

    def __call__(self, x):
        return super().__call__(tf.reshape(x, (-1, x.shape[-1])))


class SingularValues(KernelRegularizer):
    """The squares of the singular values' distances to 1, by the singular value decomposition of every kernel."""

    def penalty(self, kernel):
        matrices = as_matrices(at_least_float32(kernel), self.layout, self.groups)
        return tf.reduce_sum(tf.square(tf.linalg.svd(matrices, compute_uv=False) - 1))


def net(regularizer="orthonormal"):
    shape = (FLAGS.image_size, FLAGS.image_size, 3)
    return plain_cnn(FLAGS.depth, shape, regularizer=regularizer, initializer="dirac", relu_shift=1.0, seed=SEED)


ARMS = {
    "layers": {
        "keras.layers.BatchNormalization, tf.maximum": lambda: with_layers(
            {FusedBatchNormalization: keras.layers.BatchNormalization, ShiftedReLU: Maximum}
        )(net()),
        "FusedBatchNormalization, tf.maximum": lambda: with_layers({ShiftedReLU: Maximum})(net()),
        "FusedBatchNormalization, ShiftedReLU": lambda: net(),
    },
    "regularizers": {
        "L2": lambda: net(keras.regularizers.L2(5e-5)),
        "OrthonormalRegularizer": lambda: net(OrthonormalRegularizer()),
        "OrthonormalRegularizer, modulation by the neighbour": lambda: modulate(net(), reference="neighbour"),
        "OrthonormalRegularizer, modulation by the anchor": lambda: modulate(net(), reference="anchor"),
        "Keras's OrthogonalRegularizer, columns of the kernel as a matrix": lambda: net(KerasOrthogonal(1e-4, "columns")),
        "DoubleSoftOrthogonalRegularizer": lambda: net(DoubleSoftOrthogonalRegularizer()),
        "MutualCoherenceRegularizer": lambda: net(MutualCoherenceRegularizer()),
        "SRIPRegularizer": lambda: net(SRIPRegularizer()),
        "ConvOrthogonalRegularizer": lambda: net(ConvOrthogonalRegularizer()),
        "singular values": lambda: net(SingularValues()),
    },
}


def training_step(model):
    """A function of images and labels that trains `model` by one step and returns the loss."""
    optimizer = keras.optimizers.SGD(0.01, 0.9)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(images, labels):
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)) + sum(model.losses)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    return step


def main(_):
    keras.config.set_dtype_policy(FLAGS.precision)
    rng = np.random.default_rng(SEED)
    shape = (FLAGS.image_size, FLAGS.image_size, 3)
    images = tf.constant(rng.normal(size=(FLAGS.batch_size, *shape)).astype("float32"))
    labels = tf.constant(rng.integers(10, size=FLAGS.batch_size))
    arms = ARMS[FLAGS.compare]
    steps, first, seconds = {}, {}, {name: [] for name in arms}
    for name, make in arms.items():
        steps[name] = training_step(make())
        started = time.perf_counter()
        steps[name](images, labels).numpy()
        first[name] = time.perf_counter() - started
    for number in range(FLAGS.rounds + 1):
        for name in list(arms)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            steps[name](images, labels).numpy()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    base = np.array(seconds[next(iter(arms))])
    figures = {
        name: {
            "first_step_seconds": round(first[name], 2),
            "median_seconds": round(float(np.median(values)), 4),
            "ratio_quartiles": [round(float(q), 3) for q in np.percentile(np.array(values) / base, (25, 50, 75))],
        }
        for name, values in seconds.items()
    }
    cores = len(os.sched_getaffinity(0))
    name = f"{FLAGS.compare}-{FLAGS.depth}-{FLAGS.image_size}-{FLAGS.batch_size}-{FLAGS.precision}-cores{cores}.json"
    path = pathlib.Path(FLAGS.results, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": shlex.join(["python", "benchmarks/step_time.py", *sys.argv[1:]]),
        "commit": commit(),
        "rounds": FLAGS.rounds,
        "seed": SEED,
        "cpu_cores": cores,
        "processor": processor(),
        "versions": {name: importlib.metadata.version(name) for name in ("tensorflow", "keras")},
        "arms": figures,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    app.run(main)
