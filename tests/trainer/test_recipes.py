import dataclasses
import json
import math

import pytest

from ortho_keras.method.errors import InputError
from ortho_keras.trainer.recipe import OPTIMIZERS, Recipe, read_recipe
from ortho_keras.trainer.recipes import RECIPES, Preset, find_preset
from ortho_keras.trainer.optimizers import LearningRate

METHODS = [name for name in RECIPES if not name.endswith("_l2")]
PAPER = ["plain44_cifar10", "plain110_cifar10", "resnet44_cifar10", "resnet110_cifar10"]
SMOKE = ["plain34_imagenet_smoke", "plain34_imagenet_smoke_l2"]
CIFAR10_STEPS = 45_000 // 128  # an epoch: a tenth of 50,000 is held out


@pytest.fixture(autouse=True)
def fresh_state():
    """Nothing: no test here makes a layer, and clearing Keras takes longer than most of them."""


def differences(recipe, other):
    mine, theirs = dataclasses.asdict(recipe), dataclasses.asdict(other)
    return {name for name in mine if mine[name] != theirs[name]}


def refusal(**values):
    """The message with which `check` refuses: one line."""
    with pytest.raises(InputError) as caught:
        Recipe(**values).check()
    message = str(caught.value)
    assert "\n" not in message and " must be " in message and "Received: " in message
    return message


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_sound(name):
    preset = find_preset(name)
    assert preset is RECIPES[name] and type(preset) is Preset and preset.about
    assert preset.recipe.check() is preset.recipe
    for field in dataclasses.fields(Recipe):
        assert type(getattr(preset.recipe, field.name)) is field.type  # as a flag would give it
    assert Recipe.from_json(json.loads(json.dumps(preset.recipe.to_json()))) == preset.recipe
    assert preset.recipe.seed == 0


@pytest.mark.parametrize("name", METHODS)
def test_every_recipe_has_a_control(name):
    method, control = RECIPES[name].recipe, RECIPES[f"{name}_l2"].recipe
    allowed = {
        "initializer",
        "stem_initializer",
        "widening_initializer",
        "regularizer",
        "factor",
        "modulation",
        "bn_shift",
        "relu_shift",
        "optimizer",
        "learning_rate",
        "rate_depth",
        "start_depth",
        "grow_epoch",
        "mirror_symmetry",
    }
    assert {"initializer", "regularizer"} <= differences(method, control) <= allowed
    assert method.initializer in ("orthonormal", "dirac") and method.regularizer == "orthonormal"
    assert (control.initializer, control.regularizer) == ("he_normal", "l2")
    assert (control.modulation, control.bn_shift, control.start_depth, control.grow_epoch) == ("off", 0, 0, 0)
    assert not control.mirror_symmetry
    assert method.factor > 0 and control.factor > 0


def test_there_is_no_control_without_its_recipe():
    assert sorted(RECIPES) == sorted([*METHODS, *(f"{name}_l2" for name in METHODS)])
    assert {"digits", *PAPER} <= set(METHODS)


@pytest.mark.parametrize("name", [*PAPER, *(f"{name}_l2" for name in PAPER)])
def test_paper_recipes_run_64k_steps_with_drops_at_32k_and_48k(name):
    recipe = RECIPES[name].recipe
    assert (recipe.batch_size, recipe.max_steps, recipe.schedule, recipe.warmup_steps) == (128, 64_000, "step", 400)
    assert recipe.epochs * CIFAR10_STEPS >= 64_000  # so that the limit ends the run, not the epochs
    assert (recipe.epochs - 1) * CIFAR10_STEPS < 64_000
    assert (recipe.optimizer, recipe.momentum, recipe.augment, recipe.precision) == ("sgd", 0.9, "crop_flip", "float32")
    rate = LearningRate(recipe.learning_rate, recipe.max_steps, recipe.schedule, recipe.warmup_steps)
    shares = [float(rate(step)) / recipe.learning_rate for step in (399, 31_999, 32_000, 47_999, 48_000, 63_999)]
    assert shares == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_names_tell_network_depth_and_data(name):
    recipe = RECIPES[name].recipe
    if name.startswith("digits"):
        assert (recipe.dataset, recipe.network, recipe.depth) == ("digits", "plain", 44)
        return
    network, data = name.split("_")[:2]
    assert f"{'plain' if recipe.network == 'plain' else 'resnet'}{recipe.depth}" == network
    if name in SMOKE:
        assert recipe.family == data and recipe.dataset == "imagenette"  # the small subset, or a folder
    elif data == "imagenet":
        assert (recipe.family, recipe.dataset) == (data, "imagenet2012")
    else:
        assert (recipe.family, recipe.dataset) == ("cifar", data)


