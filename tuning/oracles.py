"""keras-tuner's oracles, which choose the trials, made to go on after a kill and to agree over processes."""

import itertools
import os

import keras_tuner
from keras_tuner.engine import trial as trials
from keras_tuner.src.engine.stateful import Stateful

from ortho_keras.files import whole_file

OBJECTIVE = keras_tuner.Objective("validation_accuracy", "max")
NO_LIMIT = 10**9


class _Lasting:
    """What all oracles here add: files that are whole, exact values, and no end because trials failed.

    keras-tuner 1.4.8 writes its files in place, sends values between processes as float32 (with which a worker's trial would
    overwrite the oracle's own), and gives up after three failed trials in a row.
    """

    def save(self):
        with whole_file(self._get_oracle_fname()) as own:
            Stateful.save(self, str(own))

    def _save_trial(self, trial):
        with whole_file(os.path.join(self._get_trial_dir(trial.trial_id), "trial.json")) as own:
            trial.save(str(own))

    @keras_tuner.synchronized
    def end_trial(self, trial):
        trial.hyperparameters = self.trials[trial.trial_id].hyperparameters
        super().end_trial(trial)


class _DefaultsFirst(_Lasting):
    """The first trial is the recipe itself, so that a search says what it gained."""

    def populate_space(self, trial_id):
        if self.trials:
            return super().populate_space(trial_id)
        space = self.get_space()
        values = {hp.name: hp.default for hp in space.space if space.is_active(hp)}
        return {"status": trials.TrialStatus.RUNNING, "values": values}


class RandomSearch(_DefaultsFirst, keras_tuner.oracles.RandomSearchOracle):
    """Independent samples."""


class BayesianOptimization(_DefaultsFirst, keras_tuner.oracles.BayesianOptimizationOracle):
    """A Gaussian process over the trials so far; independent samples at first."""


class Hyperband(_Lasting, keras_tuner.oracles.HyperbandOracle):
    """Many short trials, of which the best are run again and longer (Li et al. 2018)."""


class Grid(_Lasting, keras_tuner.oracles.GridSearchOracle):
    """Every combination in turn, the recipe's own first; a range is ten values.

    The k-th trial is the k-th combination. (keras-tuner's own order is in no file: a search that goes on ends at once.)
    """

    def populate_space(self, trial_id):
        for values in itertools.islice(self._combinations(), len(self.trials), None):
            return {"status": trials.TrialStatus.RUNNING, "values": values}
        return {"status": trials.TrialStatus.STOPPED, "values": None}

    def _combinations(self):
        space = self.get_space()
        every = [[hp.default, *sorted(value for value in hp.values if value != hp.default)] for hp in space.space]
        seen = set()
        for combination in itertools.product(*every):
            space.values = {hp.name: value for hp, value in zip(space.space, combination)}
            active = {hp.name: space.values[hp.name] for hp in space.space if space.is_active(hp)}
            key = tuple(active.items())
            if key not in seen:
                seen.add(key)
                yield active


def make_oracle(tuner, hyperparameters, max_trials, seed, max_epochs):
    """Returns the oracle of a `--tuner`."""
    common = {
        "objective": OBJECTIVE,
        "hyperparameters": hyperparameters,
        "allow_new_entries": False,
        "seed": seed + 1,  # 0 would be taken for none
        "max_consecutive_failed_trials": NO_LIMIT,
    }
    if tuner == "hyperband":
        oracle = Hyperband(max_epochs=max_epochs, **common)
        oracle.max_trials = max_trials
    else:
        oracle = TUNERS[tuner](max_trials=max_trials, **common)
    oracle.verbose = 0
    return oracle


TUNERS = {"hyperband": Hyperband, "bayesian": BayesianOptimization, "random": RandomSearch, "grid": Grid}
