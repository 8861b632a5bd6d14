"""keras-tuner's loop over trials, each a run of a recipe, and what it says of them."""

import math
import os
import pathlib
import time

from keras_tuner.engine import base_tuner

from tuning import workers
from tuning.hypermodel import SearchStopped
from tuning.trials import FINISHED, RUNNING, best_trial, read_trials


class Search(base_tuner.BaseTuner):
    """Asks an oracle for trials and runs each by `RecipeHyperModel.fit`.

    Args:
        oracle: See `make_oracle`.
        recipe_model: `RecipeHyperModel`.
        directory: Path of the search.
        log: Function that takes a line of progress.
    """

    def __init__(self, oracle, recipe_model, directory, log=print):
        self.recipe_model = recipe_model
        self.log = log
        path = pathlib.Path(directory).absolute()
        super().__init__(oracle, directory=path.parent, project_name=path.name)

    def _get_tuner_fname(self):
        return os.path.join(self.project_dir, "oracle.json")  # the state of a search is its oracle's, whoever runs it

    def save(self):
        if not self._is_worker():
            self.oracle.save()

    def reload(self):
        if not self._is_worker():
            self.oracle.reload()

    def pre_create_trial(self):
        if self.recipe_model.over():
            raise SearchStopped("the search ended between trials")
        time.sleep(0.1)  # an oracle that has nothing to do yet is asked again and again

    def run_trial(self, trial):
        number = int(trial.trial_id) + 1
        return self.recipe_model.fit(trial.hyperparameters, None, self.get_trial_dir(trial.trial_id), number)

    def on_trial_end(self, trial):
        super().on_trial_end(trial)
        trials = read_trials(self.project_dir)
        own = next(one for one in trials if one.number == int(trial.trial_id) + 1)
        self.log(progress(own, trials, self.oracle.max_trials, self.recipe_model.deadline))


def progress(own, trials, max_trials, deadline=None):
    """Returns the line about a trial that has ended: what it reached, the best so far, and the time that is left."""
    reached = f"validation accuracy {own.score:.4f}" if own.state == FINISHED else f"{own.state}: {own.reason}"
    ended = [trial for trial in trials if trial.state != RUNNING]
    parts = [f"trial {own.number} of {max_trials}: {reached}, {own.seconds:.0f} s"]
    best = best_trial(trials)
    parts += [f"best so far {best.score:.4f} (trial {best.number})"] if best else []
    seconds = (max_trials - len(ended)) * sum(trial.seconds for trial in ended) / len(ended) / workers.count()
    if deadline:
        seconds = min(seconds, deadline - time.time())
    parts += [f"{math.ceil(max(0, seconds) / 60)} min left"] if len(ended) < max_trials else []
    return "; ".join(parts)