@pytest.mark.parametrize("name", [name for name in RECIPES if "_imagenet" in name])
def test_imagenet_recipes_run_90_epochs_with_drops_at_30_and_60(name):
    recipe = RECIPES[name].recipe
    assert (recipe.augment, recipe.optimizer, recipe.momentum, recipe.precision) == ("resized_crop", "sgd", 0.9, "float32")
    assert recipe.schedule == "thirds"
    if name in SMOKE:
        return
    assert (recipe.epochs, recipe.batch_size, recipe.image_size, recipe.width, recipe.hold_out) == (90, 256, 224, 64, False)
    epoch = 1_281_167 // 256
    rate = LearningRate(recipe.learning_rate, 90 * epoch, recipe.schedule, recipe.warmup_steps)
    steps = [2499, 30 * epoch - 1, 30 * epoch, 60 * epoch - 1, 60 * epoch, 90 * epoch - 1]
    assert [float(rate(step)) / 0.1 for step in steps] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-6)


def test_photographs_need_a_size_and_a_depth_of_theirs():
    assert refusal(storage="disk") == "--image_size must be at least 1 with --storage disk. Received: 0"
    expected = "--depth must be one of 34, 44, 101 with --family imagenet. Received: 50"
    assert refusal(family="imagenet", depth=50) == expected
    for depth in (34, 44, 101):
        Recipe(family="imagenet", depth=depth).check()


@pytest.mark.parametrize("depth", [34, 101])
def test_residual_twins_for_photographs_differ_in_the_shortcuts(depth):
    plain, twin = RECIPES[f"plain{depth}_imagenet"].recipe, RECIPES[f"resnet{depth}_imagenet"].recipe
    assert {"network"} <= differences(plain, twin) <= {"network", "modulation"} and twin.modulation == "off"


@pytest.mark.parametrize("depth", [44, 110])
def test_residual_twins_differ_in_the_shortcuts(depth):
    plain, twin = RECIPES[f"plain{depth}_cifar10"].recipe, RECIPES[f"resnet{depth}_cifar10"].recipe
    assert {"network"} <= differences(plain, twin) <= {"network", "modulation", "learning_rate"}
    assert twin.modulation == "off"


def test_the_residual_twin_in_16_epochs_sees_the_same_images_and_steps():
    plain, twin = RECIPES["plain44_cifar10_fast"].recipe, RECIPES["resnet44_cifar10_fast"].recipe
    method = {"initializer", "stem_initializer", "relu_shift", "optimizer", "factor", "learning_rate", "rate_depth"}
    assert differences(plain, twin) == {"network", *method}


def test_changes_are_the_flags_that_make_one_recipe_of_another():
    preset = RECIPES["plain44_cifar10_fast"]
    assert preset.changes(preset.recipe) == []
    other = dataclasses.replace(preset.recipe, hold_out=True, bn_sync=False, depth=20, factor=1e-3)
    assert set(preset.changes(other)) == {"--hold_out", "--nobn_sync", "--depth=20", "--factor=0.001"}


@pytest.mark.parametrize("name", [name for name in RECIPES if "_short" in name])
def test_short_recipes_differ_in_length_and_schedule_only(name):
    changes = differences(RECIPES[name].recipe, RECIPES[name.replace("_short", "")].recipe)
    assert {"epochs", "max_steps"} <= changes <= {"epochs", "max_steps", "schedule", "warmup_steps"}
    assert RECIPES[name].recipe.max_steps == 0 and RECIPES[name].recipe.epochs <= 10


