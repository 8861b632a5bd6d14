"""Error modulation: one layer that rescales the backpropagated gradient."""

import math
import weakref

import keras
import tensorflow as tf

from ortho_keras.method.checks import check_number
from ortho_keras.method.state import LiveScalar


@keras.saving.register_keras_serializable(package="ortho_keras")
class ErrorModulation(keras.layers.Layer):
    """Returns its input unchanged, and rescales the gradient that is backpropagated through it where magnitudes mismatch.

    Placed after a parametric layer, it receives the gradient at that layer's output, computes its second-order moment `q_own`
    (the mean of squares over all entries), and compares it with `q_upper`, the moment at the next `ErrorModulation` towards the
    output. With `scale = sqrt(q_upper / q_own)`, the gradient is multiplied by `scale` where `scale > tolerance` or
    `scale < 1 / tolerance`, and passes bit for bit unchanged everywhere else.

    The layers of a chain communicate through a scalar token next to the activations: forward it carries nothing, backward its
    gradient carries `sqrt(q_upper)`, where 0 means that there is no layer above. A gradient that is all zero or holds an inf or
    a NaN passes unchanged, and leaves the reference for the layers below as it is.

    Args:
        tolerance: float, at least 1. How far the ratio of the magnitudes (roots of the moments) may be from 1 before it counts
            as a mismatch; 1 modulates at every layer. The paper does not give its threshold.
        max_scale: float, at least 1. `scale` is clipped to `[1 / max_scale, max_scale]`.
        reference: `"neighbour"`: `q_upper` is the moment of the next parametric layer towards the output, after its own
            modulation, as in the paper. `"anchor"`: that of the topmost parametric layer, so that small drifts add up.
        enabled: bool. Setting `layer.enabled = False` takes effect at the next training step, without retracing.
        synchronized: bool. Under a `tf.distribute` strategy, whether the moment is taken over the gradients of all replicas.

    Call arguments:
        inputs: Float tensor of any shape, a parametric layer's output.
        token: The second output of the previous `ErrorModulation`, or `None` for the first.

    Returns:
        `(outputs, token)`: the inputs unchanged, and the token for the next `ErrorModulation`.

    Raises:
        ValueError: If an argument is none of the above.

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
        # The token's gradient spans more than half precision can hold, so Keras must not cast it.
        super().__init__(autocast=False, **kwargs)
        if reference not in ("neighbour", "anchor"):
            raise ValueError(f"`reference` must be one of 'neighbour' and 'anchor'. Received: reference={reference!r}")
        self.tolerance = check_number("tolerance", tolerance, least=1)
        self.max_scale = check_number("max_scale", max_scale, least=1)
        self.reference = reference
        self.synchronized = bool(synchronized)
        self._enabled = LiveScalar(bool(enabled))
        self.supports_masking = True
        self.built = True  # it has no weights, so custom layers that hold it can be quantized

    @property
    def enabled(self):
        return bool(self._enabled.value)

    @enabled.setter
    def enabled(self, enabled):
        self._enabled.value = bool(enabled)

    def call(self, inputs, token=None):
        @tf.custom_gradient
        def modulated(inputs, token, enabled):
            def backward(error, above):  # `above` is `sqrt(q_upper)`
                own = root_mean_square(error, self.synchronized)
                return *_rescaled(error, own, above, enabled, self.tolerance, self.max_scale, self.reference), None

            return (inputs, token), backward

        token = tf.zeros((), tf.float32) if token is None else token
        # The switch is read here, because the gradient function of a graph must not read a variable.
        return modulated(inputs, token, self._enabled.read())

    def decide(self, own, above, enabled=1.0):
        """Applies the rule to `sqrt(q_own)`, `sqrt(q_upper)` (0: no layer above) and 0 or 1, float32 scalars.

        Returns `(scale, fires, down)`: the factor for the gradient, whether it is applied, and the `above` of the layer below.
        """
        return _decide(own, above, enabled, self.tolerance, self.max_scale, self.reference)

    def compute_output_spec(self, inputs, token=None):
        return keras.KerasTensor(inputs.shape, inputs.dtype), keras.KerasTensor((), "float32")

    def compute_mask(self, inputs, previous_mask):
        return previous_mask, None

    def get_config(self):
        names = ("tolerance", "max_scale", "reference", "enabled", "synchronized")
        return super().get_config() | {name: getattr(self, name) for name in names}


def _either(condition, then, otherwise):
    """Returns the tensors of one of two functions; an accelerator runs both and selects, as a branch would have to wait."""
    if any(device.device_type != "CPU" for device in tf.config.list_logical_devices()):
        return tf.where(condition, then(), otherwise())
    return tf.cond(condition, then, otherwise)


def _one_node(function):
    """Makes a call one node of a graph, where thirty per layer cost memory, and time before the first step."""
    kept = weakref.WeakKeyDictionary()  # of each graph: a second derivative rewrites `tf.cond`, and others cannot use that

    def call(*args):
        if tf.executing_eagerly():
            return function(*args)
        graph = tf.compat.v1.get_default_graph()
        if graph not in kept:
            kept[graph] = tf.function(function, autograph=False, experimental_attributes={"_noinline": True})
        return kept[graph](*args)

    return call


@_one_node
def _rescaled(error, own, above, enabled, tolerance, max_scale, reference):
    """Returns the gradient, rescaled where the rule says so, and the `above` of the layer below."""
    scale, fires, down = _decide(own, above, enabled, tolerance, max_scale, reference)

    def rescaled():
        wide = error if error.dtype.size > 4 else tf.cast(error, tf.float32)
        return tf.cast(wide * tf.cast(scale, wide.dtype), error.dtype)

    return _either(fires, rescaled, lambda: error), down  # not 1 * x, which flushes subnormals


def _decide(own, above, enabled, tolerance, max_scale, reference):
    usable = (own > 0) & (own < math.inf)
    scale = above / own
    fires = usable & (above > 0) & ((scale > tolerance) | (scale < 1 / tolerance)) & (enabled > 0)
    scale = tf.where(fires, tf.clip_by_value(scale, 1 / max_scale, max_scale), 1.0)
    replaces = usable if reference == "neighbour" else usable & tf.equal(above, 0)
    return scale, fires, tf.where(replaces, own * scale, above)


@_one_node
def _root_mean_square(error):
    """The sum is taken in float64, which takes twice the time, only where float32 overflows or underflows."""
    half = tf.nn.l2_loss(tf.cast(error, tf.float32))
    size = tf.cast(tf.size(error), tf.float32)
    return _either(
        tf.logical_and(half > 1e-30 * size, half < 1e37),
        lambda: tf.sqrt(2 * half / size),
        lambda: tf.cast(tf.sqrt(2 * tf.nn.l2_loss(tf.cast(error, tf.float64)) / tf.cast(size, tf.float64)), tf.float32),
    )


def root_mean_square(error, synchronized):
    """Returns the root of the second-order moment, float32; with `synchronized`, over the gradients of all replicas."""
    root = _root_mean_square(error)
    replica = tf.distribute.get_replica_context()
    if synchronized and replica is not None and replica.num_replicas_in_sync > 1:
        moment = replica.all_reduce(tf.distribute.ReduceOp.MEAN, tf.square(tf.cast(root, tf.float64)))
        root = tf.cast(tf.sqrt(moment), tf.float32)
    return root
