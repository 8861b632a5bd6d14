"""Photographs a second that are read from the disk, cropped and decoded, against decoding the whole files.

python benchmarks/photographs.py --files=1280

JPEG files of 500 x 375 pixels in batches of 64 by all cores, from the fifth batch on; the ways take turns. Medians, quartiles
of each rate over that of decoding alone in the same round, go to `results/photographs/cores<cores>.json`.
"""

import pathlib
import tempfile
import time

import numpy as np
import tensorflow as tf
from absl import app, flags
from arms import SEED
from measured import write_result
from runs import ROOT, ratio_quartiles

from ortho_keras.trainer.data import BatchSettings, evaluation_batches, load_data, training_batches
from ortho_keras.trainer.runtime import cpu_cores

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "photographs"
BATCH, HEIGHT, WIDTH = 64, 375, 500
WHOLE = "whole files, decoded"

FIRST = 4  # batches that do not count: the first makes the pipeline, and the next are ready with it

flags.DEFINE_integer("files", 1280, "JPEG files, of which a tenth is cut off as a test split.", lower_bound=2 * FIRST * BATCH)
flags.DEFINE_integer("repeats", 7, "Rounds.", lower_bound=1)
flags.DEFINE_string("results", str(RESULTS), "Folder of the result file.")


def write_files(folder):
    """Smooth, as photographs are, with some noise."""
    rng = np.random.default_rng(SEED)
    for number in range(FLAGS.files):
        low = rng.integers(256, size=(HEIGHT // 16, WIDTH // 16, 3)).astype("uint8")
        image = tf.image.resize(low, (HEIGHT, WIDTH), "bicubic") + rng.normal(0, 6, (HEIGHT, WIDTH, 3))
        path = pathlib.Path(folder, f"class{number % 4}", f"{number}.jpg")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tf.io.encode_jpeg(tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8), quality=90).numpy())


def whole_files(paths, size=0):
    """Batches of whole files, decoded by as many threads as there are cores, and resized to `size` where it is given."""

    def read(path):
        image = tf.io.decode_jpeg(tf.io.read_file(path), 3)
        return tf.image.resize(image, (size, size)) if size else tf.shape(image)

    files = tf.data.Dataset.from_tensor_slices(paths).map(read, num_parallel_calls=cpu_cores())
    return files.batch(BATCH, drop_remainder=True).prefetch(2)


def ways_of(split, paths):
    """Name -> a function that makes the batches of `split`, or of the whole files in the size of its images."""
    size, steps, settings = split.image_shape[0], len(split) // BATCH, BatchSettings(BATCH, "resized_crop", SEED)
    return {
        f"whole files, decoded and resized to {size}": lambda: whole_files(paths, size),
        f"random parts of {size}": lambda: training_batches(split, settings, stop=steps),
        f"central parts of {size}": lambda: evaluation_batches(split, BATCH),
    }


def rate(batches):
    batches = iter(batches)
    for _ in range(FIRST):
        next(batches)
    started = time.perf_counter()
    count = BATCH * sum(1 for _ in batches)
    return count / (time.perf_counter() - started)


def main(_):
    with tempfile.TemporaryDirectory() as folder:
        write_files(folder)
        splits = [load_data(f"folder:{folder}", image_size=size, hold_out=False, storage="disk").train for size in (224, 64)]
        paths = [splits[0].source.paths[number] for number in splits[0].numbers]
        ways = {WHOLE: lambda: whole_files(paths)}
        for split in splits:
            ways |= ways_of(split, paths)
        rates = {way: [] for way in ways}
        for _ in range(FLAGS.repeats):
            for way, batches in ways.items():
                rates[way].append(rate(batches()))
    figures = {}
    for way, found in rates.items():
        figures[way] = {
            "images_per_second": round(float(np.median(found))),
            "ratio_quartiles": ratio_quartiles(found, rates[WHOLE]),
        }
        print(way, figures[way], flush=True)
    write_result(pathlib.Path(FLAGS.results, f"cores{cpu_cores()}.json"), ways=figures)


if __name__ == "__main__":
    app.run(main)
