"""Classifies image files by a trained model.

python -m ortho_keras.trainer.predict runs/flowers photographs/ rose.jpg
python -m ortho_keras.trainer.predict flowers.tflite rose.jpg

Prints a line for each file: its most probable classes with their probabilities.
"""

import argparse
import itertools
import sys
import warnings

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.method.checks import check_number
from ortho_keras.method.console import say, start_command
from ortho_keras.method.errors import InputError, first_line
from ortho_keras.method.files import expanded, read_json
from ortho_keras.method.loading import load_model
from ortho_keras.trainer.data.crops import decoded_crop, read_image
from ortho_keras.trainer.data.disk import shown
from ortho_keras.trainer.data.loading import resized
from ortho_keras.trainer.data.sources import SUFFIXES
from ortho_keras.trainer.result import DESCRIBED, DESCRIPTION

AT_ONCE = 32  # images
MODELS = ("final.keras", "best.keras")  # in a run's workdir, whose result.json describes them


def predict(model, images, top=5):
    """Classifies image files, prepared as in the evaluation of the run that trained the model.

    Args:
        model: Path of a finished run's workdir, of `final.keras` or `best.keras` in it, or of what `train.py --export` wrote: a
            `.keras` or `.tflite` file or a folder, next to which is a JSON file with the names of the classes.
        images: List of paths of image files and folders. Of a folder, all JPEG and PNG files in it are classified.
        top: int, at least 1. How many classes are returned of each image.

    Yields:
        Pairs `(path, [(class name, probability), ...])`, the most probable class first. The list is empty for a file that does
        not decode.

    Raises:
        InputError: If the model or one of the images' paths cannot be read.
        ValueError: If `top` is outside its range.

    Example:

    >>> for path, classes in predict("runs/flowers", ["photographs"], top=1):
    ...     print(path, classes)
    """
    top = check_number("top", top, least=1, integer=True)
    logits, described = load_classifier(expanded(model))
    files = itertools.chain.from_iterable(_files(expanded(path)) for path in images)
    while paths := list(itertools.islice(files, AT_ONCE)):
        pixels = [_pixels(path, described) for path in paths]
        decoded = [one for one in pixels if one is not None]
        scores = iter(keras.ops.softmax(logits(np.stack(decoded))).numpy() if decoded else ())
        for path, one in zip(paths, pixels):
            own = [] if one is None else next(scores)
            yield path, [(described["class_names"][index], float(own[index])) for index in np.argsort(own)[: -top - 1 : -1]]


def load_classifier(path):
    """Returns a function of float32 pixels `(n, height, width, channels)` that returns logits, and the model's description."""
    expected = "the model must be a finished run's workdir, a model in it, or an exported model"
    if (path / "run.json").exists() and not (path / "result.json").exists():
        raise InputError(f"{expected}. Received: {str(path)!r}, a run that is not finished: its command resumes it")
    results = [folder / "result.json" for folder in (path, path.parent) if folder == path or path.name in MODELS]
    beside = next((result for result in results if result.exists()), path.with_suffix(DESCRIBED))
    if not beside.exists():
        raise InputError(f"{expected}, with {beside.name} next to it. Received: {str(path)!r}")
    described = read_json(beside, DESCRIPTION, expected)
    try:
        if (path / "final.keras").exists() or path.suffix == ".keras":
            model = load_model(path if path.suffix == ".keras" else path / "final.keras", compile=False)
            return lambda pixels: model(pixels, training=False), described
        if path.suffix == ".tflite":
            return _tflite(path), described
        saved = tf.saved_model.load(str(path))
        return lambda pixels: saved.serve(pixels), described  # the variables live as long as `saved`
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{expected}. Received: {str(path)!r} ({first_line(error)})") from error


def _tflite(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # TensorFlow's, that a package of its own will hold the interpreter
        interpreter = tf.lite.Interpreter(str(path))
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()

    def logits(pixels):
        interpreter.resize_tensor_input(taken["index"], pixels.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(taken["index"], pixels)
        interpreter.invoke()
        return interpreter.get_tensor(given["index"])

    return logits


def _files(path):
    """The image files of a folder, in order, or the one file."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("[!.]*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise InputError(f"a folder of images must hold JPEG or PNG files. Received: {str(path)!r}, without any")
        return files
    if not path.is_file():
        raise InputError(f"each image must be a file or a folder that exists. Received: {str(path)!r}")
    return [path]


def _pixels(path, described):
    """Returns one image's pixels, float32 `(height, width, channels)`, as an evaluation reads them, or `None`."""
    *size, channels = described["image_shape"]
    try:
        if described["recipe"]["storage"] == "disk":
            return decoded_crop(path.read_bytes(), None, size).numpy()
        image = resized(read_image(path), size)
    except (OSError, tf.errors.OpError):
        return None
    return np.float32(image if channels == 3 else tf.image.rgb_to_grayscale(image))


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m ortho_keras.trainer.predict", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="a finished run's workdir, or an exported model")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file, or a folder of them")
    parser.add_argument("--top", type=int, default=5, help="classes to print of each image (default: 5)")
    given = parser.parse_args(arguments)
    start_command()
    failed = 0
    try:
        for path, classes in predict(given.model, given.images, given.top):
            likely = ", ".join(f"{name} {probability:.3f}" for name, probability in classes)
            say(f"{shown(path)}: {likely or 'does not decode'}")
            failed += not classes
    except ValueError as error:
        print(f"ortho_keras.trainer.predict: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
