"""Error modulation: one layer that rescales the backpropagated gradient."""

import math

import keras
from keras import ops

from ortho_keras.method.backend import (
    LiveScalar,
    custom_gradient,
    either,
    half_square,
    mean_over_replicas,
    one_node,
    wide_root_mean_square,
)
from ortho_keras.method.checks import check_number


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
        enabled: bool. Setting `layer.enabled = False` takes effect at the next training step, without retracing (but on JAX).
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
        @custom_gradient
        def modulated(inputs, token, enabled):
            def backward(error, above):  # `above` is `sqrt(q_upper)`
                own = root_mean_square(error, self.synchronized)
                return *_rescaled(error, own, above, enabled, self.tolerance, self.max_scale, self.reference), None

            return (inputs, token), backward

        token = ops.zeros((), "float32") if token is None else token
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


@one_node
def _rescaled(error, own, above, enabled, tolerance, max_scale, reference):
    """Returns the gradient, rescaled where the rule says so, and the `above` of the layer below."""
    scale, fires, down = _decide(own, above, enabled, tolerance, max_scale, reference)

    def rescaled():
        wide = "float64" if keras.backend.standardize_dtype(error.dtype) == "float64" else "float32"
        return ops.cast(ops.cast(error, wide) * ops.cast(scale, wide), error.dtype)

    return either(fires, rescaled, lambda: error), down  # not 1 * x, which flushes subnormals


def _decide(own, above, enabled, tolerance, max_scale, reference):
    usable = (own > 0) & (own < math.inf)
    scale = above / own
    fires = usable & (above > 0) & ((scale > tolerance) | (scale < 1 / tolerance)) & (enabled > 0)
    scale = ops.where(fires, ops.clip(scale, 1 / max_scale, max_scale), 1.0)
    replaces = usable if reference == "neighbour" else usable & ops.equal(above, 0)
    return scale, fires, ops.where(replaces, own * scale, above)


@one_node
def _root_mean_square(error):
    """The sum is taken in a wider range, which takes twice the time, only where float32 overflows or underflows."""
    error = ops.cast(error, "float32")
    half, size = half_square(error), ops.cast(ops.size(error), "float32")
    in_range = ops.logical_and(half > 1e-30 * size, half < 1e37)
    return either(in_range, lambda: ops.sqrt(2 * half / size), lambda: wide_root_mean_square(error))


def root_mean_square(error, synchronized):
    """Returns the root of the second-order moment, float32; with `synchronized`, over the gradients of all replicas."""
    root = _root_mean_square(error)
    return mean_over_replicas(root) if synchronized else root
