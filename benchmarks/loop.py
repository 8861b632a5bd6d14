"""Images a second of the training loop, over those of the same steps in one call of a graph, and over Keras's `fit`.

python benchmarks/loop.py --depth=8 --image_size=8 --batch_size=16 --images=1280

Three models of one recipe train on random pixels in one process, an epoch each in turn. The ratio is that of the loop to
another in the same round; its median and quartiles go to `results/loop/plain<depth>-<size>-<batch>-<device>.json`. What a
run does between epochs (checkpoints, evaluations, plots) is not counted.
"""

import pathlib
import tempfile
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from arms import SEED
from measured import device, write_result
from runs import ROOT, ratio_quartiles

from ortho_keras.trainer.build import compiled_model
from ortho_keras.trainer.data import BatchSettings, ImageData, MemorySplit, training_batches
from ortho_keras.trainer.loop import Trainer
from ortho_keras.trainer.recipe import Recipe
from ortho_keras.trainer.runtime import Runtime
from ortho_keras.trainer.steps import train_function

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "loop"

flags.DEFINE_integer("depth", 8, "Layers of the plain net.", lower_bound=8)
flags.DEFINE_integer("image_size", 8, "Pixels a side.", lower_bound=1)
flags.DEFINE_integer("batch_size", 16, "Images a step.", lower_bound=1)
flags.DEFINE_integer("images", 1280, "Images of an epoch.", lower_bound=1)
flags.DEFINE_integer("rounds", 10, "Epochs of each that count.", lower_bound=1)
flags.DEFINE_string("results", str(RESULTS), "Folder of the result file.")


class Rivals(keras.callbacks.Callback):
    """Trains each rival for an epoch before each of the loop's; `seconds` are those of their epochs."""

    def __init__(self, rivals):
        super().__init__()
        self.rivals, self.seconds = rivals, {name: [] for name in rivals}

    def on_epoch_begin(self, epoch, logs=None):
        for name, train in self.rivals.items():
            started = time.perf_counter()
            train()
            self.seconds[name].append(time.perf_counter() - started)


def main(_):
    epochs = FLAGS.rounds + 2  # graphs are traced in the first, and the number of steps in a call is found
    recipe = Recipe(
        depth=FLAGS.depth, batch_size=FLAGS.batch_size, factor=0.01, epochs=epochs, bn_batches=0, schedule="constant"
    )
    rng = np.random.default_rng(SEED)
    pixels = rng.integers(256, size=(FLAGS.images, FLAGS.image_size, FLAGS.image_size, 3), dtype=np.uint8)
    split = MemorySplit(pixels, rng.integers(10, size=FLAGS.images))
    data = ImageData(split, None, split, [str(label) for label in range(10)])
    (model, steps), (in_a_graph, _), (fitted, _) = (compiled_model(recipe, data) for _ in range(3))
    settings, per_epoch = BatchSettings(FLAGS.batch_size, seed=SEED), steps // epochs
    in_a_graph.optimizer.build(in_a_graph.trainable_variables)
    graph, batches = train_function(in_a_graph, FLAGS.batch_size, 0.0, Runtime()), iter(training_batches(split, settings))
    dataset = training_batches(split, settings, stop=per_epoch).apply(tf.data.experimental.assert_cardinality(per_epoch))
    rivals = Rivals(
        {
            "one call of a graph for the epoch": lambda: graph(batches, per_epoch, 0.0, 0.0).numpy(),
            "fit": lambda: fitted.fit(dataset, shuffle=False, verbose=0),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, recipe, data, pathlib.Path(folder), steps, callbacks=[rivals], log=lambda line: None)
        own = np.array([row["seconds"] for row in trainer.run()])[2:]
    figures = {}
    for name, seconds in rivals.seconds.items():
        ratios = ratio_quartiles(seconds[2:], own)
        figures[name] = {
            "loop_images_per_second": round(per_epoch * FLAGS.batch_size / float(np.median(own)), 1),
            "ratio_quartiles": ratios,
        }
        print(f"over {name}: {ratios[1]:.3f} ({ratios[0]:.3f} to {ratios[2]:.3f})")
    kind = f"plain{FLAGS.depth}-{FLAGS.image_size}-{FLAGS.batch_size}-{device()}.json"
    write_result(pathlib.Path(FLAGS.results, kind), rounds=FLAGS.rounds, seed=SEED, ratios=figures)


if __name__ == "__main__":
    app.run(main)
