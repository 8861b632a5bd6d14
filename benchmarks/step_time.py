"""The time of a training step, arm against arm: interleaved in one process, so that what disturbs the machine disturbs both.

python benchmarks/step_time.py --compare=regularizers --net=plain --depth=44 --precision=float32 --rounds=20

Each round runs one step of each arm, in an order that alternates. The ratio is that of an arm to the first in the same
round; its median and quartiles go to `results/step_time/<compare>-<net>-<size>-<batch>-<precision>-<device>.json`.
The first step is the one that traces the graph. Peak memory is of processes of their own: `memory.py`.
"""

import functools
import pathlib
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from arms import ARMS, SEED, plain_net, training_step, wide_net
from measured import device, write_result
from runs import ROOT, rounds, timing

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "step_time"

flags.DEFINE_enum("compare", "layers", list(ARMS), "Which arms.")
flags.DEFINE_enum("net", "plain", ["plain", "wide"], "plain: of --depth layers; wide: plain_imagenet(101).")
flags.DEFINE_bool("alone", False, "With --compare=regularizers: the penalties alone, nothing else of the net.")
flags.DEFINE_integer("depth", 44, "Layers of the plain net.", lower_bound=8)
flags.DEFINE_integer("image_size", 32, "Pixels a side.", lower_bound=1)
flags.DEFINE_integer("batch_size", 128, "Images a step.", lower_bound=1)
flags.DEFINE_enum("precision", "float32", ["float32", "mixed_bfloat16", "mixed_float16"], "Type of the arithmetic.")
flags.DEFINE_bool("jit_compile", False, "Compiles the steps by XLA.")
flags.DEFINE_integer("rounds", 20, "Steps of each arm that count.", lower_bound=1)
flags.DEFINE_string("results", str(RESULTS), "Folder of the result files.")


def net():
    """A function from a regularizer to the net that the flags name."""
    shape = (FLAGS.image_size, FLAGS.image_size, 3)
    return plain_net(FLAGS.depth, shape) if FLAGS.net == "plain" else wide_net(shape)


def kind():
    """The name of that net."""
    return f"plain{FLAGS.depth}" if FLAGS.net == "plain" else "plain101_imagenet"


def data():
    rng = np.random.default_rng(SEED)
    shape = (FLAGS.batch_size, FLAGS.image_size, FLAGS.image_size, 3)
    return tf.constant(rng.normal(size=shape).astype("float32")), tf.constant(rng.integers(10, size=FLAGS.batch_size))


def main(_):
    keras.config.set_dtype_policy(FLAGS.precision)
    batch, arms = data(), ARMS[FLAGS.compare](net())
    if FLAGS.alone:
        arms.pop("OrthonormalDecay(every=1)")  # it has no penalty
    steps, first = {}, {}
    for name, make in arms.items():
        steps[name] = functools.partial(training_step(*make(), FLAGS.alone, jit_compile=FLAGS.jit_compile), *batch)
        started = time.perf_counter()
        steps[name]()
        first[name] = round(time.perf_counter() - started, 2)
    seconds = rounds(steps, FLAGS.rounds, warm_up=1)
    base = seconds[next(iter(arms))]
    figures = {name: {"first_step_seconds": first[name], **timing(own, base)} for name, own in seconds.items()}
    compared = "penalties" if FLAGS.alone else FLAGS.compare
    precision = FLAGS.precision + "_xla" * FLAGS.jit_compile
    name = f"{compared}-{kind()}-{FLAGS.image_size}-{FLAGS.batch_size}-{precision}-{device()}.json"
    path = pathlib.Path(FLAGS.results, name)
    write_result(path, rounds=FLAGS.rounds, seed=SEED, arms=figures)
    for name, arm in figures.items():
        low, median, high = arm["ratio_quartiles"]
        print(f"{name}: {1000 * arm['median_seconds']:.3g} ms, {median:.3f} ({low:.3f} to {high:.3f}) times {next(iter(arms))}")


if __name__ == "__main__":
    app.run(main)