@pytest.mark.parametrize("name", [name for name in METHODS if RECIPES[name].recipe.optimizer == "muon"])
def test_fast_recipes_and_their_controls_have_the_same_data_steps_and_schedule(name):
    fast, control = RECIPES[name].recipe, RECIPES[f"{name}_l2"].recipe
    assert (fast.max_steps, fast.batch_size) == (0, 128) and fast.epochs == (30 if "30epochs" in name else 16)
    method = {
        "initializer",
        "stem_initializer",
        "regularizer",
        "factor",
        "relu_shift",
        "optimizer",
        "learning_rate",
        "rate_depth",
    }
    growth = {"start_depth", "grow_epoch"} if "30epochs" in name else set()
    assert differences(fast, control) == method | growth
    assert (control.optimizer, control.relu_shift, control.initializer) == ("sgd", 0.0, "he_normal")
    assert control.stem_initializer == "same"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"factor": -1e-9}, "--factor must be at least 0. Received: -1e-09"),
        ({"factor": math.nan}, "--factor must be a finite number. Received: nan"),
        ({"factor": math.inf}, "--factor must be a finite number. Received: inf"),
        ({"bn_shift": -math.inf}, "--bn_shift must be a finite number. Received: -inf"),
        ({"batch_size": 0}, "--batch_size must be at least 1. Received: 0"),
        ({"depth": 2}, "--depth must be at least 8. Received: 2"),
        ({"width": 0}, "--width must be at least 1. Received: 0"),
        ({"epochs": 0}, "--epochs must be at least 1. Received: 0"),
        ({"max_steps": -1}, "--max_steps must be at least 0. Received: -1"),
        ({"warmup_steps": -1}, "--warmup_steps must be at least 0. Received: -1"),
        ({"learning_rate": 0.0}, "--learning_rate must be more than 0. Received: 0.0"),
        ({"learning_rate": math.nan}, "--learning_rate must be a finite number. Received: nan"),
        ({"label_smoothing": 1.0}, "--label_smoothing must be at most 0.9. Received: 1.0"),
        ({"momentum": 1.5}, "--momentum must be at most 1. Received: 1.5"),
        ({"weight_decay": -0.1}, "--weight_decay must be at least 0. Received: -0.1"),
        ({"tolerance": 0.5}, "--tolerance must be at least 1. Received: 0.5"),
        ({"max_scale": 0.0}, "--max_scale must be at least 1. Received: 0.0"),
        ({"bn_batches": -1}, "--bn_batches must be at least 0. Received: -1"),
        ({"evaluate_every": 0}, "--evaluate_every must be at least 1. Received: 0"),
        ({"crop_border": -1}, "--crop_border must be at least 0. Received: -1"),
        ({"cutout": -1}, "--cutout must be at least 0. Received: -1"),
        ({"image_size": -8}, "--image_size must be at least 0. Received: -8"),
        ({"image_size": 5000}, "--image_size must be at most 4096. Received: 5000"),
        ({"seed": -1}, "--seed must be at least 0. Received: -1"),
        ({"seed": 2**31}, "--seed must be at most 2147483647. Received: 2147483648"),
        ({"augment": "flip"}, "--augment must be one of none, crop, crop_flip, resized_crop. Received: 'flip'"),
        ({"network": "dense"}, "--network must be one of plain, residual. Received: 'dense'"),
        ({"regularizer": "L2"}, "--regularizer must be one of orthonormal, l2, none. Received: 'L2'"),
        ({"modulation": "on"}, "--modulation must be one of off, neighbour, anchor. Received: 'on'"),
        ({"schedule": ""}, "--schedule must be one of step, thirds, cosine, constant. Received: ''"),
        ({"precision": "float16"}, "--precision must be one of float32, mixed_bfloat16, mixed_float16. Received: 'float16'"),
    ],
)  # fmt: skip
def test_wrong_value(values, expected):
    assert refusal(**values) == expected


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Recipe) if field.metadata["choices"]])
def test_unknown_choice_is_told_with_all_of_them(field):
    choices = next(f.metadata["choices"] for f in dataclasses.fields(Recipe) if f.name == field)
    assert refusal(**{field: "adamant"}) == f"--{field} must be one of {', '.join(choices)}. Received: 'adamant'"
    for choice in choices:
        Recipe(**{field: choice}, image_size=64).check()


