"""The report: what it says of searches that are over, half done, failed or empty, and which values it finds to matter."""

import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest

from ortho_keras.method.errors import InputError
from ortho_keras.method.files import write_json
from ortho_keras.trainer.recipe import read_recipe
from ortho_keras.trainer.recipes import RECIPES
from tuning.report import command, importance_table, report, shown
from tuning.space import search_space
from tuning.trials import FAILED, FINISHED, HOPELESS, RUNNING, SEARCH_FILE, Trial

ROOT = pathlib.Path(__file__).resolve().parents[2]
BASE = RECIPES["digits"].recipe


def make_search(directory, trials, recipe=BASE, name="digits"):
    directory.mkdir(exist_ok=True)
    write_json(directory / SEARCH_FILE, {"recipe_name": name, "tuner": "random", **search_space(recipe).to_json()})
    for trial in trials:
        folder = directory / f"trial_{trial.number - 1}"
        folder.mkdir()
        trial.write(folder)
    return directory


def trial(number, state, score=None, reason="", crossentropy=0.5, **values):
    return Trial(number, state, dataclasses.replace(BASE, **values), score, crossentropy, 10.0, reason)


def test_a_value_that_says_nothing_is_not_shown():
    off, on = trial(1, FINISHED, 0.9, tolerance=4.0), trial(2, FINISHED, 0.9, tolerance=4.0, modulation="anchor")
    assert (shown(off, "tolerance"), shown(on, "tolerance"), shown(on, "factor")) == ("", "4", "0.01")
    assert shown(trial(3, FINISHED, 0.9, regularizer="none"), "factor") == ""


def test_a_search_that_was_killed_half_way(tmp_path):
    trials = [
        trial(1, FINISHED, 0.9),
        trial(2, HOPELESS, 0.1, "the loss became inf at step 3 of 80", learning_rate=0.5),
        trial(3, FAILED, None, "no memory"),
        trial(4, FINISHED, 0.95, modulation="anchor", tolerance=4.0),
        trial(5, RUNNING),
    ]
    directory = make_search(tmp_path / "search", trials)
    (directory / "trial_5").mkdir()  # a trial that was killed before it wrote a word
    text = report(directory)
    rows = [line.split() for line in text.splitlines() if line[:1].isdecimal()]
    assert [row[0] for row in rows] == ["4", "1", "2", "3", "5"] and rows[0][1] == "0.9500" and rows[0][-1] == "finished"
    assert "5 trials (2 finished, 1 hopeless, 1 failed, 1 unfinished)" in text
    assert "hopeless: the loss became inf at step 3 of 80" in text and "failed: no memory" in text
    assert "best: trial 4, validation accuracy 0.9500" in text and "8 trials with different accuracies would tell" in text
    assert read_recipe(directory / "best.json") == ("digits", trials[3].recipe)
    assert "python train.py --recipe=digits --modulation=anchor --tolerance=4.0" in text


@pytest.mark.parametrize("trials", [[], [trial(1, RUNNING)], [trial(1, FAILED, None, "no memory")], [trial(1, HOPELESS, 0.1)]])
def test_searches_without_a_finished_trial(tmp_path, trials):
    assert "no trial is finished yet" in report(make_search(tmp_path / "search", trials))
    assert not (tmp_path / "search" / "best.json").exists()


def test_equal_scores_and_trials_past_ten(tmp_path):
    directory = make_search(tmp_path / "equal", [trial(number, FINISHED, 0.5) for number in range(1, 13)])
    assert "best: trial 1," in report(directory)
    trials = [trial(number, FINISHED, 0.5, crossentropy=abs(number - 11) + 1) for number in range(1, 13)]
    assert "best: trial 11," in report(make_search(tmp_path / "unequal", trials))


def test_what_mattered_is_found():
    """Accuracy is a function of the learning rate and, less, of the rule; all else is noise."""
    random, trials = np.random.default_rng(0), []
    for number in range(1, 61):
        rate, rule = 10 ** random.uniform(-4, 0), random.choice(["off", "neighbour", "anchor"])
        score = 0.5 - 0.1 * np.log10(rate) + 0.15 * (rule == "anchor")
        values = {"learning_rate": rate, "modulation": str(rule), "factor": 10 ** random.uniform(-6, 1)}
        trials.append(trial(number, FINISHED, float(score), relu_shift=float(random.choice([0, 1, 2])), **values))
    rows = [line.split() for line in importance_table(trials, ["factor", "relu_shift", "modulation", "learning_rate"])[3:]]
    assert [row[0] for row in rows[:2]] == ["learning_rate", "modulation"]
    assert float(rows[0][1]) > 0.6 and float(rows[0][2]) < -0.8 and all(float(row[1]) < 0.06 for row in rows[2:])
    assert sum(float(row[1]) for row in rows) == pytest.approx(1, abs=0.03)


def test_hyperbands_short_trials_are_not_compared_with_long_ones():
    trials = [trial(n, FINISHED, 0.01 * n, epochs=3, learning_rate=0.001 * n) for n in range(1, 9)]
    trials += [trial(n, FINISHED, 1 - 0.01 * n, epochs=9, learning_rate=0.001 * n) for n in range(9, 17)]
    row = next(line.split() for line in importance_table(trials, ["learning_rate"]) if line.startswith("learning_rate"))
    assert row[2] == "-1.00"


def test_a_command_names_what_differs():
    recipe = dataclasses.replace(BASE, hold_out=False, dataset="folder:my photos", depth=50)
    assert shlex.split(command("digits", recipe)) == [
        "python", "train.py", "--recipe=digits", "--dataset=folder:my photos", "--nohold_out", "--depth=50",
    ]  # fmt: skip
    assert command("mine", RECIPES["plain44_cifar10"].recipe).startswith("python train.py --recipe=digits --dataset=cifar10")


def test_what_is_no_search(tmp_path):
    with pytest.raises(InputError, match="the directory must hold a search"):
        report(tmp_path)
    for arguments, expected in ([str(tmp_path)], "must hold a search"), ([], "usage:"), (["--help"], "usage:"):
        done = subprocess.run([sys.executable, "-m", "tuning.report", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "" and expected in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "content", ["{}", "[]", "3", "{", '{"base": {"colour": 1}, "parameters": {}, "recipe_name": "digits"}']
)
def test_a_damaged_search(tmp_path, content):
    (tmp_path / SEARCH_FILE).write_text(content)
    with pytest.raises(InputError, match="the directory must hold a search"):
        report(tmp_path)


def test_a_damaged_trial(tmp_path):
    directory = make_search(tmp_path / "search", [trial(1, FINISHED, 0.5)])
    (directory / "trial_0" / "outcome.json").write_text("{")
    with pytest.raises(InputError, match="trial_0/outcome.json must be a trial's file"):
        report(directory)


def test_the_best_is_one_of_the_longest(tmp_path):
    trials = [trial(1, FINISHED, 0.9, epochs=3), trial(2, FINISHED, 0.8), trial(3, FINISHED, 0.7)]
    assert "best: trial 2," in report(make_search(tmp_path / "search", trials))


def test_a_search_of_an_older_version_lacks_a_value(tmp_path):
    directory = make_search(tmp_path / "search", [trial(1, FINISHED, 0.5)])
    path = directory / "trial_0" / "outcome.json"
    content = json.loads(path.read_text())
    del content["recipe"]["label_smoothing"]
    write_json(path, content)
    assert "best: trial 1" in report(directory)
