"""Checks of a report's inputs, targets and loss against the model."""

import contextlib

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.method.errors import first_line


def checked_inputs(model, x):
    """Returns x as a tensor or, for several inputs, a list in the model's order, in the inputs' types and ranks."""
    expected = [tuple(tensor.shape) for tensor in model.inputs]
    arrays = [x]
    if isinstance(x, dict):
        given = keras.tree.flatten_with_path(model.input) if isinstance(model.input, dict) else ()
        names = [path[0] for path, _ in given] or [tensor.name for tensor in model.inputs]
        if not set(names) <= set(x):
            raise ValueError(f"`x` must have an entry for each of the inputs {names}. Received: a dict with {sorted(x)}")
        arrays = [x[name] for name in names]
    elif isinstance(x, (list, tuple)) and (len(expected) > 1 or _is_one_in_a_list(x, model, "input")):
        arrays = list(x)
    message = f"`x` must be a batch of at least 2 for inputs of shape {expected}. Received: "
    try:
        tensors = [_fitted(array, tensor) for array, tensor in zip(arrays, model.inputs)]
    except Exception as error:
        raise ValueError(f"{message}{type(x).__name__} ({first_line(error)})") from error
    received = [tuple(tensor.shape) for tensor in tensors]
    fit = [tf.TensorShape([None, *shape[1:]]).is_compatible_with(own) for shape, own in zip(expected, received)]
    sizes = {shape[0] for shape in received if shape}
    if len(arrays) != len(expected) or not all(fit) or len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(f"{message}{len(arrays)} arrays of shape {received}")
    return tensors if len(tensors) > 1 else tensors[0]


def _fitted(array, expected):
    """A tensor of the input's type; a last axis of one channel is added or removed, as in `fit`."""
    if isinstance(array, (tf.SparseTensor, tf.RaggedTensor)):
        raise TypeError("it must be dense")
    tensor = tf.cast(tf.convert_to_tensor(array), expected.dtype)
    rank = len(expected.shape)
    if len(tensor.shape) == rank - 1 and expected.shape[-1] == 1:
        return tensor[..., tf.newaxis]
    return tf.squeeze(tensor, -1) if len(tensor.shape) == rank + 1 and tensor.shape[-1] == 1 else tensor


def checked_targets(model, y):
    """Returns y as arrays; for a model of one output a list of numbers is one array, unless the model returns a list."""
    if len(model.outputs) > 1 or not isinstance(y, (list, tuple)) or _is_one_in_a_list(y, model, "output"):
        return keras.tree.map_structure(_target, y)
    return _target(y)


def _target(value):
    try:
        array = np.asarray(value)
    except ValueError:  # a list of lists of different lengths
        array = None
    if value is not None and (array is None or array.dtype == object):
        raise ValueError(f"`y` must be dense arrays of numbers. Received: {type(value).__name__}")
    return array


def _is_one_in_a_list(given, model, end):  # a Sequential model never has lists
    both = (given, getattr(model, end)) if not isinstance(model, keras.Sequential) else (None,)
    return all(isinstance(value, (list, tuple)) and len(value) == 1 for value in both)


def checked_loss(loss):
    """Returns a loss function or object."""
    if loss is not None and not isinstance(loss, (dict, list, tuple)):
        with contextlib.suppress(ValueError, TypeError):
            return keras.losses.get(loss)
    expected = "`loss` must be one Keras loss, its name, or a function of (y, outputs); several are taken from a compiled model"
    raise ValueError(f"{expected}. Received: loss={loss!r}")


def is_keras(loss):
    """Whether a loss, which may be a name, is one of Keras's own."""
    return isinstance(loss, str) or (getattr(loss, "__module__", "") or "").startswith("keras.")


def check_probabilities(loss, outputs):
    """Raises `ValueError` where a cross-entropy of Keras that expects probabilities receives logits."""
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    name = name.lower().replace("_", "")
    if not is_keras(loss) or not name.endswith("crossentropy") or getattr(loss, "from_logits", False):
        return
    highest = np.inf if name == "categoricalcrossentropy" else 1.0  # it divides by their sum; the others clip them to 1
    if any(tf.reduce_min(tensor) < 0 or tf.reduce_max(tensor) > highest for tensor in keras.tree.flatten(outputs)):
        raise ValueError("these outputs are logits: give the loss object, with from_logits=True")


def shapes(structure):
    return keras.tree.map_structure(lambda tensor: tuple(tensor.shape), structure)
