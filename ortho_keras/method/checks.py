"""Checks that many functions share: a number in a range, a built model, installed packages."""

import importlib.util
import math
import numbers
import operator

import keras

from ortho_keras.method.errors import InputError


def check_number(name, value, least=None, above=None, most=None, below=None, integer=False):
    """Returns a finite number as a Python `int` or `float`, or raises `ValueError`; for a flag, as "--depth", `InputError`.

    It must be `least` and `most` or between them, and strictly between `above` and `below`. NumPy's numbers count as numbers;
    bools do not.
    """
    ranges = (least, "at least", operator.ge), (above, "above", operator.gt), (most, "at most", operator.le)
    limits = [limit for limit in (*ranges, (below, "below", operator.lt)) if limit[0] is not None]
    is_number = isinstance(value, numbers.Integral if integer else numbers.Real) and not isinstance(value, bool)
    too_long = isinstance(value, numbers.Integral) and abs(int(value)) >= (2**63 if integer else 10**300)
    if not is_number or too_long or not math.isfinite(value) or not all(holds(value, limit) for limit, _, holds in limits):
        bounds = "".join(f"{' and' if number else ','} {words} {limit}" for number, (limit, words, _) in enumerate(limits))
        message = f"must be {'an integer' if integer else 'a finite number'}{bounds}. Received: {name}={value!r}"
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
