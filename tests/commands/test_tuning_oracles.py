"""The oracles: a search that is killed anywhere goes on as if it had not been."""

import json

import keras_tuner
import pytest

from ortho_keras.method.errors import InputError
from ortho_keras.trainer.recipes import RECIPES
from tuning.oracles import TUNERS, make_oracle
from tuning.space import search_space

SPACE = search_space(RECIPES["digits"].recipe, ["learning_rate", "factor", "initializer"], ["tolerance=1.1|2|4"])


def oracle(tuner, folder, space=SPACE, max_trials=13, reload=False):
    hp = keras_tuner.HyperParameters()
    space.recipe(hp)
    made = make_oracle(tuner, hp, max_trials, 0, max_epochs=9)
    made._set_project_dir(str(folder), "search")
    if reload:
        made.reload()
    return made


def score(recipe):
    return recipe.relu_shift / 10 + recipe.tolerance / 100 + (recipe.modulation == "anchor") / 1000


def finish(made, trial, value=None):
    """Ends a trial, with a score that is a function of its recipe, as a worker does: through keras-tuner's messages."""
    value = score(SPACE.recipe(trial.hyperparameters)) if value is None else value
    made.update_trial(trial.trial_id, {"validation_accuracy": value})
    ended = type(trial).from_proto(trial.to_proto())
    ended.status = "COMPLETED"
    made.end_trial(ended)


def all_trials(made, stop_after=None):
    recipes = []
    while len(recipes) != stop_after:
        trial = made.create_trial("me")
        if trial.status != "RUNNING":
            break
        recipes.append(SPACE.recipe(trial.hyperparameters))
        finish(made, trial)
    return recipes


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_search_that_was_killed_is_the_one_that_was_not(tuner, tmp_path):
    count = 6 if tuner == "bayesian" else 13  # whose every choice from the fifth on takes a second
    whole = all_trials(oracle(tuner, tmp_path / "whole", max_trials=count))
    assert len(whole) == count and (tuner == "hyperband" or whole[0] == SPACE.base)  # the recipe itself first
    cut = oracle(tuner, tmp_path / "cut", max_trials=count)
    recipes = all_trials(cut, 5)
    running = cut.create_trial("me")  # killed in this trial
    again = oracle(tuner, tmp_path / "cut", max_trials=count, reload=True)
    assert again.create_trial("other").trial_id == running.trial_id
    finish(again, again.get_trial(running.trial_id))
    recipes += [SPACE.recipe(running.hyperparameters), *all_trials(again)]
    assert recipes == whole


def test_the_grid_is_every_combination_once(tmp_path):
    fixed = ["learning_rate", "initializer", "modulation_steps"]
    space = search_space(RECIPES["digits"].recipe, fixed, ["relu_shift=0|1", "tolerance=1.1|2"])
    made, seen = oracle("grid", tmp_path, space, max_trials=10_000), []
    while (trial := made.create_trial("me")).status == "RUNNING":
        seen.append(space.recipe(trial.hyperparameters))
        made.ongoing_trials.clear()
    moments = 1 + 2 * 2  # off, or two rules by two tolerances
    assert len(seen) == len(set(seen)) == 2 * moments * (1 + 10)  # a range: its default and ten values
    assert seen[0] == space.base


@pytest.mark.parametrize(("max_trials", "epochs"), [(100, [1] * 9 + [3] * 3 + [9]), (12, [3] * 5 + [9] * 2), (4, [9] * 3)])
def test_hyperband_repeats_the_best_and_begins_with_a_bracket_that_it_can_end(tmp_path, max_trials, epochs):
    """By hand, of 9 epochs: brackets of 9, 3 and 1 trials; of 5 and 2; of 3."""
    recipes = all_trials(oracle("hyperband", tmp_path, max_trials=max_trials), len(epochs))
    assert sorted(recipe.epochs for recipe in recipes) == epochs
    scores = {length: sorted(score(recipe) for recipe in recipes if recipe.epochs == length) for length in epochs}
    for short, long in zip(sorted(scores), sorted(scores)[1:]):  # the best are repeated for longer
        assert scores[long] == scores[short][-len(scores[long]) :]


def test_a_failed_trial_is_hyperbands_worst_and_the_bracket_goes_on(tmp_path):
    made = oracle("hyperband", tmp_path, max_trials=13)
    epochs = []
    while (trial := made.create_trial("me")).status == "RUNNING":
        epochs.append(SPACE.recipe(trial.hyperparameters).epochs)
        if len(epochs) in (2, 5):
            trial.status = "FAILED"
            made.end_trial(trial)
        else:
            finish(made, trial)
    assert epochs == [1] * 9 + [3] * 3 + [9]


def test_a_kill_between_the_files_of_a_trial_and_of_the_oracle(tmp_path, monkeypatch):
    for tuner in TUNERS:
        made = oracle(tuner, tmp_path / tuner)
        all_trials(made, 3)
        monkeypatch.setattr(made, "save", lambda: None)
        lost = made.create_trial("me")
        again = oracle(tuner, tmp_path / tuner, reload=True)
        assert sorted(again.trials) == ["00", "01", "02"]
        chosen = again.create_trial("me")
        assert chosen.trial_id == lost.trial_id and chosen.hyperparameters.values == lost.hyperparameters.values
        finish(again, chosen)


@pytest.mark.parametrize("name", ["oracle.json", "trial_00/trial.json"])
def test_damaged_files_are_one_line(tmp_path, name):
    all_trials(oracle("random", tmp_path), 2)
    path = tmp_path / "search" / name
    content, expected = json.loads(path.read_text()), "^the files of a search must be whole. Received: '[^\n]*' [(][^\n]*[)]$"
    free = ("id_to_hash", "run_times", "best_step", "message")  # in which it does no harm
    other = [json.dumps({**content, key: {"a": 1}}) for key in content if key not in free]
    lacking = [json.dumps({one: value for one, value in content.items() if one != key}) for key in content]
    for text in ("", "{", "[]", "[" * 100_000, *other, *lacking):
        path.write_text(text)
        with pytest.raises(InputError, match=expected):
            oracle("random", tmp_path, reload=True)


def test_a_trial_that_has_ended_is_not_run_again_and_keeps_its_exact_values(tmp_path):
    made = oracle("random", tmp_path, max_trials=3)
    for _ in range(3):
        trial = made.create_trial("me")
        before = dict(trial.hyperparameters.values)
        finish(made, trial, 0.5)
        kept = json.loads((tmp_path / "search" / f"trial_{trial.trial_id}" / "trial.json").read_text())
        assert kept["hyperparameters"]["values"] == before and kept["score"] == 0.5
    assert json.loads((tmp_path / "search" / "oracle.json").read_text())["ongoing_trials"] == {}
    assert oracle("random", tmp_path, max_trials=3, reload=True).create_trial("me").status == "STOPPED"
