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
import os
import pathlib
import signal
import sys
import time

import grpc
import keras_tuner
import keras_tuner.src.config
from absl import app, flags

import train
from ortho_keras.method.errors import InputError
from ortho_keras.method.files import check_folder, entries, only_one, write_json
from ortho_keras.trainer import runtime
from ortho_keras.trainer.run import load_recipe_data
from tuning import workers
from tuning.hypermodel import RecipeHyperModel, SearchStopped
from tuning.oracles import TUNERS, make_oracle
from tuning.report import report
from tuning.space import search_space
from tuning.trials import SEARCH_FILE, read_search, read_trials
from tuning.tuner import Search

FLAGS = flags.FLAGS
ALONE, CHIEF, WORKER = workers.ALONE, workers.CHIEF, workers.WORKER
PASSED_ON = ("data_dir", "strategy", "devices", "jit_compile", "deterministic", "tf32")  # of train.py, for every trial
OF_NO_USE = ("export", "signal_every", "keep_checkpoints", "list_recipes")

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


def check_flags():
    """Raises `InputError` at the first flag that a search cannot be run with."""
    if FLAGS.tuner not in TUNERS:
        raise InputError(f"--tuner must be one of {', '.join(TUNERS)}. Received: {FLAGS.tuner!r}")
    for flag, least in {"max_trials": 1, "budget_minutes": 0, "workers": 0, "chance_steps": 0, "search_seed": 0}.items():
        if not FLAGS[flag].value >= least:
            raise InputError(f"--{flag} must be at least {least}. Received: {FLAGS[flag].value}")
    for flag in OF_NO_USE:
        if FLAGS[flag].value != FLAGS[flag].default:
            raise InputError(f"--{flag} must be left out: a search has no use for it. Received: {FLAGS[flag].value}")
    one_machine = [name for name in runtime.STRATEGIES if name != "multi_worker"]
    if FLAGS.strategy not in one_machine:
        raise InputError(f"--strategy must be one of {', '.join(one_machine)} in a search. Received: {FLAGS.strategy!r}")
    if FLAGS.strategy == "auto" and os.environ.get("TF_CONFIG"):
        raise InputError("--strategy must be none or mirrored where TF_CONFIG is set: a trial runs on one machine")
    runtime.read_devices(FLAGS.devices)


def settings(name, space):
    """What makes a search this one and no other: `max_trials`, the budget and where it runs may differ from call to call."""
    own = {"recipe_name": name, "tuner": FLAGS.tuner, "search_seed": FLAGS.search_seed, "chance_steps": FLAGS.chance_steps}
    return {**own, **space.to_json()}


def prepare_directory(directory, mine):
    """Makes sure that the search may use the directory, and writes its settings there."""
    check_folder("--workdir", directory)
    if set(str(directory)) & set("*?[]"):
        raise InputError(
            f"--workdir must be without * ? [ ], which keras-tuner takes for patterns. Received: {str(directory)!r}"
        )
    if entries(directory):
        held = read_search(directory)
        different = [*_differences({**held, "train_flags": None}, {**mine, "train_flags": None})]
        if different:
            raise InputError(
                f"--workdir must be empty or hold this very search. Received: {str(directory)!r}, which holds another: "
                f"{'; '.join(different)}"
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir must be a folder that can be made. Received: {str(directory)!r} ({error})") from error
    given = [FLAGS[flag] for flag in PASSED_ON if FLAGS[flag].value != FLAGS[flag].default]
    write_json(directory / SEARCH_FILE, {**mine, "train_flags": [flag.serialize() for flag in given]})


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
    check_flags()
    role = workers.role()
    if not recipe.hold_out:
        raise InputError("--hold_out must be true: trials are judged by validation images. Received: False")
    space = search_space(recipe, given, FLAGS.narrow)
    default = pathlib.Path("runs", f"search-{train.default_workdir(name, given).name}")
    directory = pathlib.Path(FLAGS.workdir or default).expanduser()
    deadline = workers.deadline() or (time.time() + 60 * FLAGS.budget_minutes if FLAGS.budget_minutes else None)
    with contextlib.ExitStack() as stack:
        if not workers.launched():
            if role != CHIEF:
                load_recipe_data(recipe, FLAGS.data_dir)  # what is wrong with the data is wrong with every trial
            prepare_directory(directory, settings(name, space))
            if role != WORKER:
                stack.enter_context(only_one(directory))
        if FLAGS.workers and role == ALONE:
            status = workers.run_all(FLAGS.workers, deadline, directory)
        else:
            status = run_trials(space, name, directory, deadline)
        if status == 0 and role == ALONE:
            print(report(directory), flush=True)
    return status


def run_trials(space, name, directory, deadline):
    """Runs trials in this process, or, as a chief, gives them out; returns the process's status."""
    machine = runtime.Runtime()
    if workers.role() != CHIEF:
        machine = runtime.start(FLAGS.strategy, FLAGS.devices, FLAGS.jit_compile, FLAGS.deterministic, FLAGS.tf32)
    recipe_model = RecipeHyperModel(space, FLAGS.data_dir, name, machine, FLAGS.chance_steps, deadline)
    hyperparameters = keras_tuner.HyperParameters()
    recipe_model.declare_hyperparameters(hyperparameters)
    oracle = make_oracle(FLAGS.tuner, hyperparameters, FLAGS.max_trials, FLAGS.search_seed, space.base.epochs)
    log = functools.partial(print, file=sys.stdout, flush=True)
    keras_tuner.src.config.DEBUG = False  # a failed trial's reason is in its file; keras-tuner would print a traceback
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # keras-tuner prints its files' names, and conditions' values
            tuner = Search(oracle, recipe_model, directory, log)
            if workers.role() != WORKER:
                log(f"searching {', '.join(space.parameters)}; {directory} holds {len(oracle.trials)} trials")
            with workers.watched_chief(deadline) if workers.role() == CHIEF else contextlib.nullcontext():
                tuner.search()
    except SearchStopped as error:
        if deadline and time.time() >= deadline:
            log(f"{error}: the budget is used up; the same command goes on from there")
            return 0
        print(f"tuning.search: {error}; the same command goes on from there", file=sys.stderr)
        return 128 + error.signum
    except grpc.RpcError:
        print(f"tuning.search: the chief went away; {len(read_trials(directory))} trials are in {directory}", file=sys.stderr)
        return 1
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
