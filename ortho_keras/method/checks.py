"""Checks that many functions share: a number in a range, a built model, installed packages."""

import importlib.util
import math
import numbers

import keras

from ortho_keras.method.errors import InputError


def check_number(name, value, least=None, above=None, most=None, below=None, integer=False):
    """Returns a number that lies in a range, as a Python `int` or `float`.

    Args:
        name: Name of the argument, or of a flag, as "--depth", for the message.
        value: What was passed for it. NumPy's numbers count as numbers; bools do not.
        least: The smallest value allowed.
        above: All allowed values are larger than this.
        most: The largest value allowed.
        below: All allowed values are smaller than this.
        integer: bool. Whether the number must be an integer.

    Raises:
        ValueError: If `value` is no number, not finite or out of range; of a flag, an `InputError`.
    """
    kind = numbers.Integral if integer else numbers.Real
    ranges = [
        (least, "at least", lambda limit: value >= limit),
        (above, "above", lambda limit: value > limit),
        (most, "at most", lambda limit: value <= limit),
        (below, "below", lambda limit: value < limit),
    ]
    limits = [(limit, words, holds) for limit, words, holds in ranges if limit is not None]
    is_number = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not all(holds(limit) for limit, _, holds in limits):
        what = "an integer" if integer else "a finite number"
        bounds = " and ".join(f"{words} {limit}" for limit, words, _ in limits)
        message = f"must be {what}{bounds and ', ' + bounds}. Received: {name}={value!r}"
        raise InputError(f"{name} {message}") if name.startswith("--") else ValueError(f"`{name}` {message}")
    return int(value) if integer else float(value)


def check_built(model, name="model"):
    """Returns a built Keras model, or raises `ValueError`."""
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"`{name}` must be a built Keras model (call `model.build(...)`). Received: {name}={model!r}")
    return model


def require(feature, *packages):
    """Raises `ImportError` where a feature needs packages, given by import name, that are not installed."""
    installed_as = {"sklearn": "scikit-learn", "tensorflow_datasets": "tensorflow-datasets"}
    missing = [installed_as.get(package, package) for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"{feature} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
