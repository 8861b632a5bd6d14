"""Recipes: which values are allowed, the files they are stored in, and what the named ones are meant to be."""

import dataclasses
import json
import math

import pytest

from ortho_keras.method.errors import InputError
from ortho_keras.trainer.optimizers import LearningRate
from ortho_keras.trainer.recipe import Recipe, read_recipe
from ortho_keras.trainer.recipes import RECIPES, Preset, find_preset

METHODS = [name for name in RECIPES if not name.endswith("_l2")]
METHOD = {"initializer", "regularizer", "factor", "modulation", "tolerance"}
METHOD |= {"relu_shift", "start_depth", "grow_epoch"}
OPTIMIZER = {"optimizer", "learning_rate", "rate_depth"}


@pytest.fixture(autouse=True)
def fresh_state():
    """Nothing: no test here makes a layer, and clearing Keras takes longer than most of them."""


def differences(name, other):
    mine, theirs = (RECIPES[each].recipe.to_json() for each in (name, other))
    return {key for key in mine if mine[key] != theirs[key]}


def test_every_recipe_is_sound_and_named_by_network_depth_and_data():
    for name, preset in RECIPES.items():
        recipe = preset.recipe
        assert find_preset(name) is preset and type(preset) is Preset and preset.about
        assert recipe.check() is recipe and recipe.seed == 0 and hash(recipe)
        for field in dataclasses.fields(Recipe):
            assert type(getattr(recipe, field.name)) is field.type and field.metadata["help"]
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
        if name.startswith("digits"):
            assert (recipe.dataset, recipe.network, recipe.depth) == ("digits", "plain", 44)
            continue
        network, data = name.split("_")[:2]
        assert f"{'plain' if recipe.network == 'plain' else 'resnet'}{recipe.depth}" == network
        assert recipe.dataset.startswith("imagenet" if data == "photographs" else data)
        assert recipe.family == ("imagenet" if data in ("imagenet", "photographs") else "cifar")


def test_every_recipe_has_a_baseline_with_the_same_data_steps_and_schedule():
    assert list(RECIPES) == [name for method in METHODS for name in (method, f"{method}_l2")]
    for name in METHODS:
        method, baseline = RECIPES[name].recipe, RECIPES[f"{name}_l2"].recipe
        changed = differences(name, f"{name}_l2")
        assert {"initializer", "regularizer"} <= changed <= METHOD | (OPTIMIZER if method.optimizer == "muon" else set())
        assert method.initializer in ("orthonormal", "dirac") and method.regularizer == "orthonormal" and method.factor > 0
        assert (baseline.initializer, baseline.regularizer, baseline.factor) == ("he_normal", "l2", 1e-4)
        assert (baseline.optimizer, baseline.modulation) == ("sgd", "off")
        assert (baseline.relu_shift, baseline.start_depth, baseline.grow_epoch) == (0, 0, 0)


def test_residual_counterparts_differ_in_the_shortcuts():
    for name in METHODS:
        if name.startswith("resnet"):
            allowed = {"network", "modulation", "tolerance", "learning_rate"} | (
                METHOD | OPTIMIZER if name.endswith("_30epochs") else set()
            )
            assert {"network"} <= differences(name, name.replace("resnet", "plain")) <= allowed
            assert RECIPES[name].recipe.modulation == "off"


def test_the_papers_recipes_have_its_rule_of_modulation():
    for name in ("plain44_cifar10", "plain110_cifar10", "plain101_imagenet"):
        assert (RECIPES[name].recipe.modulation, RECIPES[name].recipe.tolerance) == ("neighbour", 1.1)