def test_unknown_optimizer():
    assert refusal(optimizer="lion").startswith("--optimizer must be one of sgd, nesterov, ")
    assert set(OPTIMIZERS) >= {"sgd", "nesterov", "adagrad", "adadelta", "rmsprop", "adam", "adamw"}


@pytest.mark.parametrize(("depth", "below", "above"), [(45, 44, 50), (47, 44, 50), (49, 44, 50), (9, 8, 14), (111, 110, 116)])
def test_depth_that_is_not_6n_plus_2(depth, below, above):
    assert refusal(depth=depth) == f"--depth must be 6n + 2; the nearest are {below} and {above}. Received: {depth}"
    for near in (below, above):
        assert Recipe(depth=near).check().depth == near


@pytest.mark.parametrize("modulation", ["neighbour", "anchor"])
def test_shortcuts_are_not_modulated(modulation):
    message = refusal(network="residual", modulation=modulation)
    assert "--modulation must be off for --network residual" in message and message.endswith(f"Received: {modulation!r}")
    Recipe(network="residual", modulation="off").check()


@pytest.mark.parametrize(
    "values",
    [
        {"factor": 0.0, "momentum": 0.0, "weight_decay": 0.0, "bn_shift": -1.0},
        {"max_steps": 0, "warmup_steps": 0, "bn_batches": 0, "image_size": 0, "seed": 0},
        {"tolerance": 1.0, "max_scale": 1.0, "batch_size": 1, "depth": 8, "width": 1, "epochs": 1, "evaluate_every": 1},
        {"momentum": 1.0, "image_size": 4096, "seed": 2**31 - 1, "learning_rate": 1e-30, "depth": 1202},
    ],
)
def test_values_on_the_border_are_allowed(values):
    Recipe(**values).check()


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().depth = 50
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["digits"].recipe = Recipe()
    assert hash(Recipe()) == hash(Recipe()) and Recipe() == Recipe() != Recipe(seed=1)


def test_every_field_has_a_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(Recipe))


def test_unknown_recipe():
    with pytest.raises(InputError, match="--recipe must be one of digits, digits_l2, ") as caught:
        find_preset("plain20")
    assert str(caught.value).endswith("Received: 'plain20'") and all(name in str(caught.value) for name in RECIPES)


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
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'recipe'"),
        ('{"recipe": 3}', "TypeError"),
        ('{"recipe": {}, "recipe_name": 5}', "recipe_name=5 is no str"),
        ('{"recipe": {"colour": 3}}', "unexpected keyword argument 'colour'"),
        ('{"recipe": {"depth": "44"}}', "depth='44' is no int"),
        ('{"recipe": {"depth": 44.0}}', "depth=44.0 is no int"),
        ('{"recipe": {"hold_out": 1}}', "hold_out=1 is no bool"),
        ('{"recipe": {"factor": true}}', "factor=True is no float"),
        ('{"recipe": {"augment": null}}', "augment=None is no str"),
        ('{"recipe": {"depth": 45}}', "--depth must be 6n + 2"),
    ],
)
def test_what_is_no_recipe_file(tmp_path, content, expected):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    message = str(caught.value)
    assert (
        expected in message and "\n" not in message and ("--recipe_file must be a JSON file" in message or "--depth" in message)
    )
    with pytest.raises(InputError, match="--recipe_file must be a JSON file with a recipe.*nowhere.json"):
        read_recipe(tmp_path / "nowhere.json")
