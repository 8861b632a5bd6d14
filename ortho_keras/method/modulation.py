"""Modulation of the backpropagated gradient: the rule of one layer."""

import math

import keras
import tensorflow as tf

from ortho_keras.method.state import LiveScalar

REFERENCES = ("neighbour", "anchor")


@keras.saving.register_keras_serializable(package="ortho_keras")
class ErrorModulation(keras.layers.Layer):
    """Passes its input on unchanged, and rescales the error that comes back through it where magnitudes mismatch.

    Put behind a parametric layer l (a convolution, a Dense layer), it sees the error at that layer's output, takes its
    second-order moment `q_own` (the mean of squares over all entries), and compares with `q_upper`, the moment handed
    down by the `ErrorModulation` above it. With `scale = sqrt(q_upper / q_own)`, the error is multiplied by `scale` where
    `scale > tolerance` or `scale < 1 / tolerance`, and passes unchanged, to the bit, everywhere else.

    The layers of a chain talk through a scalar token that runs beside the activations: forward it carries nothing,
    backward its cotangent carries `sqrt(q_upper)` down. The first layer takes no token and makes one. The topmost layer
    receives 0, which says "nothing above", and changes nothing. There is no state, so it works in eager mode, in graphs,
    under XLA and under a strategy.

    The moment is summed in float32, and again in float64 where float32 cannot hold it, so it is right for errors from 1e-30
    to 1e+30 and for float16 subnormals: its root to about 1e-6 of itself, under XLA, which adds one entry after the other, to
    some 1e-5 where a tensor has millions of entries. An error that is all zero, or that holds an inf or a NaN, passes unchanged
    and leaves the reference for the layers below as it is.

    Args:
        tolerance: float, at least 1. How far the ratio of the magnitudes (roots of the moments) may stray before it counts as a
            mismatch; 1 modulates at every layer. The paper does not give its threshold: a free choice of ours.
        max_scale: float, at least 1. `scale` is clipped to `[1 / max_scale, max_scale]`.
        reference: `"neighbour"`, `q_upper` is the moment of the next parametric layer up, after its own modulation,
            as in the paper; `"anchor"`, it is that of the topmost parametric layer, carried down unchanged. A drift of
            1.15 a layer stays below any useful tolerance between neighbours and grows a millionfold over 100 layers; against
            the anchor it adds up until it leaves the tolerance, and is then set back to it. The anchor is ours.
        enabled: bool. A switch that can be turned while training, `layer.enabled = False`, without retracing.
        synchronized: bool. Under a `tf.distribute` strategy, the moment is that of all replicas' errors together, so that the
            split of a batch over replicas changes nothing.

    Call arguments:
        inputs: Float tensor of any shape, a parametric layer's output.
        token: The second output of the `ErrorModulation` below, or `None` for the first.

    Returns:
        `(outputs, token)`: the inputs unchanged, and the token for the next `ErrorModulation` up.

    Raises:
        ValueError: If an argument is outside its range.

    Example:

    >>> x = keras.Input((8,))
    >>> y, token = ErrorModulation()(keras.layers.Dense(8)(x))
    >>> y, token = ErrorModulation()(keras.layers.Dense(8)(y), token)

    Reference:
        Xie, Xiong, Pu 2017 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)): the factor sqrt(q^(l+1) / q^l), only where
        the magnitudes of consecutive layers mismatch. `tolerance`, `max_scale`, `"anchor"`, `enabled`, `synchronized`: ours.
    """

    def __init__(self, tolerance=2.0, max_scale=1000.0, reference="anchor", enabled=True, synchronized=False, **kwargs):
        kwargs.pop("autocast", None)
        # The token's cotangent spans more than half precision can hold, so Keras must not cast it.
        super().__init__(autocast=False, **kwargs)
        for name, value in (("tolerance", tolerance), ("max_scale", max_scale)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < math.inf:
                raise ValueError(f"`{name}` must be a finite number, at least 1. Received: {name}={value!r}")
        if reference not in REFERENCES:
            raise ValueError(f"`reference` must be one of {REFERENCES}. Received: reference={reference!r}")
        self.tolerance = float(tolerance)
        self.max_scale = float(max_scale)
        self.reference = reference
        self.synchronized = bool(synchronized)
        self._enabled = LiveScalar(bool(enabled))
        self.supports_masking = True

    @property
    def enabled(self):
        return bool(self._enabled.value)

    @enabled.setter
    def enabled(self, enabled):
        self._enabled.value = bool(enabled)

    def call(self, inputs, token=None):
        @tf.custom_gradient
        def modulated(inputs, token, enabled):
            def backward(error, above):
                return *self._backward(error, above, enabled), None

            return (inputs, token), backward

        token = tf.zeros((), tf.float32) if token is None else token
        # The switch is read here and not in the gradient: a graph's gradient must not hold a variable of its own.
        return modulated(inputs, token, self._enabled.read())

    def _backward(self, error, above, enabled):
        """Maps the error above this layer and `sqrt(q_upper)` (0: nothing above) to what goes down."""
        own = root_mean_square(error, self.synchronized)
        return _rescaled(error, own, above, enabled, self.tolerance, self.max_scale, self.reference)

    def decide(self, own, above, enabled=1.0):
        """The rule on magnitudes alone.

        Args:
            own: Scalar float32 tensor, `sqrt(q_own)`.
            above: Scalar float32 tensor, `sqrt(q_upper)`, or 0 for nothing above.
            enabled: Scalar float32 tensor, 0 or 1.

        Returns:
            `(scale, fires, down)`: what the error is multiplied by, whether it is, and the `above` of the layer below.
        """
        return _decide(own, above, enabled, self.tolerance, self.max_scale, self.reference)

    def compute_output_spec(self, inputs, token=None):
        return keras.KerasTensor(inputs.shape, inputs.dtype), keras.KerasTensor((), "float32")

    def compute_mask(self, inputs, previous_mask):
        return previous_mask, None

    def get_config(self):
        return {
            **super().get_config(),
            "tolerance": self.tolerance,
            "max_scale": self.max_scale,
            "reference": self.reference,
            "enabled": self.enabled,
            "synchronized": self.synchronized,
        }


def _either(condition, then, otherwise):
    """One of two functions' tensors. On a processor only that function runs; an accelerator, which would have to be waited
    for before a branch, runs both and selects."""
    if any(device.device_type != "CPU" for device in tf.config.list_logical_devices()):
        return tf.where(condition, then(), otherwise())
    return tf.cond(condition, then, otherwise)


def _one_node(function):
    """Makes a call one node of a graph, and the function one for all layers of a shape.

    Unfolded, thirty nodes a layer, it costs memory, and time before the first step (benchmarks/memory.py, scaling.py).
    """
    kept = tf.function(function, autograph=False, experimental_attributes={"_noinline": True})
    return lambda *args: function(*args) if tf.executing_eagerly() else kept(*args)


@_one_node
def _rescaled(error, own, above, enabled, tolerance, max_scale, reference):
    """The error, rescaled where the rule says so, and the `above` of the layer below."""
    scale, fires, down = _decide(own, above, enabled, tolerance, max_scale, reference)

    def rescaled():
        wide = error if error.dtype.size > 4 else tf.cast(error, tf.float32)
        return tf.cast(wide * tf.cast(scale, wide.dtype), error.dtype)

    return _either(fires, rescaled, lambda: error), down  # not 1 * x, which flushes subnormals


def _decide(own, above, enabled, tolerance, max_scale, reference):
    usable = tf.logical_and(own > 0, own < math.inf)
    scale = above / own
    mismatch = tf.logical_or(scale > tolerance, scale < 1 / tolerance)
    fires = usable & (above > 0) & mismatch & (enabled > 0)
    scale = tf.where(fires, tf.clip_by_value(scale, 1 / max_scale, max_scale), 1.0)
    if reference == "neighbour":
        down = tf.where(usable, own * scale, above)
    else:
        down = tf.where(tf.logical_and(usable, tf.equal(above, 0)), own, above)
    return scale, fires, down


@_one_node
def _root_mean_square(error):
    """Squares of 1e-30 and of 1e+30 both need float64, which takes twice the time: only a sum that float32 cannot hold is taken
    again."""
    half = tf.nn.l2_loss(tf.cast(error, tf.float32))
    size = tf.cast(tf.size(error), tf.float32)
    return _either(
        tf.logical_and(half > 1e-30 * size, half < 1e37),
        lambda: tf.sqrt(2 * half / size),
        lambda: tf.cast(tf.sqrt(2 * tf.nn.l2_loss(tf.cast(error, tf.float64)) / tf.cast(size, tf.float64)), tf.float32),
    )


def root_mean_square(error, synchronized):
    """The root of the second-order moment, float32; with `synchronized` of all replicas' errors together."""
    root = _root_mean_square(error)
    replica = tf.distribute.get_replica_context()
    if synchronized and replica is not None and replica.num_replicas_in_sync > 1:
        moment = replica.all_reduce(tf.distribute.ReduceOp.MEAN, tf.square(tf.cast(root, tf.float64)))
        root = tf.cast(tf.sqrt(moment), tf.float32)
    return root
