"""What changes from step to step: numbers that a compiled graph reads anew, and the count of steps."""

import tensorflow as tf


class LiveScalar:
    """A float that can be set between steps and is read by graphs that were traced before.

    A Python float is frozen into a traced graph. A Keras variable held by a layer becomes one of the model's
    weights. This is neither: a `tf.Variable` that Keras does not count, with the exact Python float beside it for configs.

    Args:
        value: float.
    """

    def __init__(self, value):
        self._value = float(value)
        with tf.init_scope():
            self._variable = tf.Variable(
                self._value, trainable=False, dtype=tf.float32, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
            )

    @property
    def value(self):
        return self._value

    @value.setter
    def value(self, value):
        self._value = float(value)
        self._variable.assign(self._value)

    def read(self):
        """Returns the present value, a float32 tensor of shape `()`; in a graph, the value at run time."""
        return self._variable.read_value()

    def __deepcopy__(self, memo):
        return LiveScalar(self._value)

    def __reduce__(self):
        return LiveScalar, (self._value,)


def steps_taken(model):
    """Returns how many training steps a model has taken: its optimizer's, and a run's before the net grew (`first_step`)."""
    return int(model.optimizer.iterations.numpy()) + getattr(model.optimizer, "first_step", 0)
