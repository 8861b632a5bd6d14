"""The report of searches that are finished, killed, failed, empty or damaged, and which values it finds to matter."""

import dataclasses
import json
import shlex

import numpy as np
import pytest

from ortho_keras.method.errors import InputError
from ortho_keras.method.files import write_json
from ortho_keras.trainer.recipe import read_recipe
from ortho_keras.trainer.recipes import RECIPES
from tuning.report import command, draw, importance, importance_table, report, shown
from tuning.space import search_space
from tuning.trials import FAILED, FINISHED, HOPELESS, RUNNING, SEARCH_FILE, Trial, best_trial

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
    assert "best: trial 4, validation accuracy 0.9500" in text and "needs 8 trials with different accuracies" in text
    assert read_recipe(directory / "best.json") == ("digits", trials[3].recipe)
    assert "python train.py --recipe=digits --modulation=anchor --tolerance=4.0" in text


@pytest.mark.parametrize("trials", [[], [trial(1, RUNNING), trial(2, FAILED, None, "no memory"), trial(3, HOPELESS, 0.1)]])
def test_searches_without_a_finished_trial(tmp_path, trials):
    assert "no trial has finished yet" in report(make_search(tmp_path / "search", trials))
    assert not (tmp_path / "search" / "best.json").exists()


def test_the_best_of_equal_scores_and_of_different_lengths():
    equal = [trial(number, FINISHED, 0.5) for number in range(1, 13)]
    assert best_trial(equal).number == 1
    assert best_trial([dataclasses.replace(own, crossentropy=abs(own.number - 11) + 1) for own in equal]).number == 11
    assert best_trial([trial(1, FINISHED, 0.9, epochs=3), trial(2, FINISHED, 0.8), trial(3, FINISHED, 0.7)]).number == 2


def test_what_mattered_is_found():
    """Accuracy is a function of the learning rate and, less, of the rule; all else is noise."""
    random, trials = np.random.default_rng(0), []
    for number in range(1, 61):
        rate, rule = 10 ** random.uniform(-4, 0), random.choice(["off", "neighbour", "anchor"])
        score = 0.5 - 0.1 * np.log10(rate) + 0.15 * (rule == "anchor")
        values = {"learning_rate": rate, "modulation": str(rule), "factor": 10 ** random.uniform(-6, 1)}
        trials.append(trial(number, FINISHED, float(score), relu_shift=float(random.choice([0, 1, 2])), **values))
    found = importance(trials, ["factor", "relu_shift", "modulation", "learning_rate"])
    rows = [line.split() for line in importance_table(found, 60)[3:]]
    assert [row[0] for row in rows[:2]] == ["learning_rate", "modulation"]
    assert float(rows[0][1]) > 0.6 and float(rows[0][2]) < -0.8 and all(float(row[1]) < 0.06 for row in rows[2:])
    assert sum(float(row[1]) for row in rows) == pytest.approx(1, abs=0.03)


def test_hyperbands_short_trials_are_not_compared_with_long_ones():
    trials = [trial(n, FINISHED, 0.01 * n, epochs=3, learning_rate=0.001 * n) for n in range(1, 9)]
    trials += [trial(n, FINISHED, 1 - 0.01 * n, epochs=9, learning_rate=0.001 * n) for n in range(9, 17)]
    assert importance(trials, ["learning_rate"])["learning_rate"][1] == pytest.approx(-1)


def test_the_plot_shows_the_finished_trials_range(monkeypatch):
    figures = []
    monkeypatch.setattr("tuning.report.save", lambda figure, path: figures.append(figure))
    scores = (0.95, FINISHED), (0.98, FINISHED), (0.1, HOPELESS)
    trials = [trial(1, state, score, learning_rate=rate) for rate, (score, state) in zip((0.01, 0.1, 1.0), scores)]
    draw(trials, ["learning_rate", "optimizer"], "search.png")
    figures[0].draw_without_rendering()
    panels = figures[0].axes
    assert [axes.get_xlabel() for axes in panels] == ["learning_rate", "optimizer"]
    assert figures[0].get_supylabel() == "validation accuracy"
    assert 0.93 < panels[0].get_ylim()[0] < 0.95 and 0.98 < panels[0].get_ylim()[1] < 0.99
    finished, hopeless = (points.get_offsets() for points in panels[0].collections)
    np.testing.assert_allclose(finished, [[0.01, 0.95], [0.1, 0.98]])
    np.testing.assert_allclose(hopeless, [[1.0, 0.95 - 0.05 * 0.03]])


def test_a_command_names_what_differs():
    recipe = dataclasses.replace(BASE, hold_out=False, dataset="folder:my photos", depth=50)
    assert shlex.split(command("digits", recipe)) == [
        "python", "train.py", "--recipe=digits", "--dataset=folder:my photos", "--nohold_out", "--depth=50",
    ]  # fmt: skip
    assert command("mine", RECIPES["plain44_cifar10"].recipe).startswith("python train.py --recipe=digits --dataset=cifar10")


@pytest.mark.parametrize("content", ["[]", "{", '{"base": {"colour": 1}, "parameters": {}, "recipe_name": "digits"}'])
def test_a_damaged_search(tmp_path, content):
    (tmp_path / SEARCH_FILE).write_text(content)
    with pytest.raises(InputError, match="the directory must hold a search"):
        report(tmp_path)


def test_a_damaged_trial_and_one_of_an_older_version_which_lacks_a_value(tmp_path):
    directory = make_search(tmp_path / "search", [trial(1, FINISHED, 0.5)])
    path = directory / "trial_0" / "outcome.json"
    content = json.loads(path.read_text())
    del content["recipe"]["label_smoothing"]
    write_json(path, content)
    assert "best: trial 1" in report(directory)
    for damaged in (b"", b"{", b"[]", b"\xff", *(json.dumps({**content, name: {"a": 1}}).encode() for name in content)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"^each outcome.json of a search must be whole. Received: .*json' \(.*\)$"):
            report(directory)
    for change in ({"score": None}, {"state": "done"}, {"state": "hopeless", "score": None}):
        write_json(path, {**content, **change})
        with pytest.raises(InputError, match="outcome.json' .state is "):
            report(directory)
    for damaged in (
        "",
        "[]",
        *(json.dumps({**json.loads((directory / "search.json").read_text()), "base": base}) for base in (1, {"depth": "x"})),
    ):
        (directory / "search.json").write_text(damaged)
        with pytest.raises(InputError, match=r"^the directory must hold a search. Received: .*search.json' \(.*\)$"):
            report(directory)
