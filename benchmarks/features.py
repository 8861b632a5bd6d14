"""Draws trained models side by side: feature maps of the same test images, and filters.

python benchmarks/features.py --models=runs/digits,runs/digits_l2 --output=digits.png

writes digits.png (feature maps) and digits_filters.png.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import ortho_train  # noqa: F401 - TensorFlow's settings as in train.py

# isort: split
import keras
import numpy as np

from ortho_keras.diagnosis.features import plot_features, plot_filters
from ortho_keras.method.errors import InputError
from ortho_keras.method.files import expanded, read_json
from ortho_keras.method.kernels import layer_kernels
from ortho_keras.method.loading import load_model
from ortho_keras.trainer.data import load_data
from ortho_keras.trainer.recipe import STORED


def parse_arguments(arguments):
    def names(text):
        return text.split(",")

    parser = argparse.ArgumentParser(prog="features.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", type=names, required=True, help=".keras files, or folders of runs with final.keras")
    parser.add_argument("--labels", type=names, help="a label for each model (default: its recipe's name, or its file's)")
    parser.add_argument("--dataset", help="source of the images, as in train.py (default: the runs' own, from run.json)")
    parser.add_argument("--data_dir", help="folder of prepared TFDS data (default: TFDS's own)")
    parser.add_argument("--image_size", type=int, help="pixels a side, as in train.py (default: the runs' own)")
    parser.add_argument("--images", type=int, default=3, help="how many test images, from the first (default: 3)")
    parser.add_argument("--layers", type=names, help="layers to draw (default: five ReLUs that all models have)")
    parser.add_argument("--output", default="features.png", help="file of the feature maps; <stem>_filters.png has the filters")
    return parser.parse_args(arguments)


def find_model(name):
    """Returns the path of a model's file."""
    path = expanded(name)
    path = path / "final.keras" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"--models must be .keras files or folders that hold final.keras. Received: {name!r}")
    return path


def held(model, file, name):
    """Returns a value of a JSON file in a model's folder, or `None` where there is no such file."""
    path = model.with_name(file)
    return read_json(path, {name: STORED[name]}, f"{file} must be a run's")[name] if path.exists() else None


def find_labels(paths, given):
    """Returns a label for each model, all different."""
    labels = given or [
        held(path, "result.json", "recipe_name") or (path.resolve().parent.name if path.name == "final.keras" else path.stem)
        for path in paths
    ]
    if not given:
        labels = [f"{label} ({path.parent})" if labels.count(label) > 1 else label for label, path in zip(labels, paths)]
    if len(set(labels)) != len(paths) or len(labels) != len(paths):
        raise InputError(f"--labels must be {len(paths)} different ones, one for each model. Received: {', '.join(labels)}")
    return labels


def choose(flag, given, paths, default=None):
    """Returns a flag's value, or the one that the models' recipes share."""
    if given is not None:
        return given
    found = {(held(path, "run.json", "recipe") or {}).get(flag) for path in paths} - {None}
    if len(found) > 1:
        raise InputError(f"--{flag} must be given where the models' own differ. Received: {', '.join(map(str, sorted(found)))}")
    if not found and default is None:
        raise InputError(f"--{flag} must be given where no model has a run.json in its folder")
    return found.pop() if found else default


def default_layers(models):
    """Returns the names of up to five ReLUs that all models have, from the first to the last."""
    first, *others = models
    known = [{layer.name for layer in model.layers} for model in others]
    names = [
        layer.name
        for layer in first.layers
        if isinstance(layer, keras.layers.ReLU) or layer.name.endswith("relu")
        if len(getattr(layer.output, "shape", ())) == 4 and all(layer.name in own for own in known)
    ]
    if not names:
        raise InputError("--layers must be given: the models share no ReLU by name")
    return [names[at] for at in np.unique(np.linspace(0, len(names) - 1, 5).round().astype(int))]


def convolution_before(model, name):
    """Returns the name of the convolution that a layer is, or of the last one before it; `None` where there is none."""
    found = None
    for layer in model.layers:
        if len(layer_kernels(layer)) == 1 and len(layer.kernel.shape) == 4:
            found = layer.name
        if layer.name == name:
            break
    return found


def draw(given):
    """Draws both plots and returns their paths."""
    paths = [find_model(name) for name in given.models]
    labels = find_labels(paths, given.labels)
    dataset, image_size = choose("dataset", given.dataset, paths), choose("image_size", given.image_size, paths, 0)
    data = load_data(dataset, given.data_dir, image_size)
    test, classes = data.test, np.array(data.class_names)
    if not 1 <= given.images <= len(test):
        raise InputError(f"--images must be 1 to {len(test)}, the number of test images. Received: {given.images}")
    models = {label: load_model(path, compile=False) for label, path in zip(labels, paths)}
    layers = given.layers or default_layers(list(models.values()))
    kernels = dict.fromkeys(convolution_before(next(iter(models.values())), name) for name in layers)
    kernels.pop(None, None)
    if not kernels:
        raise InputError(f"--layers must be convolutions, or come after one, for the plot of filters. Received: {layers}")
    output = expanded(given.output)
    filters_output = output.with_name(f"{output.stem}_filters.png")
    output.parent.mkdir(parents=True, exist_ok=True)
    images = test.images[: given.images]
    columns = [[f"true class: {name}" for name in classes[test.labels[: given.images]]]]
    for label, model in models.items():
        if model.output_shape[1:] == classes.shape:
            columns.append([f"{label}: {name}" for name in classes[model.predict(images, verbose=0).argmax(1)]])
    plot_features(models, images, layers, output, titles=["\n".join(lines) for lines in zip(*columns)])
    plot_filters(models, list(kernels), filters_output)
    return output, filters_output


def main(arguments=None):
    given = parse_arguments(arguments)
    try:
        print(*draw(given))
    except (ValueError, OSError) as error:  # InputError is a ValueError
        print(f"features.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
