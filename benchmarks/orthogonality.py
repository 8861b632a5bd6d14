"""How orthonormal each penalty leaves a net after the same steps, at several factors, and what the net then knows.

python benchmarks/orthogonality.py --depth=20 --steps=200 --factors=1e-3,1e-2,1e-1,1 --seeds=0,1

Plain nets on digits of 8x8 pixels, the same images, order, start and learning rate for all arms. The residual is the mean of
`||W^T W - I||_F` over all kernels that have no more filters than inputs, for which it can be 0. Goes to
`results/orthogonality/digits<depth>-steps<steps>.json`.
"""

import pathlib

import keras
import numpy as np
from absl import app, flags
from arms import penalty_arms, residual, training_step
from measured import write_result
from runs import ROOT

from ortho_keras import BatchNormalizationEstimator, plain_cnn
from ortho_keras.trainer.data import BatchSettings, load_data, training_batches

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "results" / "orthogonality"
BATCH = 64

flags.DEFINE_integer("depth", 20, "Layers.", lower_bound=8)
flags.DEFINE_integer("steps", 200, "Training steps of 64 images.", lower_bound=1)
flags.DEFINE_list("arms", list(penalty_arms(None)), "Which penalties.")
flags.DEFINE_list("factors", ["1e-3", "1e-2", "1e-1", "1"], "Strengths to train with; L2 takes a hundredth of each.")
flags.DEFINE_list("seeds", ["0", "1"], "Seeds of start and order.")
flags.DEFINE_string("results", str(RESULTS), "Folder of the result file.")


def train(arm, factor, seed, data):
    """Trains an arm's net. Returns `(residual, test accuracy)`; NaNs if its loss did not stay finite."""

    def net(regularizer):
        return plain_cnn(FLAGS.depth, data.image_shape, regularizer=regularizer, relu_shift=1.0, seed=seed)

    model, callbacks = penalty_arms(net, factor)[arm]()
    step = training_step(model, callbacks)

    def batches(count):
        found = training_batches(data.train, BatchSettings(BATCH, seed=seed), stop=count)
        return ((images / 255.0, labels) for images, labels in found)

    for batch in batches(FLAGS.steps):
        if not np.isfinite(step(*batch)):
            return float("nan"), float("nan")
    BatchNormalizationEstimator(model)(images for images, _ in batches(16))
    answers = np.argmax(model(data.test.images / np.float32(255), training=False), -1)
    return residual(model), float(np.mean(answers == data.test.labels))


def main(_):
    data, rows = load_data("digits"), []
    for arm in FLAGS.arms:
        for factor in map(float, FLAGS.factors):
            runs = [train(arm, factor / 100 if arm == "L2" else factor, int(seed), data) for seed in FLAGS.seeds]
            keras.backend.clear_session()
            residuals, accuracies = zip(*runs)
            rows.append({"arm": arm, "factor": factor, "residuals": residuals, "accuracies": accuracies})
            print(f"{arm}, {factor:g}: residual {np.mean(residuals):.4g}, test {100 * np.mean(accuracies):.2f} %", flush=True)
    path = pathlib.Path(FLAGS.results, f"digits{FLAGS.depth}-steps{FLAGS.steps}.json")
    write_result(path, seeds=[int(seed) for seed in FLAGS.seeds], rows=rows)


if __name__ == "__main__":
    app.run(main)
