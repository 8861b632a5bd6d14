"""A search by keras-tuner over the method's values, in a custom model and training loop.

python -m examples.search                  from a clone; one to two minutes on two cores
python -m examples.search --max_trials=30

The model is a plain net of 32 layers for scikit-learn's digits. The search chooses the penalty's factor, modulation and the
learning rate by validation accuracy, not by `val_loss`, which includes the penalty. The best trial of six is partly luck, so
the best one with modulation and the best one without are trained again with three other seeds: expect no clear difference.
`tuning/` searches the recipes of train.py in the same way, with many more options.
"""

import tempfile

import ortho_keras  # first: it leaves out TensorFlow's notes

# isort: split
import keras
import keras_tuner
import numpy as np
from absl import app, flags
from sklearn.datasets import load_digits

FLAGS = flags.FLAGS
flags.DEFINE_integer("max_trials", 6, "Trials.", lower_bound=2)
flags.DEFINE_integer("epochs", 5, "Epochs of each trial.", lower_bound=1)

LAYERS, WIDTH, BATCH, TRAINING, SEEDS = 32, 8, 50, 1200, (1, 2, 3)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def declare(hp):
    """The search space."""
    hp.Float("learning_rate", 1e-3, 1e-1, sampling="log")
    hp.Float("factor", 1e-4, 1.0, sampling="log")
    hp.Choice("modulation", ["off", "anchor"])
    with hp.conditional_scope("modulation", ["anchor"]):
        hp.Choice("tolerance", [1.1, 2.0, 4.0])


def build(hp):
    """Returns the net, and the model to train: the same layers, with modulation where it is on."""
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


def train(hp, x, y, seed):
    """Returns the validation accuracy."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    model, trained = build(hp)
    optimizer = keras.optimizers.SGD(hp.get("learning_rate"), momentum=0.9)
    trained.compile(optimizer, LOSS, jit_compile=False)  # XLA's compilation takes longer than so few steps
    trained.fit(x[:TRAINING], y[:TRAINING], batch_size=BATCH, epochs=FLAGS.epochs, verbose=0)
    # After so few steps, BatchNormalization's moving averages lag far behind the weights.
    ortho_keras.BatchNormalizationEstimator(model)(x[at : at + BATCH] for at in range(0, TRAINING, BATCH))
    return float(np.mean(np.argmax(model(x[TRAINING:]), -1) == y[TRAINING:]))


class Search(keras_tuner.RandomSearch):  # BayesianOptimization and Hyperband are used in the same way
    def run_trial(self, trial, x, y, verbose):
        accuracy = train(trial.hyperparameters, x, y, seed=0)
        print(f"trial {int(trial.trial_id) + 1} of {FLAGS.max_trials}: {accuracy:.3f} with {shown(trial)}", flush=True)
        return {"val_accuracy": accuracy}


def shown(trial):
    values = trial.hyperparameters.values
    return ", ".join(f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items())


def main(_):
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = (x[order].reshape(-1, 8, 8, 1) / 16).astype("float32"), y[order]
    hp = keras_tuner.HyperParameters()
    declare(hp)
    with tempfile.TemporaryDirectory() as folder:  # a permanent one lets a stopped search resume
        tuner = Search(
            hyperparameters=hp,
            objective=keras_tuner.Objective("val_accuracy", "max"),
            max_trials=FLAGS.max_trials,
            seed=1,  # keras-tuner reads 0 as no seed
            directory=folder,
        )
        tuner.search(x, y, verbose=0)
        trials = [trial for trial in tuner.oracle.get_best_trials(FLAGS.max_trials) if trial.score is not None]
    print(f"Best of {len(trials)} trials: validation accuracy {trials[0].score:.3f} with {shown(trials[0])}.")
    for rule in ("off", "anchor"):
        best = next((trial for trial in trials if trial.hyperparameters.get("modulation") == rule), None)
        if best is None:
            print(f"Modulation {rule}: no trial.")
            continue
        again = [train(best.hyperparameters, x, y, seed) for seed in SEEDS]
        print(
            f"Modulation {rule}, its best trial with {len(SEEDS)} other seeds: "
            f"{np.mean(again):.3f} +- {np.std(again, ddof=1):.3f} with {shown(best)}",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
