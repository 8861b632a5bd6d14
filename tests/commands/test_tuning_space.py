"""The search space: a fresh point is the recipe, every point is a recipe, and what lies outside is refused."""

import dataclasses

import keras_tuner
import numpy as np
import pytest

from ortho_keras.method.errors import InputError
from ortho_keras.trainer.recipe import Recipe
from ortho_keras.trainer.recipes import RECIPES
from tuning.space import SPACE, Choices, Range, search_space

DIGITS = RECIPES["digits"].recipe


def points(space, count, seed=0):
    """Independent samples of a space, as an oracle makes them."""
    fresh = keras_tuner.HyperParameters()
    space.recipe(fresh)
    for index in range(count):
        hp = keras_tuner.HyperParameters()
        for number, one in enumerate(fresh.space):
            hp.merge([one])
            if hp.is_active(one):
                hp.values[one.name] = one.random_sample(seed + 1000 * index + number)
        yield hp


def sent(hp):
    """Hyperparameters as they arrive in another process."""
    return keras_tuner.HyperParameters.from_proto(hp.to_proto())


def test_a_fresh_point_is_the_recipe_itself():
    digits = {"learning_rate": 7.123456789, "factor": 1.23456789e-9, "relu_shift": 0.77, "tolerance": 1.2345}
    outside = dataclasses.replace(DIGITS, **digits, modulation="anchor", initializer="he_normal")
    for recipe in [outside, *(preset.recipe for preset in RECIPES.values())]:
        space, hp = search_space(recipe), keras_tuner.HyperParameters()
        assert space.recipe(hp) == space.recipe(sent(hp)) == recipe


@pytest.mark.parametrize("name", ["digits", "digits_l2", "resnet44_cifar10"])
def test_every_point_is_a_recipe_in_the_space(name):
    base = RECIPES[name].recipe
    space = search_space(base)
    seen = {key: set() for key in space.parameters}
    for hp in points(space, 200):
        recipe = space.recipe(hp).check()
        assert space.recipe(sent(hp)) == recipe
        assert {f.name for f in dataclasses.fields(Recipe) if getattr(recipe, f.name) != getattr(base, f.name)} <= set(seen)
        for key, values in seen.items():
            assert getattr(recipe, key) in space.parameters[key]
            values.add(getattr(recipe, key))
        if recipe.modulation == "off":
            assert all(getattr(recipe, key) == getattr(base, key) for key in ("tolerance", "modulation_steps"))
    for key, values in seen.items():
        allowed = space.parameters[key]
        assert values == set(allowed.values) if isinstance(allowed, Choices) else len(values) > 190, key
    rates = np.log([space.recipe(hp).learning_rate for hp in points(space, 300)])
    assert np.mean(rates) == pytest.approx((np.log(1e-4) + np.log(1)) / 2, abs=0.6)  # by the logarithm: middle 0.01
    assert rates.min() < np.log(2e-4) and rates.max() > np.log(0.5)


def test_what_cannot_matter_is_not_searched():
    assert set(search_space(DIGITS).parameters) == set(SPACE)
    without = dataclasses.replace(DIGITS, regularizer="none")
    assert set(SPACE) - set(search_space(without).parameters) == {"factor"}
    assert set(SPACE) - set(search_space(DIGITS, ["modulation"]).parameters) == {"modulation", "tolerance", "modulation_steps"}
    on = dataclasses.replace(DIGITS, modulation="anchor")
    assert set(SPACE) - set(search_space(on, ["modulation"]).parameters) == {"modulation"}
    residual = RECIPES["resnet44_cifar10"].recipe
    assert set(SPACE) - set(search_space(residual).parameters) == {"modulation", "tolerance", "modulation_steps"}


def test_narrowed_spaces():
    space = search_space(DIGITS, narrowed=["factor=0.1:1", "modulation=neighbour|anchor", "relu_shift=0|2|3"])
    assert space.parameters["factor"] == Range(0.1, 1.0)
    assert (space.base.factor, space.base.modulation, space.base.relu_shift) == (0.1, "neighbour", 0.0)  # the nearest there
    for hp in points(space, 50):
        recipe = space.recipe(hp)
        assert 0.1 <= recipe.factor <= 1 and recipe.modulation != "off" and recipe.relu_shift in (0, 2, 3)
    one = search_space(DIGITS, narrowed=["modulation=anchor"])
    assert "modulation" not in one.parameters and one.base.modulation == "anchor" and "tolerance" in one.parameters
    between = search_space(dataclasses.replace(DIGITS, relu_shift=0.7), ["relu_shift"])
    assert between.base.relu_shift == 0.7 and "relu_shift" not in between.parameters
    off = search_space(DIGITS, narrowed=["modulation=off"])
    assert not {"modulation", "tolerance", "modulation_steps"} & set(off.parameters)


@pytest.mark.parametrize(
    "changes, fixed, narrowed, message",
    [
        ({"factor": 100.0}, ["factor"], [], "--factor must lie in the search space, 1e-06:10. Received: 100.0"),
        ({"initializer": "glorot_uniform"}, ["initializer"], [], "--initializer must lie in the search space"),
        ({}, [], ["width=8|16"], "--narrow must name one of the searched values, learning_rate, .*Received: 'width=8"),
        ({}, [], ["factor=1:100"], "--narrow must be factor=LOW:HIGH within 1e-06:10. Received: 'factor=1:100'"),
        ({}, [], ["factor=0.1"], "--narrow must be factor=LOW:HIGH"),
        ({}, [], ["tolerance=2|3"], r"--narrow must be tolerance=VALUE\|VALUE of .*Received: 'tolerance=2\|3'"),
        ({}, list(SPACE), [], "must leave something to search"),
    ],
)
def test_what_is_refused(changes, fixed, narrowed, message):
    with pytest.raises(InputError, match=message):
        search_space(dataclasses.replace(DIGITS, **changes), fixed, narrowed)


def test_hyperbands_epochs_replace_the_recipes_and_growth_is_after_the_same_share():
    hp = keras_tuner.HyperParameters()
    space = search_space(dataclasses.replace(DIGITS, start_depth=8, grow_epoch=22, epochs=30))
    space.recipe(hp)
    grown = {}
    assert space.recipe(hp) == space.base
    for epochs in (1, 2, 4, 10, 30):
        hp.values["tuner/epochs"] = epochs
        recipe = space.recipe(hp).check()
        assert dataclasses.replace(recipe, epochs=30, start_depth=8, grow_epoch=22) == space.base
        grown[recipe.epochs] = (recipe.start_depth, recipe.grow_epoch)
    assert grown == {1: (0, 0), 2: (8, 1), 4: (8, 3), 10: (8, 7), 30: (8, 22)}
