"""Searches a recipe's values for the highest validation accuracy.

python -m tuning.search --recipe=digits --max_trials=30 --budget_minutes=60
python -m tuning.search --recipe=digits --factor=0.01 --narrow=modulation='neighbour|anchor' --narrow=learning_rate=0.01:0.1

Every flag of train.py works here: a value that is given is fixed. The same command resumes a stopped search.

--workers=2 runs two trials at a time on this machine. On several machines with a shared folder, run the same command on each,
with KERASTUNER_ORACLE_IP and KERASTUNER_ORACLE_PORT set to the chief's address, and KERASTUNER_TUNER_ID set to chief on one and
to worker0, worker1, ... on the others.
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

from ortho_keras.method.console import say
from ortho_keras.method.errors import InputError
from ortho_keras.method.files import check_folder, entries, expanded, only_one, write_json
from ortho_keras.trainer import command, runtime
from ortho_keras.trainer.run import load_recipe_data
from tuning import workers
from tuning.oracles import TUNERS, make_oracle
from tuning.report import report
from tuning.space import search_space
from tuning.trials import SEARCH_FILE, read_search, read_trials
from tuning.tuner import Search, SearchStopped
from tuning.workers import ALONE, CHIEF, WORKER

FLAGS = flags.FLAGS
PASSED_ON = ("data_dir", "strategy", "devices", "jit_compile", "deterministic", "tf32")  # of train.py, for every trial
WITHOUT_USE = ("export", "signal_every", "keep_checkpoints", "checkpoint_minutes", "list_recipes")

flags.DEFINE_enum("tuner", "bayesian", list(TUNERS), "How the trials are chosen.")
flags.DEFINE_integer("max_trials", 30, "Maximal number of trials, including those of earlier calls.", lower_bound=1)
flags.DEFINE_float("budget_minutes", 0, "Minutes after which this call ends; the next resumes its trial. 0: no limit.")
flags.DEFINE_multi_string("narrow", [], "NAME=LOW:HIGH or NAME=VALUE|VALUE|...: searches a part of a value's space.")
flags.DEFINE_integer("search_seed", 0, "Seed of the search's own choices; --seed is that of every trial.", lower_bound=0)
flags.DEFINE_integer("chance_steps", 0, "Steps after which a trial at chance is stopped; 0: a third of its.", lower_bound=0)
flags.DEFINE_integer("workers", 0, "Trials at a time, each in its own process; 0: one, in this process.", lower_bound=0)


def check_flags():
    """Raises `InputError` at the first flag that a search cannot be run with."""
    if not FLAGS.budget_minutes >= 0:
        raise InputError(f"--budget_minutes must be at least 0. Received: {FLAGS.budget_minutes}")
    for flag in WITHOUT_USE:
        if FLAGS[flag].value != FLAGS[flag].default:
            raise InputError(f"--{flag} must be left out: a search has no use for it. Received: {FLAGS[flag].value}")
    if FLAGS.strategy == "multi_worker":
        raise InputError("--strategy must be auto, none or mirrored in a search. Received: 'multi_worker'")
    if FLAGS.strategy == "auto" and os.environ.get("TF_CONFIG"):
        raise InputError("--strategy must be none or mirrored if TF_CONFIG is set: a trial runs on one machine")
    runtime.read_devices(FLAGS.devices)


def prepare_directory(directory, settings):
    """Makes sure that the search may use the directory, and writes its settings into it.

    The settings identify a search; `max_trials`, the budget and where it runs may differ from call to call.
    """
    check_folder("--workdir", directory)
    if set(str(directory)) & set("*?[]"):
        raise InputError(f"--workdir must be without * ? [ ], patterns for keras-tuner. Received: {str(directory)!r}")
    if entries(directory):
        held = {**read_search(directory), "train_flags": None}
        different = list(_differences(held, {**settings, "train_flags": None}))
        if different:
            message = f"Received: {str(directory)!r}, which holds another: {'; '.join(different)}"
            raise InputError(f"--workdir must be empty or hold this very search. {message}")
    directory.mkdir(parents=True, exist_ok=True)
    given = [FLAGS[flag] for flag in PASSED_ON if FLAGS[flag].value != FLAGS[flag].default]
    write_json(directory / SEARCH_FILE, {**settings, "train_flags": [flag.serialize() for flag in given]})


def _differences(held, mine):
    for key in {**held, **mine}:
        there, here = held.get(key), mine.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from (f"{key}: {text}" for text in _differences(there, here))
        elif there != here:
            yield f"{key}={there!r} there, {here!r} here"


def search():
    """Runs or resumes the search that the flags describe; returns the process's status."""
    recipe, name, given = command.recipe_from_flags()
    check_flags()
    role = workers.role()
    if not recipe.hold_out:
        raise InputError("--hold_out must be true: trials are judged by validation images. Received: False")
    space = search_space(recipe, given, FLAGS.narrow)
    default = pathlib.Path("runs", f"search-{command.default_workdir(name, given).name}")
    directory = expanded(FLAGS.workdir or default)
    deadline = workers.deadline() or (time.time() + 60 * FLAGS.budget_minutes if FLAGS.budget_minutes else None)
    settings = {"recipe_name": name, **{flag: FLAGS[flag].value for flag in ("tuner", "search_seed", "chance_steps")}}
    with contextlib.ExitStack() as stack:
        if not workers.launched():
            if role != CHIEF:
                load_recipe_data(recipe, FLAGS.data_dir)  # wrong data would fail every trial
            prepare_directory(directory, {**settings, **space.to_json()})
            if role != WORKER:
                stack.enter_context(only_one(directory))
        if FLAGS.workers and role == ALONE:
            status = workers.run_all(FLAGS.workers, deadline, directory)
        else:
            status = run_trials(role, space, name, directory, deadline)
        if status == 0 and role == ALONE:
            say(report(directory))
    return status


