"""The recipes for photographs: their nets, and runs on a generated folder of which some files do not decode."""

import dataclasses
import json
import shutil

import keras
import numpy as np
import pytest
from image_files import write_photographs
from small_runs import silent

from ortho_keras import ErrorModulation, load_model
from ortho_keras.method.errors import InputError
from ortho_keras.trainer.build import build_model
from ortho_keras.trainer.recipes import RECIPES
from ortho_keras.trainer.run import load_recipe_data, run

CLASSES = 12


def small(name, folder, **values):
    values = {"image_size": 32, "width": 2, "batch_size": 16, "bn_batches": 1, "warmup_steps": 0, "epochs": 2} | values
    return dataclasses.replace(RECIPES[name].recipe, dataset=f"folder:{folder}", **values)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    broken = write_photographs(root, {"train": 4, "val": 1, "test": 2}, CLASSES, broken=0.1)
    assert len(broken) > 3
    return root, broken


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("_imagenet")])
def test_the_nets_of_all_recipes(photographs, name):
    recipe = small(name, photographs[0])
    data = load_recipe_data(recipe)
    model = build_model(recipe, data)
    assert model.name == f"{recipe.network}{recipe.depth}_imagenet" and model.output_shape == (None, CLASSES)
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    modulations = [layer for layer in model.layers if isinstance(layer, ErrorModulation)]
    assert len(convolutions) >= recipe.depth - 1  # and those of the shortcuts
    assert len(modulations) == (0 if recipe.modulation == "off" else len(convolutions))
    assert np.isfinite(model(data.test.sample(2)[0].astype("float32"), training=True)).all()


def test_a_run_on_photographs_reports_top_five_and_skipped_images(photographs, tmp_path):
    root, broken = photographs
    recipe, lines = small("plain34_imagenet", root, family="cifar", depth=8, learning_rate=0.01), []
    whole = run(recipe, tmp_path / "whole", log=lines.append)
    assert whole["steps"] == 6 and whole["skipped_images"] == len(broken) and len(whole["data_sha256"]) == 64
    reported = [line.removeprefix("skipped, does not decode: ") for line in lines if line.startswith("skipped")]
    assert sorted(reported) == sorted(broken) and any("validation_top5_accuracy" in line for line in lines)

    model, (images, labels) = load_model(tmp_path / "whole" / "final.keras"), load_recipe_data(recipe).test.sample(1000)
    assert len(labels) == 2 * CLASSES - sum(name.startswith("test") for name in broken)
    # The evaluation reads the images as they are, a sample rounds them: near ties aside, the order is the same.
    order = np.argsort(model.predict(images.astype("float32"), verbose=0), -1)
    top = np.mean([label in five for label, five in zip(labels, order[:, -5:])])
    assert abs(whole["test_top5_accuracy"] - top) <= 1.01 / len(labels)

    before = {path: path.read_bytes() for path in (tmp_path / "whole" / "checkpoints").rglob("*") if path.is_file()}
    (tmp_path / "whole" / "result.json").unlink()  # as if it had been stopped
    shutil.copytree(root / "train" / "class00", root / "train" / "new")
    try:
        with pytest.raises(InputError, match="--workdir must .* holds another: data_sha256="):
            run(recipe, tmp_path / "whole", log=silent)
    finally:
        shutil.rmtree(root / "train" / "new")
    assert before == {path: path.read_bytes() for path in before} and len(before) >= 2
    for workdir in (root / "run", root / "train" / "class00", root):
        with pytest.raises(InputError, match="--workdir must be outside of the images' folder"):
            run(recipe, workdir, log=silent)
    assert not (root / "run").exists()


def test_the_recipe_for_a_small_folder_learns_and_keeps_its_kernels_orthonormal(tmp_path):
    write_photographs(tmp_path / "data", {"train": 40, "test": 4}, 3)
    own = RECIPES["plain34_photographs"].recipe
    recipe = small("plain34_photographs", tmp_path / "data", batch_size=12, width=4, epochs=5, warmup_steps=own.warmup_steps)
    run(recipe, tmp_path / "run", log=(lines := []).append)
    assert [line for line in lines if line.startswith("one penalty in ")]  # at 32 pixels, as a run decides by itself
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    losses, penalties = ([epoch[name] for epoch in history] for name in ("loss", "penalty"))
    assert history[-1]["step"] == 50 and losses[0] > losses[2] > losses[-1] and losses[-1] < 0.7 * losses[0]
    # The sum over the kernels of ||W'W - I||^2; with random orthonormal kernels and ReLU it passes 1,000.
    assert max(penalties) < 1 * own.factor / 2


def test_one_class_is_nothing_to_tell_apart(tmp_path):
    write_photographs(tmp_path / "data", {"train": 8, "test": 2}, 1)
    with pytest.raises(InputError, match=r"must have at least 2 classes. Received: \w+$"):
        run(small("plain34_imagenet", tmp_path / "data"), tmp_path / "run", log=silent)
    assert not (tmp_path / "run").exists()
