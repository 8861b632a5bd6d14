"""Searches as a user runs them: to their end, stopped, killed, over processes, and with wrong input."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from time import sleep

import keras_tuner
import pytest
from command_lines import TINY, start, wait_for
from command_lines import invoke as invoke_command

from ortho_keras.method.files import only_one, write_json
from ortho_keras.trainer.recipe import read_recipe
from tuning import search, workers
from tuning.oracles import make_oracle
from tuning.report import main as report_main
from tuning.report import report
from tuning.trials import FAILED, FINISHED, HOPELESS, RUNNING, Trial, best_trial, read_trials


def invoke(capsys, *arguments):
    return invoke_command(capsys, *arguments, main=search.main, program="tuning.search")


def states(directory):
    return [(trial.number, trial.state) for trial in read_trials(directory)]


def test_a_search_and_its_best_command_run_by_hand(search_of_two, tmp_path, capsys):
    _, directory, out = search_of_two
    trials, best = read_trials(directory), best_trial(read_trials(directory))
    assert states(directory) == [(1, FINISHED), (2, FINISHED)] and trials[0].recipe != trials[1].recipe
    assert trials[0].recipe.learning_rate == 0.03 and trials[0].recipe.depth == 8  # the recipe itself
    assert all(f"trial {trial.number} of 2: " in out for trial in trials) and f"best so far {best.score:.4f}" in out
    command = next(line for line in out.splitlines() if line.startswith("    python train.py --recipe=digits"))
    assert read_recipe(directory / "best.json") == ("digits", best.recipe)
    status, *_ = invoke_command(capsys, *shlex.split(command)[2:], f"--workdir={tmp_path / 'run'}")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert status == 0 and result["validation_accuracy"] == pytest.approx(best.score, abs=1e-6)
    assert read_recipe(tmp_path / "run" / "run.json")[1] == best.recipe
    assert (directory / "search.png").stat().st_size > 10_000


def test_a_search_that_is_over_is_reported_again_and_one_with_more_trials_resumes(search_of_two, tmp_path, capsys):
    given, directory, _ = search_of_two
    directory = shutil.copytree(directory, tmp_path / "search")
    before = {path: path.stat().st_mtime_ns for path in directory.glob("trial_*/outcome.json")}
    status, out, err = invoke(capsys, *given, "--max_trials=2", f"--workdir={directory}")
    assert (status, err) == (0, "") and "holds 2 trials" in out and "best: trial" in out and "trial 2 of 2" not in out
    status, out, err = invoke(capsys, *given, "--max_trials=3", f"--workdir={directory}")
    assert (status, err) == (0, "") and "trial 3 of 3: " in out
    assert all(path.stat().st_mtime_ns == at for path, at in before.items()) and len(read_trials(directory)) == 3


def test_a_killed_worker_is_restarted_and_two_find_what_one_process_finds(search_of_two, tmp_path):
    """The workers are processes; one is killed while it trains."""
    given, alone, _ = search_of_two
    directory = tmp_path / "search"
    process = start("-m", "tuning.search", *given, "--max_trials=2", "--workers=2", f"--workdir={directory}")
    wait_for(lambda: len(states(directory)) == 2)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {child: pathlib.Path("/proc", child, "environ").read_bytes() for child in children}
    (worker,) = (child for child, text in environments.items() if b"KERASTUNER_TUNER_ID=worker1" in text)
    os.kill(int(worker), signal.SIGKILL)
    out, err = process.communicate(timeout=400)
    assert (process.returncode, err) == (0, "")
    assert "worker1 ended with signal 9; it is restarted" in out and "best: trial" in out and "neighbour\n" not in out
    pairs = list(zip(read_trials(directory), read_trials(alone), strict=True))
    assert all((mine.number, mine.state, mine.recipe) == (own.number, own.state, own.recipe) for mine, own in pairs)
    assert [mine.score for mine, _ in pairs] == pytest.approx([own.score for _, own in pairs], abs=1e-6)


def test_a_search_whose_budget_is_used_up_in_a_trial_resumes_in_it(tmp_path, capsys):
    directory = tmp_path / "search"
    given = [*TINY, "--epochs=4000", "--tuner=random", "--max_trials=2", f"--workdir={directory}"]
    for _ in range(3):
        status, out, err = invoke(capsys, *given, "--budget_minutes=0.02")
        assert (status, err) == (0, "") and "the budget is used up; the same command resumes from there" in out
        (trial,) = read_trials(directory)
        assert (trial.state, trial.starts) == (RUNNING, 0) and "stopped after step" in trial.reason
    assert "1 trials (1 unfinished)" in report(directory)
    resumed = (directory / "trial_0" / "log.txt").read_text().split("resuming after step ")[1:]
    assert len(resumed) == 2 and 0 < int(resumed[0].split()[0]) < int(resumed[1].split()[0])


@pytest.fixture
def sleeping(monkeypatch, tmp_path):
    """Makes chief and workers programs that only sleep; the list of those that were started."""
    program, started, begin = tmp_path / "sleep.sh", [], subprocess.Popen.__init__
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)

    def record(self, *args, **options):
        begin(self, *args, **options)
        started.append(self)

    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(subprocess.Popen, "__init__", record)
    yield started
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize(
    ("acts", "status", "message"),
    [
        ([lambda started: signal.raise_signal(signal.SIGTERM)], 128 + signal.SIGTERM, ""),
        ([lambda started: started[0].kill()], 1, "the chief ended with signal 9"),
        ([lambda started: started[-1].kill()] * 6, 1, "workers ended 6 times while no trial did"),
    ],
)
def test_a_launcher_ends_what_it_started(sleeping, tmp_path, capsys, monkeypatch, acts, status, message):
    """When it is asked to stop, when the chief is killed, and when workers die again and again."""
    waiting = iter(acts)
    monkeypatch.setattr(workers.time, "sleep", lambda seconds: next(waiting, lambda started: None)(sleeping) or sleep(0.1))
    assert workers.run_all(2, None, tmp_path) == status
    assert message in capsys.readouterr().err and len(sleeping) == 3 + len(acts) - 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_hopeless_and_failed_trials_do_not_end_a_search(tmp_path, capsys):
    hopeless = [*TINY, "--epochs=3", "--learning_rate=0.0001", "--rate_depth=0", "--chance_steps=20", "--max_trials=1"]
    hopeless += ["--narrow=initializer=orthonormal", f"--workdir={tmp_path / 'chance'}"]
    status, out, err = invoke(capsys, *hopeless)
    assert (status, err) == (0, "") and "hopeless: training accuracy" in out and "where chance is 0.100" in out
    (stopped,) = read_trials(tmp_path / "chance")
    assert stopped.state == HOPELESS and stopped.score == pytest.approx(0.1)
    without = [*TINY, f"--initial_weights={tmp_path / 'none.keras'}", f"--workdir={tmp_path / 'failed'}"]
    status, out, err = invoke(capsys, *without, "--max_trials=4")
    assert (status, err) == (0, "") and "no trial has finished yet" in out
    assert states(tmp_path / "failed") == [(number, FAILED) for number in range(1, 5)]
    assert out.count("failed: --initial_weights must be a .keras file of the recipe's network") == 8  # line and table


@pytest.mark.parametrize("tuner", ["grid", "random"])
def test_a_search_whose_space_is_used_up_says_so(tmp_path, capsys, monkeypatch, tuner):
    monkeypatch.setattr("tuning.tuner.run", lambda *arguments, **options: {}["no time for training"])
    fixed = ["--learning_rate=0.03", "--factor=1e-4", "--modulation=off", "--relu_shift=0"]  # the initializer is searched
    status, out, err = invoke(capsys, *TINY, *fixed, f"--tuner={tuner}", "--max_trials=9", f"--workdir={tmp_path / 'search'}")
    assert (status, err) == (0, "") and states(tmp_path / "search") == [(number, FAILED) for number in (1, 2, 3)]
    assert f"\n--tuner={tuner} has nothing more to try after 3 of 9 trials\n" in out


def test_a_trial_that_kills_its_process_again_and_again_is_given_up(search_of_two, tmp_path, capsys):
    given, directory, _ = search_of_two
    directory = shutil.copytree(directory, tmp_path / "search")
    kept, oracle = (json.loads((directory / name).read_text()) for name in ("trial_1/trial.json", "oracle.json"))
    Trial(2, RUNNING, read_trials(directory)[1].recipe, starts=3).write(directory / "trial_1")
    shutil.rmtree(directory / "trial_1" / "run")
    write_json(directory / "trial_1" / "trial.json", {**kept, "status": "RUNNING"})
    write_json(directory / "oracle.json", {**oracle, "ongoing_trials": {"tuner0": "1"}, "end_order": ["0"]})
    status, out, _ = invoke(capsys, *given, "--max_trials=2", f"--workdir={directory}")
    assert status == 0 and "trial 2 of 2: failed: its process ended 3 times without a message" in out
    assert states(directory) == [(1, FINISHED), (2, FAILED)]


CHIEF = {"KERASTUNER_TUNER_ID": "chief", "KERASTUNER_ORACLE_IP": "127.0.0.1"}


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--tuner=annealing"], {}, "flag --tuner=annealing: value should be one of <hyperband|bayesian|random|grid>"),
        (["--max_trials=0"], {}, "flag --max_trials=0: 0 is not a positive integer"),
        (["--budget_minutes=nan"], {}, "--budget_minutes must be at least 0. Received: nan"),
        (["--factor=100"], {}, "--factor must lie in the search space, 1e-06:10. Received: 100.0"),
        (["--factor=-1"], {}, "--factor must be "),
        (["--narrow=factor=5"], {}, "--narrow must be factor=LOW:HIGH within 1e-06:10. Received: 'factor=5'"),
        (["--nohold_out"], {}, "--hold_out must be true: trials are judged by validation images. Received: False"),
        (["--batch_size=2000"], {}, "--batch_size must be at most the number of training images, 1293. Received: 2000"),
        (["--strategy=multi_worker"], {}, "--strategy must be auto, none or mirrored in a search. Received: 'multi_worker'"),
        (["--devices=GPU:7", "--workers=2"], {}, "--devices must be a number of devices or names of one kind"),
        (["--workdir=runs/[1]"], {}, "--workdir must be without * ? [ ], patterns for keras-tuner"),
        (["--signal_every=5"], {}, "--signal_every must be left out: a search has no use for it. Received: 5"),
        (["--max_trial=5"], {}, "Unknown command line flag 'max_trial'"),
        (["digits"], {}, "every argument must be a flag, --name=value. Received: digits"),
        ([], {"KERASTUNER_TUNER_ID": "worker0"}, "KERASTUNER_TUNER_ID, KERASTUNER_ORACLE_IP and KERASTUNER_ORACLE_PORT must"),
        (
            [],
            {**CHIEF, "KERASTUNER_ORACLE_PORT": "http"},
            "KERASTUNER_ORACLE_PORT must be a port, 1 to 65535. Rec",
        ),
        ([], {"TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}}'}, "--strategy must be none or mirrored if TF_CONFIG"),
    ],
)
def test_wrong_input_is_reported_in_one_line(tmp_path, capsys, monkeypatch, arguments, variables, message):
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status, out, err = invoke(capsys, *TINY, *arguments)
    assert status == 2 and out == "" and err.startswith(f"tuning.search: {message}") and err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_chief_whose_port_is_taken(monkeypatch, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {**CHIEF, "KERASTUNER_ORACLE_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        status, _, err = invoke(capsys, *TINY, f"--workdir={tmp_path / 'search'}")
    assert status == 2 and "must be a free address of this machine. Received: 127.0.0.1:" in err


def test_a_worker_and_a_chief_that_wait_say_for_whom(monkeypatch, tmp_path):
    oracle, lines = make_oracle("random", keras_tuner.HyperParameters(), 1, 0, 1), []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        for name, value in {**CHIEF, "KERASTUNER_ORACLE_PORT": str(free.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(workers, "PATIENCE", 1)
        for log in (lines.append, None):  # a worker has come the second time
            with workers.watched_chief(None, oracle, log):
                sleep(1.2)
            oracle.tuner_ids.add("worker0")
        monkeypatch.setenv("KERASTUNER_TUNER_ID", "worker3")
        workers.await_chief(lines.append)
    at = f"127.0.0.1:{os.environ['KERASTUNER_ORACLE_PORT']}"
    assert lines == [f"the chief at {at} is waiting for workers", f"worker3 is waiting for the chief at {at}"]


def test_a_directory_of_something_else_is_left_alone(search_of_two, tmp_path, capsys):
    given, directory, _ = search_of_two
    status, _, err = invoke(capsys, *given, "--search_seed=1", "--momentum=0.8", f"--workdir={directory}")
    assert status == 2 and "--workdir must be empty or hold this very search" in err and err.count("\n") == 1
    assert "search_seed=0 there, 1 here; base: momentum=0.9 there, 0.8 here" in err
    with only_one(directory):
        status, _, err = invoke(capsys, *given, "--max_trials=7", f"--workdir={directory}")
    assert status == 2 and "--workdir is in use by another process. Received: " in err
    (tmp_path / "file").write_text("mine")
    status, _, err = invoke(capsys, *given, f"--workdir={tmp_path}")
    assert status == 2 and "the directory must hold a search" in err and os.listdir(tmp_path) == ["file"]


def test_a_report_by_itself(search_of_two, tmp_path, capsys):
    _, directory, out = search_of_two
    assert report_main([str(directory)]) == 0 and capsys.readouterr().out == out[out.index(f"{directory}: 2 trials") :]
    for arguments, expected in ([str(tmp_path)], "must hold a search"), ([], "usage:"), (["--help"], "usage:"):
        assert report_main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and expected in err and err.count("\n") == 1