def run_trials(role, space, name, directory, deadline):
    """Runs trials in this process or, as a chief, distributes them; returns the process's status."""
    machine = runtime.Runtime()
    if role != CHIEF:
        machine = runtime.start(FLAGS.strategy, FLAGS.devices, FLAGS.jit_compile, FLAGS.deterministic, FLAGS.tf32)
    hyperparameters = keras_tuner.HyperParameters()
    space.recipe(hyperparameters)
    oracle = make_oracle(FLAGS.tuner, hyperparameters, FLAGS.max_trials, FLAGS.search_seed, space.base.epochs)
    log = functools.partial(say, stream=sys.stdout)
    keras_tuner.src.config.DEBUG = False  # no traceback of a failed trial: its file has the reason
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # keras-tuner prints its files' names, and conditions' values
            tuner = Search(oracle, space, directory, FLAGS.data_dir, name, machine, FLAGS.chance_steps, deadline, log)
            if role != WORKER:
                log(f"searching {', '.join(space.parameters)}; {directory} holds {len(oracle.trials)} trials")
            with workers.watched_chief(deadline, oracle, log) if role == CHIEF else contextlib.nullcontext():
                tuner.search()
        if role != WORKER and len(oracle.trials) < FLAGS.max_trials:
            log(f"--tuner={FLAGS.tuner} has nothing more to try after {len(oracle.trials)} of {FLAGS.max_trials} trials")
    except SearchStopped as error:
        if deadline and time.time() >= deadline:
            log(f"{error}: the budget is used up; the same command resumes from there")
            return 0
        print(f"tuning.search: {error}; the same command resumes from there", file=sys.stderr)
        return 128 + error.signum
    except grpc.RpcError:
        print(f"tuning.search: the chief has ended; {len(read_trials(directory))} trials are in {directory}", file=sys.stderr)
        return 1
    return 0


def main(_):
    try:
        return search()
    except InputError as error:
        print(f"tuning.search: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tuning.search: stopped; the same command resumes from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: command.parse_flags(argv, "tuning.search"))
