"""Searches a recipe's values for the highest validation accuracy.

python -m tuning.search --recipe=digits --max_trials=30 --budget_minutes=60
python -m tuning.search --recipe=digits --factor=0.01 --narrow=modulation='neighbour|anchor' --narrow=learning_rate=0.01:0.1

Every flag of train.py is one here: a value that is given is fixed. The same command goes on where a search was stopped.

--workers=2 runs two trials at a time on this machine. Over machines, with a folder that all of them see: the same command on
each, with KERASTUNER_ORACLE_IP and KERASTUNER_ORACLE_PORT set to the chief's address and KERASTUNER_TUNER_ID to chief on one
and to a name of its own, worker0, worker1, ..., on every other.
"""

import contextlib
import functools
import io
import math
import os
import pathlib
import signal
import sys
import time

import keras_tuner
import keras_tuner.src.config
from absl import app, flags
from keras_tuner.engine import base_tuner

import train
from ortho_keras import runtime
from ortho_keras.errors import InputError
from ortho_keras.files import check_folder, write_json
from tuning import workers
from tuning.hypermodel import RecipeHyperModel, SearchStopped
from tuning.oracles import TUNERS, make_oracle
from tuning.report import report
from tuning.space import search_space
from tuning.trials import FINISHED, RUNNING, SEARCH_FILE, best_trial, read_search, read_trials

FLAGS = flags.FLAGS

flags.DEFINE_string("tuner", "bayesian", f"What chooses the trials ({' | '.join(TUNERS)}).")
flags.DEFINE_integer("max_trials", 30, "How many trials at most, those of earlier calls counted.")
flags.DEFINE_float(
    "budget_minutes", 0, "Ends this call after so many minutes; the trial that runs then goes on in the next. 0: no end."
)
flags.DEFINE_multi_string(
    "narrow", [], "NAME=LOW:HIGH or NAME=VALUE|VALUE|...: searches a value over less than the whole space."
)
flags.DEFINE_integer("search_seed", 0, "Seed of the search's own choices; --seed is that of every trial.")
flags.DEFINE_integer("chance_steps", 0, "Stops a trial that is at chance after so many steps; 0: after a third of its steps.")
flags.DEFINE_integer(
    "workers", 0, "Trials at a time, each in a process of its own beside one that chooses; 0: one, in this one."
)


class Search(base_tuner.BaseTuner):
    """keras-tuner's loop over trials, each run by `RecipeHyperModel.fit`."""

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
        if self.recipe_model.deadline and time.time() >= self.recipe_model.deadline:
            raise SearchStopped("the time was over")
        time.sleep(0.1)  # an oracle that has nothing to do yet is asked again and again

    def run_trial(self, trial):
        number = int(trial.trial_id) + 1
        return self.recipe_model.fit(trial.hyperparameters, None, self.get_trial_dir(trial.trial_id), number)

    def on_trial_end(self, trial):
        super().on_trial_end(trial)
        own = next(one for one in read_trials(self.project_dir) if one.number == int(trial.trial_id) + 1)
        self.log(progress(own, read_trials(self.project_dir), self.oracle.max_trials, self.recipe_model.deadline))


def progress(own, trials, max_trials, deadline=None):
    """Returns the line about a trial that has ended: what it reached, the best so far, and the time that is left."""
    reached = f"validation accuracy {own.score:.4f}" if own.state == FINISHED else f"{own.state}: {own.reason}"
    ended = [trial for trial in trials if trial.state != RUNNING]
    parts = [f"trial {own.number} of {max_trials}: {reached}, {own.seconds:.0f} s"]
    best = best_trial(trials)
    parts += [f"best so far {best.score:.4f} (trial {best.number})"] if best else []
    seconds = (max_trials - len(ended)) * sum(trial.seconds for trial in ended) / len(ended) / max(1, workers.count())
    if deadline:
        seconds = min(seconds, deadline - time.time())
    parts += [f"{math.ceil(max(0, seconds) / 60)} min left"] if len(ended) < max_trials else []
    return "; ".join(parts)


def settings(name, space):
    """What makes a search this one and no other: `max_trials` and the budget may grow from call to call."""
    return {
        "recipe_name": name,
        "tuner": FLAGS.tuner,
        "search_seed": FLAGS.search_seed,
        "chance_steps": FLAGS.chance_steps,
        **space.to_json(),
    }


