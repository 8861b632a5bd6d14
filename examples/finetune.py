"""Fine-tuning a model of keras.applications with and without the orthonormal penalty.

python -m examples.finetune                        from a clone; about a minute on two cores, no download
python -m examples.finetune --weights=imagenet     starts from the weights that Keras downloads

MobileNet is first trained on scikit-learn's digits, enlarged to 32x32. It is then fine-tuned three times without and three
times with the penalty, from the same weights; a seed sets the order of the images. The example shows that the penalty makes
the kernels orthonormal; over three seeds it does not raise accuracy beyond its spread.
"""

import ortho_keras  # first: it leaves out TensorFlow's notes

# isort: split
import keras
import numpy as np
from absl import app, flags
from sklearn.datasets import load_digits

FLAGS = flags.FLAGS
flags.DEFINE_enum("weights", None, ["imagenet"], "Initial weights; by default random ones, without a download.")
flags.DEFINE_float("factor", 0.1, "The penalty's factor.", lower_bound=0)
flags.DEFINE_integer("epochs", 10, "Epochs of each fine-tuning.", lower_bound=1)

FIRST_EPOCHS, RATE, BATCH, TRAINING, SEEDS = 4, 0.01, 48, 1437, (0, 1, 2)


def build(weights=None):
    body = keras.applications.MobileNet((32, 32, 3), alpha=0.25, include_top=False, weights=weights, pooling="avg")
    return keras.Sequential([body, keras.layers.Dense(10, activation="softmax")])


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
    loss = "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.Adam(0.002), loss, jit_compile=False)  # XLA's compilation takes longer than so few steps
    model.fit(x[:TRAINING], y[:TRAINING], batch_size=BATCH, epochs=FIRST_EPOCHS, verbose=0)

    report = ortho_keras.orthonormalize(model, FLAGS.factor, verbose=False)
    estimator = ortho_keras.BatchNormalizationEstimator(model)
    optimizer = keras.optimizers.SGD(RATE, momentum=0.9)
    model.compile(optimizer, loss, jit_compile=False)
    optimizer.build(model.trainable_variables)
    start, momenta = model.get_weights(), [variable.numpy() for variable in optimizer.variables]
    print(f"{len(report.covered)} kernels; the largest |W'W - I| is {median_error(model, report):.3f} (median) at the start.")
    results = {"without": [], "with": []}
    for seed in SEEDS:
        for name, ends in results.items():
            for regularizer in report.regularizers:
                regularizer.factor = FLAGS.factor if name == "with" else 0  # takes effect without a new trace
            model.set_weights(start)
            for variable, value in zip(optimizer.variables, momenta):
                variable.assign(value)
            keras.utils.set_random_seed(seed)
            model.fit(x[:TRAINING], y[:TRAINING], batch_size=BATCH, epochs=FLAGS.epochs, verbose=0)
            # After so few steps, BatchNormalization's moving averages lag far behind the weights.
            estimator(x[at : at + BATCH] for at in range(0, TRAINING, BATCH))
            accuracy = 100 * np.mean(np.argmax(model(x[TRAINING:]), -1) == y[TRAINING:])
            ends.append((accuracy, median_error(model, report)))
            print(f"seed {seed}, {name} the penalty: test accuracy {accuracy:.1f} %, |W'W - I| {ends[-1][1]:.3f}", flush=True)
    for name, ends in results.items():
        accuracies, errors = zip(*ends)
        print(
            f"{name.capitalize()} the penalty: test accuracy {np.mean(accuracies):.1f} +- {np.std(accuracies, ddof=1):.1f} % "
            f"over {len(SEEDS)} seeds, |W'W - I| {np.mean(errors):.3f}"
        )


if __name__ == "__main__":
    app.run(main)
