"""What a layer holds: its variables, and what Keras keeps beside its weights."""

import contextlib
import tempfile

import keras
import tensorflow as tf

from ortho_keras.method.kernels import walk_layers


def copy_state(layer, copy):
    """Sets a copy's weights, and what it holds beside them, to those of a layer (or model) of the same structure."""
    copy.set_weights(layer.get_weights())
    copy_rest(layer, copy)


def copy_rest(layer, copy):
    """What layers hold beside their weights, as loading a file would: an adapted Normalization's figures, a lookup's table."""
    for (one, _), (other, _) in zip(walk_layers(layer), walk_layers(copy)):
        if isinstance(other, keras.layers.Normalization) and other.input_mean is None:
            other.finalize_state()
        if hasattr(one, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                one.save_assets(folder)
                other.load_assets(folder)


@contextlib.contextmanager
def unchanged(model):
    """Puts back, at the end, all that a call in training mode moves in a model: variables, metrics, recurrent layers' states.

    A call moves BatchNormalization's averages, dropout's seeds, a SpectralNormalization's kernel, a stateful recurrent layer's
    states, which Keras does not count among the model's variables. `compute_loss` counts in metrics, which it makes at its
    first call.
    """
    before = [(variable, tf.identity(variable.value)) for variable in (*model.variables, *_states(model), *_counters(model))]
    try:
        yield
    finally:
        known = {id(variable) for variable, _ in before}
        before += [(new, tf.zeros_like(new.value)) for new in _counters(model) if id(new) not in known]
        for variable, value in before:
            variable.assign(value)


def _states(model):
    recurrent = (layer for layer, _ in walk_layers(model) if isinstance(layer, keras.layers.RNN) and layer.stateful)
    return [state for layer in recurrent for state in keras.tree.flatten(layer.states)]


def _counters(model):
    return [variable for metric in model.metrics for variable in metric.variables]
