"""Searches as a user runs them: to their end, stopped, killed, over processes, and with what is wrong."""

import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time

import keras
import keras_tuner
import numpy as np
import pytest
from absl.testing import flagsaver

import train
from ortho_keras.method.files import only_one, write_json
from ortho_keras.trainer.recipe import read_recipe
from ortho_keras.trainer.recipes import RECIPES
from tuning import search
from tuning.hypermodel import RecipeHyperModel
from tuning.report import report
from tuning.space import search_space
from tuning.trials import FAILED, FINISHED, HOPELESS, RUNNING, Trial, best_trial, read_trials

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ["--recipe=digits", "--image_size=8", "--augment=none", "--depth=8", "--width=4", "--epochs=2", "--bn_batches=2"]
QUICK = [*SMALL, "--tuner=random", "--narrow=learning_rate=0.003:0.3"]


def invoke(capsys, *arguments):
    """Runs the command in this process; returns status, stdout and stderr."""
    with flagsaver.flagsaver():
        try:
            train.parse_flags(["tuning.search", *arguments], "tuning.search")
            status = search.main(None)
        except SystemExit as error:
            status = error.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def start(*arguments):
    command = [sys.executable, "-m", "tuning.search", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


def states(directory):
    return [(trial.number, trial.state) for trial in read_trials(directory)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A whole search in one process, and what it printed."""
    directory = tmp_path_factory.mktemp("alone") / "search"
    process = start(*QUICK, "--max_trials=6", f"--workdir={directory}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == ""
    return directory, out


def test_a_search_and_its_best_command_run_by_hand(alone, tmp_path):
    directory, out = alone
    trials, best = read_trials(directory), best_trial(read_trials(directory))
    assert [trial.number for trial in trials] == [1, 2, 3, 4, 5, 6] and len({trial.recipe for trial in trials}) == 6
    assert trials[0].recipe.learning_rate == 0.03 and trials[0].recipe.depth == 8  # the recipe itself
    assert all(f"trial {trial.number} of 6: " in out for trial in trials) and f"best so far {best.score:.4f}" in out
    command = next(line for line in out.splitlines() if line.startswith("    python train.py --recipe=digits"))
    for index, given in enumerate((command, f"python train.py --recipe_file={directory}/best.json")):
        workdir = tmp_path / str(index)
        arguments = [sys.executable, *shlex.split(given)[1:], f"--workdir={workdir}"]
        subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, timeout=120)
        result = json.loads((workdir / "result.json").read_text())
        assert result["validation_accuracy"] == pytest.approx(best.score, abs=1e-6)
        assert read_recipe(workdir / "run.json")[1] == best.recipe
    assert (directory / "search.png").stat().st_size > 10_000


def test_a_search_that_is_over_is_reported_again_and_one_with_more_trials_goes_on(alone, capsys):
    directory, _ = alone
    before = {path: path.stat().st_mtime_ns for path in directory.glob("trial_*/outcome.json")}
    status, out, err = invoke(capsys, *QUICK, "--max_trials=6", f"--workdir={directory}")
    assert (status, err) == (0, "") and "holds 6 trials" in out and "best: trial" in out and "trial 6 of 6" not in out
    status, out, err = invoke(capsys, *QUICK, "--max_trials=7", f"--workdir={directory}")
    assert (status, err) == (0, "") and "trial 7 of 7: " in out
    assert all(path.stat().st_mtime_ns == at for path, at in before.items()) and len(read_trials(directory)) == 7


def test_two_workers_of_which_one_is_killed_find_what_one_process_finds(alone, tmp_path):
    directory = tmp_path / "search"
    process = start(*QUICK, "--max_trials=6", "--workers=2", f"--workdir={directory}")
    wait_for(lambda: (2, RUNNING) in states(directory))
    worker = next(
        int(folder.name)
        for folder in pathlib.Path("/proc").iterdir()
        if folder.name.isdecimal() and b"KERASTUNER_TUNER_ID=worker1" in _environment(folder) and _parent(folder) == process.pid
    )
    os.kill(worker, signal.SIGKILL)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0 and err == ""
    assert "worker1 was ended by signal 9; it is started again" in out and "best: trial" in out and "neighbour\n" not in out
    mine, expected = read_trials(directory), read_trials(alone[0])[:6]
    assert [(trial.number, trial.state, trial.recipe) for trial in mine] == [
        (trial.number, trial.state, trial.recipe) for trial in expected
    ]
    assert [trial.score for trial in mine] == pytest.approx([trial.score for trial in expected], abs=1e-6)


def _environment(folder):
    try:
        return (folder / "environ").read_bytes()
    except OSError:
        return b""


def _parent(folder):
    return int((folder / "stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize(
    ("workers", "signum"), [(0, signal.SIGTERM), (0, signal.SIGKILL), (1, signal.SIGTERM), (1, signal.SIGKILL)]
)
def test_a_search_that_is_stopped_in_a_trial_goes_on_in_it(tmp_path, workers, signum):
    directory = tmp_path / "search"
    long = [*SMALL, "--epochs=400", "--tuner=random", "--max_trials=2", f"--workdir={directory}", f"--workers={workers}"]
    process = start(*long)
    log = directory / "trial_0" / "log.txt"
    wait_for(lambda: log.exists() and "epoch 3/" in log.read_text())  # so the second epoch's checkpoint is there
    family = {int(f.name) for f in pathlib.Path("/proc").iterdir() if f.name.isdecimal() and str(directory) in _command(f)}
    assert len(family) == 1 + 2 * workers  # with the chief
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    wait_for(lambda: not any(pathlib.Path("/proc", str(pid)).exists() for pid in family))
    (trial,) = read_trials(directory)
    if signum == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert "the same command goes on from there" in err and "Traceback" not in err
    if (workers, signum) != (0, signal.SIGKILL):  # the trial itself was asked, by a signal or by its launcher's end
        assert (trial.state, trial.starts) == (RUNNING, 0) and "stopped after step" in trial.reason
    again = start(*long)
    wait_for(lambda: "epoch" in log.read_text().partition("resuming after step")[2])
    again.send_signal(signal.SIGTERM)
    assert again.communicate(timeout=120)[1].count("the same command goes on from there") == 1
    assert again.returncode == 128 + signal.SIGTERM


def test_a_budget_ends_a_search_in_a_trial(tmp_path, capsys):
    directory = tmp_path / "search"
    long = [*SMALL, "--epochs=4000", "--max_trials=2", f"--workdir={directory}"]
    status, out, err = invoke(capsys, *long, "--budget_minutes=0.1")
    assert (status, err) == (0, "") and "the budget is used up; the same command goes on from there" in out
    assert states(directory) == [(1, RUNNING)] and "1 trials (1 unfinished)" in report(directory)


def _command(folder):
    try:
        return (folder / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_hopeless_and_failed_trials_are_told_and_do_not_end_a_search(tmp_path, capsys):
    hopeless = [*SMALL, "--epochs=6", "--learning_rate=0.0001", "--rate_depth=0", "--chance_steps=20", "--max_trials=3"]
    status, out, err = invoke(capsys, *hopeless, "--narrow=initializer=orthonormal", f"--workdir={tmp_path / 'chance'}")
    assert (status, err) == (0, "") and "hopeless: training accuracy" in out and "where chance is 0.100" in out
    stopped = [trial for trial in read_trials(tmp_path / "chance") if trial.state == HOPELESS]
    assert stopped and all(trial.score == pytest.approx(0.1) for trial in stopped)
    for name in "ab":  # images of one colour, in which no patch differs from another
        (tmp_path / "grey" / name).mkdir(parents=True)
        for index in range(20):
            keras.utils.save_img(tmp_path / "grey" / name / f"{index}.png", np.full((8, 8, 3), 99), scale=False)
    grey = [*QUICK, f"--dataset=folder:{tmp_path / 'grey'}", "--stem_initializer=pca", "--batch_size=4"]
    status, out, err = invoke(capsys, *grey, "--max_trials=5", f"--workdir={tmp_path / 'failed'}")
    assert (status, err) == (0, "") and "no trial is finished yet" in out
    assert states(tmp_path / "failed") == [(number, FAILED) for number in range(1, 6)]
    assert (
        out.count("failed: --stem_initializer=pca must have images with patches that differ") == 10
    )  # as it ends, in the table


def test_a_trial_that_kills_its_process_again_and_again_is_given_up(tmp_path, capsys):
    directory = tmp_path / "search"
    arguments = [*QUICK, "--max_trials=2", f"--workdir={directory}"]
    assert invoke(capsys, *arguments)[0] == 0
    kept, oracle = (json.loads((directory / name).read_text()) for name in ("trial_1/trial.json", "oracle.json"))
    Trial(2, RUNNING, read_trials(directory)[1].recipe, starts=3).write(directory / "trial_1")
    write_json(directory / "trial_1" / "trial.json", {**kept, "status": "RUNNING"})
    write_json(directory / "oracle.json", {**oracle, "ongoing_trials": {"tuner0": "1"}, "end_order": ["0"]})
    status, out, _ = invoke(capsys, *arguments)
    assert status == 0 and "trial 2 of 2: failed: its process ended 3 times without a word" in out
    assert states(directory) == [(1, FINISHED), (2, FAILED)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tuner=annealing"], "--tuner must be one of hyperband, bayesian, random, grid. Received: 'annealing'"),
        (["--max_trials=0"], "--max_trials must be at least 1. Received: 0"),
        (["--budget_minutes=-1"], "--budget_minutes must be at least 0. Received: -1.0"),
        (["--budget_minutes=nan"], "--budget_minutes must be at least 0. Received: nan"),
        (["--workers=-1"], "--workers must be at least 0. Received: -1"),
        (["--factor=100"], "--factor must lie in the space that is searched, 1e-06:10. Received: 100.0"),
        (["--factor=-1"], "--factor must be at least 0. Received: -1.0"),
        (["--narrow=factor=5"], "--narrow must be factor=LOW:HIGH within 1e-06:10. Received: 'factor=5'"),
        (["--nohold_out"], "--hold_out must be true: trials are judged by validation images. Received: False"),
        (["--recipe=digit"], "--recipe must be one of digits, "),
        (
            ["--recipe_file=missing.json"],
            "--recipe_file must be a JSON file with a recipe, as a run's run.json. Received: 'missing",
        ),
        (["--batch_size=2000"], "--batch_size must be at most the number of training images, 1293. Received: 2000"),
        (["--dataset=folder:nowhere"], "--dataset folder:nowhere must name a folder that exists"),
        (["--strategy=multi_worker"], "--strategy must be one of auto, none, mirrored in a search. Received: 'multi_worker'"),
        (["--devices=GPU:7", "--workers=2"], "--devices must be a number of devices or names of one kind"),
        (["--workdir=runs/[1]"], "--workdir must be without * ? [ ], which keras-tuner takes for patterns"),
        (["--signal_every=5"], "--signal_every must be left out: a search has no use for it. Received: 5"),
        (["--max_trial=5"], "Unknown command line flag 'max_trial'"),
        (["--workdir=/proc/search"], "--workdir must be a folder that can be made. Received: '/proc/search'"),
        (["digits"], "every argument must be a flag, --name=value. Received: digits"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = invoke(capsys, *arguments)
    assert status == 2 and out == "" and err.startswith(f"tuning.search: {message}") and err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_directory_of_something_else_is_left_alone(alone, tmp_path, capsys):
    directory = alone[0]
    status, _, err = invoke(capsys, *QUICK, "--search_seed=1", f"--workdir={directory}")
    assert status == 2 and "--workdir must be empty or hold this very search" in err and "search_seed=0 there, 1 here" in err
    status, _, err = invoke(capsys, *QUICK, "--momentum=0.8", f"--workdir={directory}")
    assert status == 2 and "base: momentum=0.9 there, 0.8 here" in err and err.count("\n") == 1
    (tmp_path / "file").write_text("mine")
    status, _, err = invoke(capsys, *QUICK, f"--workdir={tmp_path}")
    assert status == 2 and "the directory must hold a search" in err and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"KERASTUNER_TUNER_ID": "worker0"}, "must be set together, or none. Received: KERASTUNER_TUNER_ID only"),
        ({"KERASTUNER_ORACLE_IP": "127.0.0.1"}, "must be set together, or none. Received: KERASTUNER_ORACLE_IP only"),
        (
            {"KERASTUNER_TUNER_ID": "chief", "KERASTUNER_ORACLE_IP": "127.0.0.1", "KERASTUNER_ORACLE_PORT": "http"},
            "KERASTUNER_ORACLE_PORT must be a port, 1 to 65535. Received: 'http'",
        ),
        (
            {"TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}}'},
            "--strategy must be none or mirrored where TF_CONFIG is set",
        ),
    ],
)
def test_wrong_variables_are_told_in_one_line(monkeypatch, tmp_path, capsys, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status, _, err = invoke(capsys, *QUICK, f"--workdir={tmp_path / 'search'}")
    assert status == 2 and message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_chief_whose_port_is_taken(monkeypatch, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"TUNER_ID": "chief", "ORACLE_IP": "127.0.0.1", "ORACLE_PORT": str(taken.getsockname()[1])}
        for name, value in place.items():
            monkeypatch.setenv(f"KERASTUNER_{name}", value)
        status, _, err = invoke(capsys, *QUICK, f"--workdir={tmp_path / 'search'}")
    assert status == 2 and "must be an address of this machine that is free. Received: 127.0.0.1:" in err


def test_a_directory_is_of_one_search_at_a_time(alone, capsys):
    with only_one(alone[0]):
        status, _, err = invoke(capsys, *QUICK, "--max_trials=7", f"--workdir={alone[0]}")
    assert status == 2 and "--workdir is in use by another process. Received: " in err


def test_the_model_of_a_point_is_the_recipes(tmp_path):
    hypermodel = RecipeHyperModel(search_space(RECIPES["digits"].recipe))
    model = hypermodel.build(keras_tuner.HyperParameters())
    assert model.name == "plain44" and model.optimizer is not None and model.input_shape == (None, 16, 16, 1)
