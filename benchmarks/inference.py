"""Latency and memory of a plain network and its residual counterpart, both with BatchNormalization folded.

python benchmarks/inference.py --depth=44 --batches=1,64 --rounds=200

Latency: each round runs each arm once, in an order that alternates; the ratio is that of an arm to the folded residual net in
the same round. Peak activation memory is counted: the bytes of all tensors that must be kept at the worst moment, when layers
run one after the other and a tensor is dropped after its last use (an activation may overwrite its input).
"""

import json
import math
import pathlib

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from measured import device, write_result
from runs import ROOT, ratio_quartiles, rounds

from ortho_keras import ShiftedReLU, fold_batchnorm, plain_cnn, residual_cnn
from ortho_keras.method.graphs import Graph

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "inference"
SEED = 0
IN_PLACE = (keras.layers.ReLU, ShiftedReLU, keras.layers.BatchNormalization, keras.layers.Add)

flags.DEFINE_integer("depth", 44, "Layers.", lower_bound=8)
flags.DEFINE_integer("image_size", 32, "Pixels a side.", lower_bound=1)
flags.DEFINE_list("batches", ["1", "64"], "Images at a time.")
flags.DEFINE_integer("rounds", 200, "Runs of each arm that count.", lower_bound=1)
flags.DEFINE_string("results", str(RESULTS), "Folder of the result files.")


def arms(shape):
    """Returns `{name: model}`, the one that ratios are taken to first."""
    options = {"initializer": "dirac", "relu_shift": 1.0, "seed": SEED}
    plain, residual = plain_cnn(FLAGS.depth, shape, **options), residual_cnn(FLAGS.depth, shape, **options)
    return {
        "residual, folded": fold_batchnorm(residual),
        "residual": residual,
        "plain": plain,
        "plain, folded": fold_batchnorm(plain),
    }


def peak_bytes(model):
    """The most that a chain of float32 activations for one image takes at any time, in bytes."""
    steps = Graph(model).steps
    taken, sizes = {}, {}
    for number, (_, args, kwargs, outputs) in enumerate(steps):
        for tensor in keras.tree.flatten((args, kwargs)):
            if keras.backend.is_keras_tensor(tensor):
                taken[id(tensor)], sizes[id(tensor)] = number, _bytes(tensor)
        for tensor in outputs:
            sizes[id(tensor)] = _bytes(tensor)
    alive, most = set(), 0
    for number, (layer, args, kwargs, outputs) in enumerate(steps):
        inputs = {id(t) for t in keras.tree.flatten((args, kwargs)) if keras.backend.is_keras_tensor(t)}
        made = {id(tensor) for tensor in outputs}
        alive |= inputs
        last = {key for key in inputs if taken[key] == number}
        overwritten = set(list(last)[:1]) if isinstance(layer, IN_PLACE) else set()
        most = max(most, sum(sizes[key] for key in (alive - overwritten) | made))
        alive = (alive - last) | made
    return most


def _bytes(tensor):
    return 4 * math.prod(tensor.shape[1:])


def latencies(models, batch, shape):
    """Returns `{name: seconds of each round}`."""
    images = tf.constant(np.random.default_rng(SEED).normal(size=(batch, *shape)).astype("float32"))
    graphs = {name: tf.function(lambda x, model=model: model(x, training=False)) for name, model in models.items()}
    return rounds({name: lambda graph=graph: graph(images).numpy() for name, graph in graphs.items()}, FLAGS.rounds, warm_up=5)


def main(_):
    shape = (FLAGS.image_size, FLAGS.image_size, 3)
    models = arms(shape)
    rows = []
    for batch in map(int, FLAGS.batches):
        seconds = latencies(models, batch, shape)
        base = seconds[next(iter(models))]
        for name, model in models.items():
            rows.append(
                {
                    "batch": batch,
                    "arm": name,
                    "median_milliseconds": round(1000 * float(np.median(seconds[name])), 3),
                    "ratio_quartiles": ratio_quartiles(seconds[name], base),
                    "peak_activation_bytes": batch * peak_bytes(model),
                    "parameters": model.count_params(),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    path = pathlib.Path(FLAGS.results, f"{FLAGS.depth}-{FLAGS.image_size}-{device()}.json")
    write_result(path, depth=FLAGS.depth, rounds=FLAGS.rounds, seed=SEED, rows=rows)


if __name__ == "__main__":
    app.run(main)
