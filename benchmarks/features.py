"""Draws trained models side by side: feature maps of the same test images, and filters beside them.

python benchmarks/features.py --models=runs/digits,runs/digits_l2 --output=digits.png

writes digits.png (feature maps) and digits_filters.png.
"""

import json
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import keras
import numpy as np
from absl import app, flags

from ortho_keras.diagnosis.features import compare_features, compare_filters
from ortho_keras.method.errors import InputError
from ortho_keras.method.kernels import layer_kernels
from ortho_keras.method.loading import load_model
from ortho_keras.trainer.data import load_data

FLAGS = flags.FLAGS

flags.DEFINE_list("models", [], "Trained models: .keras files, or folders of runs, which hold final.keras.")
flags.DEFINE_list("labels", [], "A label for each model; by default its recipe's name, or its file's.")
flags.DEFINE_string("dataset", None, "Where the images come from, as in train.py; by default the runs' own (run.json).")
flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data; by default TFDS's own.")
flags.DEFINE_integer("image_size", None, "Pixels a side, as in train.py; by default the runs' own (run.json).", lower_bound=0)
flags.DEFINE_integer("images", 3, "How many test images, from the first.", lower_bound=1)
flags.DEFINE_list("layers", [], "Layers to draw; by default five ReLUs that all models have, spread over the depth.")
flags.DEFINE_string("output", "features.png", "The picture of feature maps; the filters go to <stem>_filters.png beside it.")


def find_model(name):
    """Returns the path of a model's file."""
    path = pathlib.Path(name).expanduser()
    path = path / "final.keras" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"--models must be .keras files or folders that hold final.keras. Received: {name!r}")
    return path


def read_json(path):
    """Returns a run's file, an empty dict where there is none."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} must be a run's JSON file. Received: a damaged one") from error


def find_labels(paths):
    """Returns a label for each model, all different."""
    if FLAGS.labels:
        if len(set(FLAGS.labels)) != len(paths) or len(FLAGS.labels) != len(paths):
            raise InputError(f"--labels must be {len(paths)} different ones, one for each model. Received: {FLAGS.labels}")
        return FLAGS.labels
    labels = [
        read_json(path.parent / "result.json").get("recipe_name")
        or (path.resolve().parent.name if path.name == "final.keras" else path.stem)
        for path in paths
    ]
    labels = [f"{label} ({path.parent})" if labels.count(label) > 1 else label for label, path in zip(labels, paths)]
    if len(set(labels)) != len(labels):
        raise InputError(f"--labels must be given: the models cannot be told apart by name. Received: {', '.join(labels)}")
    return labels


def choose(flag, paths, default):
    """Returns a flag's value, or the one that the models' recipes share."""
    if FLAGS[flag].value is not None:
        return FLAGS[flag].value
    found = {read_json(path.parent / "run.json").get("recipe", {}).get(flag) for path in paths} - {None}
    if len(found) > 1:
        raise InputError(f"--{flag} must be given where the models' own differ. Received: {', '.join(map(str, sorted(found)))}")
    if not found and default is None:
        raise InputError(f"--{flag} must be given where no model has a run.json beside it")
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
        raise InputError("--layers must be given: the models have no ReLU of one name behind a convolution in common")
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


def draw():
    """Draws both pictures and returns their paths."""
    if not FLAGS.models:
        raise InputError("--models must name at least one model, separated by commas")
    paths = [find_model(name) for name in FLAGS.models]
    labels = find_labels(paths)
    dataset, image_size = choose("dataset", paths, None), choose("image_size", paths, 0)
    test = load_data(dataset, FLAGS.data_dir, image_size).test
    if FLAGS.images > len(test):
        raise InputError(f"--images must be at most {len(test)}, the number of test images. Received: {FLAGS.images}")
    models = {label: load_model(path, compile=False) for label, path in zip(labels, paths)}
    layers = FLAGS.layers or default_layers(list(models.values()))
    kernels = dict.fromkeys(convolution_before(next(iter(models.values())), name) for name in layers)
    kernels.pop(None, None)
    if not kernels:
        raise InputError(f"--layers must be convolutions, or stand behind one, for the picture of filters. Received: {layers}")
    for path, model in zip(paths, models.values()):
        missing = sorted(set(kernels) - {layer.name for layer in model.layers})
        if missing:
            raise InputError(f"--models must all have the layers {', '.join(missing)}. Received: {path}, which has not")
    output = pathlib.Path(FLAGS.output).expanduser()
    filters_output = output.with_name(f"{output.stem}_filters.png")
    output.parent.mkdir(parents=True, exist_ok=True)
    compare_features(models, test.images[: FLAGS.images], layers, output)
    compare_filters(models, list(kernels), filters_output)
    return output, filters_output


def main(_):
    try:
        print(*draw())
    except (ValueError, OSError) as error:  # InputError is a ValueError
        print(f"features.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parse_flags(argv):
    """absl's parser, with an unknown or unreadable flag told in one line."""
    try:
        rest = FLAGS(argv)
    except (flags.Error, ValueError) as error:  # the latter at --noname=value
        print(f"features.py: {' '.join(str(error).split())} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)
    if len(rest) > 1:
        print(f"features.py: every argument must be a flag, --name=value. Received: {' '.join(rest[1:])}", file=sys.stderr)
        sys.exit(2)
    return rest


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