@pytest.mark.parametrize(
    ("names", "steps_per_epoch", "steps"),
    [
        ([f"{net}{depth}_cifar10" for net in ("plain", "resnet") for depth in (44, 110)], 45_000 // 128, 64_000),
        ([f"{net}{depth}_imagenet" for net in ("plain", "resnet") for depth in (34, 101)], 1_281_167 // 256, 0),
    ],
)
def test_paper_recipes_have_the_papers_steps_and_drops(names, steps_per_epoch, steps):
    for name in [*names, *(f"{method}_l2" for method in names)]:
        recipe = RECIPES[name].recipe
        photographs = recipe.family == "imagenet"
        assert (recipe.optimizer, recipe.momentum, recipe.precision, recipe.max_steps) == ("sgd", 0.9, "float32", steps)
        expected = (256, 224, 64, "resized_crop", "disk", 90) if photographs else (128, 0, 16, "crop_flip", "memory", 183)
        values = (recipe.batch_size, recipe.image_size, recipe.width, recipe.augment, recipe.storage, recipe.epochs)
        assert values == expected
        total = steps or recipe.epochs * steps_per_epoch
        assert (recipe.epochs - 1) * steps_per_epoch < total <= recipe.epochs * steps_per_epoch
        drops = (30 * steps_per_epoch, 60 * steps_per_epoch) if photographs else (32_000, 48_000)
        rate = LearningRate(recipe.learning_rate, total, recipe.schedule, recipe.warmup_steps)
        at = [recipe.warmup_steps - 1, drops[0] - 1, drops[0], drops[1] - 1, drops[1], total - 1]
        shares = [float(rate(step)) / recipe.learning_rate for step in at]
        assert shares == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-6)


def test_changes_are_the_flags_that_make_one_recipe_of_another():
    preset = RECIPES["plain44_cifar10_30epochs"]
    assert preset.changes(preset.recipe.to_json()) == []
    other = dataclasses.replace(preset.recipe, hold_out=True, bn_sync=False, depth=20, factor=1e-3)
    assert set(preset.changes(other.to_json())) == {"--hold_out", "--nobn_sync", "--depth=20", "--factor=0.001"}
    assert preset.changes(preset.recipe.to_json() | {"bn_shift": 1.0}) == ["--bn_shift=1.0"]  # of an earlier version


def test_a_result_is_of_its_recipe_whatever_its_seed_and_age():
    preset = RECIPES["digits"]
    held = preset.recipe.to_json() | {"seed": 3, "bn_shift": 0.0}  # a value of an earlier version at its default
    del held["storage"]  # and one that is younger
    assert preset.gave({"recipe": held, "seed": 3}) and not preset.gave({"recipe": held | {"depth": 20}, "seed": 3})
    with pytest.raises(ValueError, match="no such value: {'bn_shift': 1.0}"):
        preset.gave({"recipe": held | {"bn_shift": 1.0}, "seed": 3})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"factor": -1e-9}, "--factor must be a finite number, at least 0. Received: --factor=-1e-09"),
        ({"learning_rate": math.nan}, "--learning_rate must be a finite number, above 0. Received: --learning_rate=nan"),
        ({"seed": 2**31}, "--seed must be an integer, at least 0 and at most 2147483647. Received: --seed=2147483648"),
        ({"depth": 44.0}, "--depth must be an integer, at least 8. Received: --depth=44.0"),
        ({"hold_out": 1}, "--hold_out must be a bool. Received: 1"),
        ({"network": "dense"}, "--network must be one of plain, residual. Received: 'dense'"),
        ({"relu_shift": -0.5}, "--relu_shift must be at least 0, or -1. Received: -0.5"),
        ({"depth": 45}, "--depth must be 6n + 2; the nearest are 44 and 50. Received: 45"),
        ({"depth": 9}, "--depth must be 6n + 2; the nearest are 8 and 14. Received: 9"),
        ({"depth": 50, "family": "imagenet"}, "--depth must be one of 34, 101 with --family imagenet. Received: 50"),
        ({"start_depth": 2}, "--start_depth must be 6n + 2; the nearest are 8 and 14. Received: 2"),
        ({"start_depth": 44, "grow_epoch": 1}, "--start_depth must be less than --depth, 44. Received: 44"),
        ({"start_depth": 8, "network": "residual"}, "--start_depth must be 0 for --network residual. Received: 8"),
        ({"start_depth": 34, "depth": 101, "family": "imagenet"}, "--start_depth must be 0 for --depth 101 of imagenet. "),
        ({"start_depth": 8}, "--grow_epoch must be at least 1 and less than --epochs, 60, with --start_depth. Received: 0"),
        ({"start_depth": 8, "grow_epoch": 60}, "--grow_epoch must be at least 1 and less than --epochs, 60, with --start_d"),
        ({"optimizer": "muon", "momentum": 1.0}, "--momentum must be below 1 with --optimizer muon. Received: 1.0"),
        ({"storage": "disk", "dataset": "cifar10"}, "--image_size must be at least 1 with --storage disk. Received: 0"),
        ({"network": "residual", "modulation": "anchor"}, "--modulation must be off for --network residual: shortcuts break"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(values, expected):
    with pytest.raises(InputError) as caught:
        Recipe(**values).check()
    message = str(caught.value)
    assert message.startswith(expected) and "Received: " in message and "\n" not in message


def test_every_number_and_choice_is_held_to_its_range():
    for field in dataclasses.fields(Recipe):
        name, choices, limits = field.name, field.metadata["choices"], field.metadata["limits"]
        step = 1 if field.type is int else 1e-6
        wrong = [limits[key] + sign * step for key, sign in (("least", -1), ("most", 1)) if key in limits]
        wrong += [limits["above"]] if "above" in limits else []
        wrong += [math.inf, -math.inf, True, "1"] if field.type in (int, float) else [3]
        wrong += ["adamant"] if choices else []
        for value in wrong:
            with pytest.raises(InputError, match=f"^--{name} must be "):
                Recipe(**{name: value}).check()
        for value in [*(choices or ()), *(limits[key] for key in ("least", "most") if key in limits)]:
            depth = 34 if value == "imagenet" else 8
            Recipe(**{"dataset": "cifar10", "image_size": 8, "depth": depth, name: value}).check()


def test_unknown_recipe():
    with pytest.raises(InputError, match="A recipe must be .*; did you mean digits.* Received: 'digit'"):
        find_preset("digit")


def test_a_recipe_file_is_the_recipe(tmp_path):
    path = tmp_path / "mine.json"
    for name, preset in RECIPES.items():
        path.write_text(json.dumps({"recipe_name": name, "recipe": preset.recipe.to_json(), "more": 1}))
        assert read_recipe(path) == (name, preset.recipe)
    path.write_text(json.dumps({"recipe": {"depth": 20, "factor": 1}}))
    assert read_recipe(path) == ("mine", Recipe(depth=20, factor=1.0))


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "No such file or directory"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "nested too deep"),
        ("[]", "its content is [], expected an object"),
        ("{}", "recipe is None, expected an object"),
        ('{"recipe": {"colour": 3}}', "no such value: {'colour': 3}"),
        ('{"recipe": {"%s": 3}}' % ("red\\n" * 999), "no such value: {"),
        ('{"recipe": {"learning_rate": 1%s}}' % ("0" * 400), "--learning_rate must be a finite number, above 0. Received: "),
        ('{"recipe": {"depth": [[[3]]]}}', "recipe.depth is [[[3]]], expected"),
        ('{"recipe": {}, "recipe_name": {}}', "recipe_name is {}, expected a string or null"),
        ('{"recipe": {"depth": "44"}}', "--depth must be an integer"),
        ('{"recipe": {"augment": null}}', "recipe.augment is None, expected"),
    ],
)
def test_a_file_that_holds_no_recipe(tmp_path, content, expected):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    message = str(caught.value)
    assert message.startswith("--recipe_file must be a JSON file with a recipe") and expected in message
    assert "\n" not in message and len(message) < 400
