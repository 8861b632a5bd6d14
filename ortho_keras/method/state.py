"""The state of layers and models: settings that compiled graphs read anew, variables, and what Keras keeps besides weights."""

import contextlib
import tempfile

import keras
import tensorflow as tf

from ortho_keras.method.kernels import walk_layers


class LiveScalar(tf.__internal__.tracking.Trackable):  # what Keras's own layers and variables derive from
    """A float that can be set between steps and is read by graphs that were traced before.

    A Python float would be frozen into a graph, and a Keras variable would be one of the model's weights. A SavedModel has its
    value. A checkpoint does not: it is a setting, such as the factor of `keras.regularizers.L2`.
    """

    def __init__(self, value):
        self._value = float(value)
        aggregation = tf.VariableAggregation.ONLY_FIRST_REPLICA
        with tf.init_scope():
            self._variable = tf.Variable(self._value, trainable=False, dtype=tf.float32, aggregation=aggregation)

    @property
    def value(self):
        return self._value

    @value.setter
    def value(self, value):
        self._value = float(value)
        self._variable.assign(self._value)

    def read(self):
        """Returns the current value, a float32 tensor of shape `()`; in a graph, the value at run time."""
        return self._variable.read_value()

    def _trackable_children(self, save_type="checkpoint", **kwargs):
        return {"variable": self._variable} if save_type == "savedmodel" else {}

    def __reduce__(self):  # for copies, too
        return LiveScalar, (self._value,)


def steps_taken(model):
    """Returns the number of training steps of a model: its optimizer's, and those before the net grew (`first_step`)."""
    optimizer = model.optimizer
    return 0 if optimizer is None else int(optimizer.iterations.numpy()) + getattr(optimizer, "first_step", 0)


class StepCounter:
    """Counts a model's training steps for a callback, which forwards `on_train_batch_begin` and `on_train_batch_end`.

    The count is the optimizer's, so that a resumed run continues it. In a model whose `train_step` uses other optimizers,
    `model.optimizer` is Keras's default one and takes no step: there the batches since the start of training are counted.
    """

    def __init__(self, model):
        self.model = model
        self.before, self.batches, self.begun = steps_taken(model), 0, 0

    def begin(self, batch):
        self.begun = batch

    def end(self, batch):
        self.batches += batch - self.begun + 1  # with `steps_per_execution`, a call takes several steps

    @property
    def idle(self):
        """Whether the model's optimizer has had a batch, and took no step."""
        optimizer = self.model.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            return False  # it may skip steps
        accumulated = getattr(optimizer, "gradient_accumulation_steps", None) or 1
        return self.batches >= accumulated and steps_taken(self.model) == self.before

    @property
    def steps(self):
        return self.batches if self.idle else steps_taken(self.model)

    @property
    def interval(self):
        """The number of steps between two calls of a callback."""
        return getattr(self.model, "steps_per_execution", 1)

    def check_multiple(self, name, value):
        """Raises `ValueError` where a callback's number of steps falls between two of its calls."""
        if value % self.interval:
            raise ValueError(
                f"`{name}` must be a multiple of the model's steps_per_execution, {self.interval}, between which no "
                f"callback is called. Received: {name}={value}"
            )


def copy_state(layer, copy):
    """Copies the state of a layer (or model) to one of the same structure."""
    copy.set_weights(layer.get_weights())
    copy_rest(layer, copy)


def copy_rest(layer, copy):
    """Copies what layers keep besides weights, as loading a file would: Normalization's statistics, a lookup's table."""
    for (one, _), (other, _) in zip(walk_layers(layer), walk_layers(copy)):
        if isinstance(other, keras.layers.Normalization) and other.input_mean is None:
            other.finalize_state()
        if hasattr(one, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                one.save_assets(folder)
                other.load_assets(folder)


@contextlib.contextmanager
def unchanged(model):
    """Restores, at the end, what a call in training mode changes in a model: BatchNormalization's averages, dropout's seeds, a
    SpectralNormalization's kernel, metrics (which `compute_loss` makes at its first call), and states of recurrent layers.
    """
    recurrent = [layer for layer, _ in walk_layers(model) if isinstance(layer, keras.layers.RNN) and layer.stateful]
    states = [state for layer in recurrent for state in keras.tree.flatten(layer.states)]
    before = [(variable, tf.identity(variable.value)) for variable in (*model.variables, *states, *_counters(model))]
    try:
        yield
    finally:
        known = {id(variable) for variable, _ in before}
        before += [(new, tf.zeros_like(new.value)) for new in _counters(model) if id(new) not in known]
        for variable, value in before:
            variable.assign(value)


def _counters(model):
    return [variable for metric in model.metrics for variable in metric.variables]
