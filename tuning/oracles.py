"""keras-tuner's oracles, which choose the trials, made to survive a kill and to agree across processes."""

import itertools
import os
import pathlib
import warnings

import keras_tuner
from keras_tuner.engine.trial import TrialStatus
from keras_tuner.src.engine.stateful import Stateful
from sklearn.exceptions import ConvergenceWarning

from ortho_keras.method.errors import InputError, first_line
from ortho_keras.method.files import read_json, whole_file

ORACLE = {"ongoing_trials": {str: str}, "hyperparameters": dict, "display": dict, "seed": int, "seed_state": int}
ORACLE |= {"id_to_hash": dict, "run_times": {str: int}}
ORACLE |= {name: [str] for name in ("start_order", "end_order", "retry_queue", "tried_so_far")}
TRIAL = {"trial_id": str, "hyperparameters": dict, "metrics": dict, "score": (float, type(None)), "status": str}
OBJECTIVE = keras_tuner.Objective("validation_accuracy", "max")


class _Lasting:
    """Writes complete files, keeps ended trials ended, and never gives up because trials failed.

    keras-tuner 1.4.8 writes its files in place, one after the other, leaves the last trial among the ongoing ones in them, and
    gives up after three failed trials in a row.
    """

    def save(self):
        with whole_file(self._get_oracle_fname()) as own:
            Stateful.save(self, str(own))

    def _save_trial(self, trial):
        with whole_file(os.path.join(self._get_trial_dir(trial.trial_id), "trial.json")) as own:
            trial.save(str(own))

    @keras_tuner.synchronized
    def end_trial(self, trial):
        super().end_trial(trial)
        self.save()  # now that the trial is no longer among the ongoing ones

    def reload(self):
        folder, expected = pathlib.Path(self._project_dir), "the files of a search must be whole"
        for path in (folder / "oracle.json", *folder.glob("trial_*/trial.json")):
            read_json(path, ORACLE if path.parent == folder else TRIAL, expected)
        try:
            super().reload()
            lost = {*self.start_order, *self.end_order, *self._retry_queue} - set(self.trials)
            if lost:
                raise ValueError(f"no trial.json for {', '.join(sorted(lost))}")
        except Exception as error:  # keras-tuner does not check what it reads
            reason = f"{type(error.__cause__ or error).__name__}: {first_line(error.__cause__ or error)}"
            raise InputError(f"{expected}. Received: {str(folder)!r} ({reason})") from error
        for number in set(self.trials) - set(self.start_order):
            del self.trials[number]  # killed before the oracle's own file was written: it will be chosen again
        self._retry_queue = [number for number in self._retry_queue if self.trials[number].status == TrialStatus.RUNNING]


class _DefaultsFirst(_Lasting):
    """The first trial is the recipe itself, so that a search shows what it gained."""

    def populate_space(self, trial_id):
        if self.trials:
            return super().populate_space(trial_id)
        space = self.get_space()
        values = {hp.name: hp.default for hp in space.space if space.is_active(hp)}
        return {"status": TrialStatus.RUNNING, "values": values}


class RandomSearch(_DefaultsFirst, keras_tuner.oracles.RandomSearchOracle):
    """Independent samples."""


class BayesianOptimization(_DefaultsFirst, keras_tuner.oracles.BayesianOptimizationOracle):
    """A Gaussian process over the trials so far; independent samples at first."""

    def populate_space(self, trial_id):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # few trials do not determine every length scale
            return super().populate_space(trial_id)


class Hyperband(_Lasting, keras_tuner.oracles.HyperbandOracle):
    """Many short trials, the best of which are repeated for longer (Li et al. 2018).

    Starts with the bracket of the shortest trials that `max_trials` can complete. A failed trial counts as the worst:
    keras-tuner would wait for a replacement, and end the bracket early.
    """

    def __init__(self, max_trials, **arguments):
        super().__init__(**arguments)
        self.max_trials = max_trials
        fitting = [bracket for bracket in range(self._get_num_brackets()) if self._trials_in(bracket) <= max_trials]
        self._current_bracket, self._brackets = max(fitting, default=0), []
        self._start_new_bracket()

    def _trials_in(self, bracket):
        return sum(self._get_size(bracket, number) for number in range(self._get_num_rounds(bracket)))

    @keras_tuner.synchronized
    def end_trial(self, trial):
        if trial.status in (TrialStatus.FAILED, TrialStatus.INVALID):
            self.update_trial(trial.trial_id, {OBJECTIVE.name: 0.0})
            trial.status = TrialStatus.COMPLETED
        super().end_trial(trial)


class Grid(_Lasting, keras_tuner.oracles.GridSearchOracle):
    """Every combination in turn, the recipe's own first; a range has ten values.

    The k-th trial is the k-th combination. (keras-tuner does not save its own order, so that a resumed search ends at once.)
    """

    def populate_space(self, trial_id):
        for values in itertools.islice(self._combinations(), len(self.trials), None):
            return {"status": TrialStatus.RUNNING, "values": values}
        return {"status": TrialStatus.STOPPED, "values": None}

    def _combinations(self):
        space, seen = self.get_space(), set()
        every = [[hp.default, *sorted(value for value in hp.values if value != hp.default)] for hp in space.space]
        for combination in itertools.product(*every):
            space.values = {hp.name: value for hp, value in zip(space.space, combination)}
            active = {hp.name: space.values[hp.name] for hp in space.space if space.is_active(hp)}
            key = tuple(active.items())
            if key not in seen:
                seen.add(key)
                yield active


TUNERS = {"hyperband": Hyperband, "bayesian": BayesianOptimization, "random": RandomSearch, "grid": Grid}


def make_oracle(tuner, hyperparameters, max_trials, seed, max_epochs):
    """Returns the oracle of a `--tuner`."""
    arguments = {
        "objective": OBJECTIVE,
        "max_trials": max_trials,
        "hyperparameters": hyperparameters,
        "allow_new_entries": False,
        "seed": seed + 1,  # keras-tuner takes 0 for None
        "max_consecutive_failed_trials": 10**9,
    }
    if tuner == "hyperband":
        arguments["max_epochs"] = max_epochs
    if tuner == "bayesian":  # keras-tuner's default makes most trials of a small search random
        arguments["num_initial_points"] = max(4, min(max_trials // 3, 3 * len(hyperparameters.space)))
    oracle = TUNERS[tuner](**arguments)
    oracle.verbose = 0
    return oracle