def check_directory(directory, mine):
    """Makes sure that the search may use the directory, and writes its settings there."""
    check_folder("--workdir", directory)
    if directory.exists() and any(directory.iterdir()):
        held = read_search(directory)
        different = [*_differences(held, mine)]
        if different:
            raise InputError(
                f"--workdir must be empty or hold this very search. Received: {str(directory)!r}, which holds another: "
                f"{'; '.join(different)}"
            )
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir must be a folder that can be made. Received: {str(directory)!r} ({error})") from error
    write_json(directory / SEARCH_FILE, mine)


def _differences(held, mine):
    for key in {**held, **mine}:
        there, here = held.get(key), mine.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from (f"{key}: {told}" for told in _differences(there, here))
        elif there != here:
            yield f"{key}={there!r} there, {here!r} here"


def search():
    """Runs, or goes on with, the search that the flags describe; returns the process's status."""
    recipe, name, given = train.recipe_from_flags()
    if FLAGS.tuner not in TUNERS:
        raise InputError(f"--tuner must be one of {', '.join(TUNERS)}. Received: {FLAGS.tuner!r}")
    for flag, least in {"max_trials": 1, "budget_minutes": 0, "workers": 0, "chance_steps": 0, "search_seed": 0}.items():
        if not FLAGS[flag].value >= least:
            raise InputError(f"--{flag} must be at least {least}. Received: {FLAGS[flag].value}")
    for flag in ("signal_every", "keep_checkpoints", "list_recipes"):
        if FLAGS[flag].value != FLAGS[flag].default:
            raise InputError(f"--{flag} must be left out: a search has no use for it. Received: {FLAGS[flag].value}")
    if not recipe.hold_out:
        raise InputError("--hold_out must be true: trials are judged by validation images. Received: False")
    space = search_space(recipe, given, FLAGS.narrow)
    default = pathlib.Path("runs", f"search-{train.default_workdir(name, given).name}")
    directory = pathlib.Path(FLAGS.workdir or default).expanduser()
    check_directory(directory, settings(name, space))
    deadline = workers.deadline() or (time.time() + 60 * FLAGS.budget_minutes if FLAGS.budget_minutes else None)
    if FLAGS.workers:
        status = workers.run_all(FLAGS.workers, deadline)
        if status == 0:
            print(report(directory))
        return status
    machine = runtime.start(FLAGS.strategy, FLAGS.devices, FLAGS.jit_compile, FLAGS.deterministic, FLAGS.tf32)
    if machine.workers > 1:
        raise InputError("--strategy must not be multi_worker: a trial runs on one machine. Received: a cluster in TF_CONFIG")
    recipe_model = RecipeHyperModel(space, FLAGS.data_dir, name, machine, FLAGS.chance_steps, deadline)
    hyperparameters = keras_tuner.HyperParameters()
    recipe_model.declare_hyperparameters(hyperparameters)
    oracle = make_oracle(FLAGS.tuner, hyperparameters, FLAGS.max_trials, FLAGS.search_seed, recipe.epochs)
    log = functools.partial(print, file=sys.stdout, flush=True)
    keras_tuner.src.config.DEBUG = False  # a failed trial's reason is in its file; keras-tuner would print a traceback
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # keras-tuner prints its files' names, and conditions' values
            tuner = Search(oracle, recipe_model, directory, log)
            if workers.role() != "worker":
                log(f"searching {', '.join(space.parameters)}; {directory} holds {len(oracle.trials)} trials")
            if workers.role() == "chief":
                workers.watch_chief(deadline)
            tuner.search()
    except SearchStopped as error:
        if deadline and time.time() >= deadline:
            log(f"{error}: the budget is used up; the same command goes on from there")
            return 0
        print(f"tuning.search: {error}; the same command goes on from there", file=sys.stderr)
        return 128 + signal.SIGTERM
    if workers.role() == "alone":
        log(report(directory))
    return 0


def main(_):
    try:
        return search()
    except InputError as error:
        print(f"tuning.search: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tuning.search: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: train.parse_flags(argv, "tuning.search"))
