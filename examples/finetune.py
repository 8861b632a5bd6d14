"""Fine-tuning a model of keras.applications with the orthonormal penalty, beside the same fine-tuning without it.

python -m examples.finetune                        from a clone; half a minute on two cores, no download
python -m examples.finetune --weights=imagenet     from the weights that Keras downloads

MobileNet on scikit-learn's digits, enlarged to 32x32. A short training first; its weights are then fine-tuned twice, with the
same data, steps, rate and seed: as they are, and after `orthonormalize`. One seed: a few images more or fewer are chance.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's notes on what its build could do

import keras
import numpy as np
from absl import app, flags
from sklearn.datasets import load_digits

import ortho_keras

FLAGS = flags.FLAGS
flags.DEFINE_enum("weights", None, ["imagenet"], "The weights to begin with; by default random ones, without a download.")
flags.DEFINE_float("factor", 0.1, "The penalty's factor.", lower_bound=0)
flags.DEFINE_integer("epochs", 10, "Epochs of each fine-tuning.", lower_bound=1)

FIRST_EPOCHS, RATE, BATCH, TRAINING = 4, 0.01, 48, 1437


def build(weights=None):
    body = keras.applications.MobileNet((32, 32, 3), alpha=0.25, include_top=False, weights=weights, pooling="avg")
    return keras.Sequential([body, keras.layers.Dense(10, activation="softmax")])


def train(model, estimator, optimizer, epochs, x, y):
    """Returns how many test images are right."""
    keras.utils.set_random_seed(1)  # the same order of images each time
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.fit(x[:TRAINING], y[:TRAINING], batch_size=BATCH, epochs=epochs, verbose=0)
    # So few steps leave BatchNormalization's averages far behind the weights.
    estimator(x[at : at + BATCH] for at in range(0, TRAINING, BATCH))
    return int(np.sum(np.argmax(model(x[TRAINING:]), -1) == y[TRAINING:]))


def median_error(model, report):
    """Returns the median over the kernels that `orthonormalize` covered of the largest entry of |W'W - I|."""
    weights = {variable.path: variable for variable in model.variables}
    kernels = [(weights[kernel.path], kernel.regularizer) for kernel in report.covered]
    return float(np.median([ortho_keras.orthonormality_error(w, r.layout, r.groups) for w, r in kernels]))


def main(_):
    digits, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    images = keras.ops.image.resize(digits[order].reshape(-1, 8, 8, 1) / 8 - 1, (32, 32))
    x, y = np.repeat(images, 3, axis=-1).astype("float32"), y[order]

    keras.utils.set_random_seed(0)
    try:
        model = build(FLAGS.weights)
    except Exception as error:  # Keras's downloader and its file readers raise many
        raise SystemExit(f"finetune: --weights={FLAGS.weights} cannot be had: {error}") from error
    estimator = ortho_keras.BatchNormalizationEstimator(model)
    right = train(model, estimator, keras.optimizers.Adam(0.002), FIRST_EPOCHS, x, y)
    print(f"{FIRST_EPOCHS} epochs on {TRAINING} digits first: {right} of {len(y) - TRAINING} test images are right.")

    start, ends = model.get_weights(), []
    for name, factor in (("without", 0.0), ("with", FLAGS.factor)):  # a factor of 0 is no penalty
        model.set_weights(start)
        report = ortho_keras.orthonormalize(model, factor, verbose=False)
        before = median_error(model, report)
        right = train(model, estimator, keras.optimizers.SGD(RATE, momentum=0.9), FLAGS.epochs, x, y)
        ends.append((right, median_error(model, report)))
        print(
            f"{FLAGS.epochs} epochs {name} the penalty: {right} are right; the largest |W'W - I|, median of "
            f"{len(report.covered)} kernels, from {before:.3f} to {ends[-1][1]:.3f}."
        )
    (right_without, without), (right_with, within) = ends
    gain = right_with - right_without
    told = f"{abs(gain)} images {'more' if gain > 0 else 'fewer'}" if gain else "as many images"
    print(f"With the penalty kernels end {without / within:.1f} times nearer to orthonormal, and {told} are right.")


if __name__ == "__main__":
    app.run(main)
