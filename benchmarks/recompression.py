"""What a lossy copy of a data set costs: one net on its images as they are, and on the same compressed as JPEG once more.

python benchmarks/recompression.py --seeds=0,1 --data_dir=PATH

The copy of CIFAR-10 behind the figures here was re-encoded as JPEG: quality 75, colour at half the resolution. What that
cost cannot be measured without the original images, but a second compression of the same strength can. Its blocks are
displaced against the first one's, which would otherwise round to what is there already. Goes to
`results/recompression/<arm>-seed<seed>.json`.
"""

import math
import pathlib
import shutil

import numpy as np
import tensorflow as tf
from absl import app, flags
from measured import write_result
from runs import ROOT, run_to_file

from ortho_keras.data import load_data

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "recompression"
QUALITY = 75
DISPLACED = 5  # pixels; odd, so that the pairs whose colours are averaged differ too

flags.DEFINE_string("dataset", "cifar10", "A TFDS set of small images.")
flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data; by default TFDS's own.")
flags.DEFINE_integer("depth", 20, "Layers of the net, which else is plain44_cifar10_fast's.", lower_bound=8)
flags.DEFINE_integer("epochs", 6, "Epochs of a run.", lower_bound=1)
flags.DEFINE_list("seeds", ["0"], "Seeds to run each arm with.")
flags.DEFINE_string("results", str(RESULTS), "Folder of the result files.")
flags.DEFINE_string("runs", "runs/recompression", "Folder for images and runs; what is there already is taken up.")


def compressed(image):
    """Returns an image, uint8 `(height, width, 3)`, after JPEG whose blocks begin `DISPLACED` pixels above and left of it."""
    bordered = np.pad(image, [(DISPLACED, 0), (DISPLACED, 0), (0, 0)], mode="symmetric")
    encoded = tf.io.encode_jpeg(bordered, quality=QUALITY, chroma_downsampling=True)
    return tf.io.decode_jpeg(encoded).numpy()[DISPLACED:, DISPLACED:]


ARMS = {"once": lambda image: image, "twice": compressed}  # how often the images were compressed


def write_images(data, folder, change):
    """Writes a data set's images, changed, into class folders as PNG. Returns the mean of the squared changes."""
    squares = []
    for split in ("train", "test"):
        images, labels = getattr(data, split).images, getattr(data, split).labels
        for name in data.class_names:
            (folder / split / name).mkdir(parents=True)
        for index, (image, label) in enumerate(zip(images, labels)):
            changed = change(image)
            squares.append(np.mean(np.square(changed - image.astype(np.float64))))
            path = folder / split / data.class_names[label] / f"{index:05d}.png"
            path.write_bytes(tf.io.encode_png(changed).numpy())
    return float(np.mean(squares))


def main(_):
    results, runs = pathlib.Path(FLAGS.results), pathlib.Path(FLAGS.runs)
    data = None
    for arm, change in ARMS.items():
        if not (runs / arm).exists():
            data = data or load_data(FLAGS.dataset, FLAGS.data_dir, hold_out=False)
            half_done = runs / f"{arm}.part"
            shutil.rmtree(half_done, ignore_errors=True)
            square = write_images(data, half_done, change)
            if square:
                write_result(results / f"{arm}-images.json", signal_to_noise_db=10 * math.log10(255**2 / square))
            half_done.rename(runs / arm)
    for seed in FLAGS.seeds:
        for arm in ARMS:
            values = [f"--dataset=folder:{runs / arm}", f"--depth={FLAGS.depth}", f"--epochs={FLAGS.epochs}", f"--seed={seed}"]
            path = results / f"{arm}-seed{seed}.json"
            run_to_file(["--recipe=plain44_cifar10_fast", *values], path, (runs / path.stem).absolute())
            print(path, flush=True)


if __name__ == "__main__":
    app.run(main)
