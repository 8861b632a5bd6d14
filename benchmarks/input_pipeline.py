"""Images a second of the input pipeline alone, against what a training step of a plain net (44 layers) takes.

python benchmarks/input_pipeline.py --images=50000 --files=4000

Random pixels of CIFAR-10's shape, and a folder of JPEG files, which is decoded once, into memory, before the first step.
Batches of 128 with crop and flip, as the recipes have them; the pipeline and the training step take turns, each alone with all
cores. Goes to `results/input_pipeline/plain<depth>-cores<cores>.json`.
"""

import pathlib
import tempfile
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from arms import SEED, plain_net, training_step
from measured import write_result
from runs import ROOT, ratio_quartiles

from ortho_keras import OrthonormalRegularizer
from ortho_keras.trainer.data import BatchSettings, MemorySplit, load_data, training_batches
from ortho_keras.trainer.runtime import cpu_cores

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "input_pipeline"
BATCH, SIZE = 128, 32

flags.DEFINE_integer("depth", 44, "Layers of the plain net whose step it feeds.", lower_bound=8)
flags.DEFINE_integer("images", 50_000, "Images in memory.", lower_bound=BATCH)
flags.DEFINE_integer("files", 4000, "JPEG files, of 32 x 32 pixels.", lower_bound=2 * BATCH)
flags.DEFINE_integer("batches", 100, "Batches of each measurement.", lower_bound=2)
flags.DEFINE_integer("repeats", 5, "Measurements.", lower_bound=1)
flags.DEFINE_string("results", str(RESULTS), "Folder of the result file.")


def pipeline_rate(split):
    """Images a second of the pipeline alone, from its second batch on."""
    settings = BatchSettings(BATCH, "crop_flip", SEED, mean=split.images.mean((0, 1, 2)))
    batches = iter(training_batches(split, settings, stop=FLAGS.batches + 1))
    next(batches)
    started = time.perf_counter()
    count = sum(len(labels) for _, labels in batches)
    return count / (time.perf_counter() - started)


def step_rate(step, split):
    """Images a second of training steps on one batch."""
    images, labels = next(iter(training_batches(split, BatchSettings(BATCH, seed=SEED))))
    step(images, labels)
    started, count = time.perf_counter(), 5
    for _ in range(count):
        step(images, labels)
    return count * BATCH / (time.perf_counter() - started)


def decoding_rate(folder):
    """Files a second that `load_data` reads and decodes."""
    rng = np.random.default_rng(SEED)
    for number in range(FLAGS.files):
        low = rng.integers(256, size=(SIZE // 4, SIZE // 4, 3)).astype("uint8")
        image = tf.cast(tf.image.resize(low, (SIZE, SIZE)), tf.uint8)  # smooth, as photographs are
        path = pathlib.Path(folder, f"class{number % 10}", f"{number}.jpg")
        path.parent.mkdir(exist_ok=True)
        tf.io.write_file(str(path), tf.io.encode_jpeg(image))
    started = time.perf_counter()
    data = load_data(f"folder:{folder}")
    return FLAGS.files / (time.perf_counter() - started), data.train


def main(_):
    rng = np.random.default_rng(SEED)
    pixels = rng.integers(256, size=(FLAGS.images, SIZE, SIZE, 3), dtype=np.uint8)
    memory = MemorySplit(pixels, rng.integers(10, size=FLAGS.images))
    with tempfile.TemporaryDirectory() as folder:
        decoded, files = decoding_rate(folder)
    rates = {f"{name}, {precision}": [] for name in ("memory", "folder") for precision in ("float32", "mixed_bfloat16")}
    for precision in ("float32", "mixed_bfloat16"):
        keras.config.set_dtype_policy(precision)
        step = training_step(plain_net(FLAGS.depth, (SIZE, SIZE, 3))(OrthonormalRegularizer()))
        for _ in range(FLAGS.repeats):
            for name, split in (("memory", memory), ("folder", files)):
                rates[f"{name}, {precision}"].append((pipeline_rate(split), step_rate(step, split)))
    figures = {}
    for name, pairs in rates.items():
        pipeline, trained = np.array(pairs).T
        figures[name] = {
            "pipeline_images_per_second": round(float(np.median(pipeline)), 2),
            "step_images_per_second": round(float(np.median(trained)), 2),
            "ratio_quartiles": ratio_quartiles(pipeline, trained),
        }
        print(name, figures[name], flush=True)
    path = pathlib.Path(FLAGS.results, f"plain{FLAGS.depth}-cores{cpu_cores()}.json")
    write_result(path, files_decoded_per_second=round(decoded), pipelines=figures)


if __name__ == "__main__":
    app.run(main)
