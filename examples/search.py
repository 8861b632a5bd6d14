"""A search by keras-tuner over the method's values, in a model and a training loop of one's own.

python -m examples.search                  from a clone; about a minute on two cores
python -m examples.search --max_trials=30

A plain net of 26 layers on scikit-learn's digits: the penalty's factor, modulation's rule and the learning rate. Trials are
judged by validation accuracy, not by `val_loss`, which holds the penalty. `tuning/` is the same for train.py's recipes, with
much more to it.
"""

import os
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's notes on what its build could do

import keras
import keras_tuner
import numpy as np
from absl import app, flags
from sklearn.datasets import load_digits

import ortho_keras

FLAGS = flags.FLAGS
flags.DEFINE_integer("max_trials", 6, "Trials.", lower_bound=2)
flags.DEFINE_integer("epochs", 4, "Epochs of each trial.", lower_bound=1)

LAYERS, WIDTH, BATCH, TRAINING = 26, 16, 50, 1200
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def declare(hp):
    """The space."""
    hp.Float("learning_rate", 1e-3, 1e-1, sampling="log")
    hp.Float("factor", 1e-4, 1.0, sampling="log")
    hp.Choice("modulation", ["off", "neighbour", "anchor"])
    with hp.conditional_scope("modulation", ["neighbour", "anchor"]):
        hp.Choice("tolerance", [1.1, 2.0, 4.0])


def build(hp):
    """Returns the net and what trains it: the same layers, with modulation where it is on."""
    penalty = ortho_keras.OrthonormalRegularizer(hp.get("factor"))
    model = keras.Sequential([keras.Input((8, 8, 1))])
    for _ in range(LAYERS - 1):
        start = ortho_keras.OrthonormalInitializer()
        model.add(
            keras.layers.Conv2D(WIDTH, 3, padding="same", use_bias=False, kernel_initializer=start, kernel_regularizer=penalty)
        )
        model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.ReLU())
    model.add(keras.layers.GlobalAveragePooling2D())
    model.add(keras.layers.Dense(10))
    if hp.get("modulation") == "off":
        return model, model
    convolutions = [layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    rule = {"tolerance": hp.get("tolerance"), "reference": hp.get("modulation")}
    return model, ortho_keras.modulate(model, **rule, layers=convolutions)


class Search(keras_tuner.RandomSearch):  # BayesianOptimization and Hyperband are used in the same way
    def run_trial(self, trial, x, y, verbose):
        keras.backend.clear_session()
        keras.utils.set_random_seed(0)
        model, trained = build(trial.hyperparameters)
        trained.compile(keras.optimizers.SGD(trial.hyperparameters.get("learning_rate"), momentum=0.9), LOSS)
        trained.fit(x[:TRAINING], y[:TRAINING], batch_size=BATCH, epochs=FLAGS.epochs, verbose=verbose)
        # So few steps leave BatchNormalization's averages far behind the weights.
        ortho_keras.BatchNormalizationEstimator(model)(x[at : at + BATCH] for at in range(0, TRAINING, BATCH))
        accuracy = float(np.mean(np.argmax(model(x[TRAINING:]), -1) == y[TRAINING:]))
        print(f"trial {int(trial.trial_id) + 1} of {FLAGS.max_trials}: {accuracy:.3f} with {told(trial)}", flush=True)
        return {"val_accuracy": accuracy}


def told(trial):
    values = trial.hyperparameters.values
    return ", ".join(f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items())


def main(_):
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = (x[order].reshape(-1, 8, 8, 1) / 16).astype("float32"), y[order]
    hp = keras_tuner.HyperParameters()
    declare(hp)
    with tempfile.TemporaryDirectory() as folder:  # one that stays lets a search go on where it was stopped
        tuner = Search(
            hyperparameters=hp,
            objective=keras_tuner.Objective("val_accuracy", "max"),
            max_trials=FLAGS.max_trials,
            seed=1,  # keras-tuner takes 0 for none
            directory=folder,
        )
        tuner.search(x, y, verbose=0)
        trials = [trial for trial in tuner.oracle.get_best_trials(FLAGS.max_trials) if trial.score is not None]
    best = trials[0]
    print(f"The best of {len(trials)} trials: {best.score:.3f} of the validation images are right with {told(best)}.")
    off = best.hyperparameters.get("modulation") == "off"
    other = next((trial for trial in trials if (trial.hyperparameters.get("modulation") == "off") != off), None)
    if other:
        print(f"The best {'with' if off else 'without'} modulation: {other.score:.3f} with {told(other)}.")


if __name__ == "__main__":
    app.run(main)
