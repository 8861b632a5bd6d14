"""The layers that the nets here are made of: convolution and BatchNormalization, activation, classifier; each with its seed."""

import keras
import numpy as np

from ortho_keras.method.initializers import DeltaOrthonormalInitializer, DiracInitializer, OrthonormalInitializer
from ortho_keras.method.regularizers import OrthonormalRegularizer
from ortho_keras.nets.batchnorm import FusedBatchNormalization
from ortho_keras.nets.shifted_relu import ShiftedReLU, checked_shift, shift_for_depth

STEM = "stem_conv"  # the first convolution
# He et al. 2016 trained with these in Torch; Keras's own defaults are 0.99 and 1e-3.
BATCH_NORMALIZATION = {"momentum": 0.9, "epsilon": 1e-5}

NAMED_INITIALIZERS = {
    "orthonormal": OrthonormalInitializer,
    "delta_orthonormal": DeltaOrthonormalInitializer,
    "dirac": DiracInitializer,
}


class LayerBuilder:
    """Makes one layer after the other, each with its share of the seed."""

    def __init__(self, depth, regularizer, initializer, stem_initializer, relu_shift, bn_synchronized, seed):
        named = regularizer == "orthonormal"
        self.regularizer = OrthonormalRegularizer() if named else keras.regularizers.get(regularizer)
        if isinstance(initializer, str) and initializer in NAMED_INITIALIZERS:
            initializer = NAMED_INITIALIZERS[initializer]()
        self.initializer = keras.initializers.get("glorot_uniform" if initializer is None else initializer)
        self.stem_initializer = keras.initializers.get(stem_initializer)
        self.relu_shift = checked_shift("relu_shift", shift_for_depth(depth) if relu_shift == "auto" else relu_shift)
        self.normalization = {**BATCH_NORMALIZATION, "synchronized": bn_synchronized}
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise ValueError(f"`seed` must be an integer, at least 0, or None. Received: seed={seed!r}")
        self.seed = seed
        self.layers = 0

    def next_initializer(self, initializer=None):
        """A copy of the initializer for the next layer. Without a seed of its own every layer would draw the same kernel."""
        self.layers += 1
        initializer = self.initializer if initializer is None else initializer
        if not isinstance(initializer, keras.initializers.Initializer):
            return initializer
        config = initializer.get_config()
        seed = self.seed if self.seed is not None else config.get("seed")
        if "seed" not in config or not (seed is None or isinstance(seed, int)):
            return initializer  # a SeedGenerator moves on with each draw
        if seed is not None:
            config["seed"] = int(np.random.SeedSequence([seed, self.layers]).generate_state(1)[0] >> 1)
        return type(initializer).from_config(config)

    def convolution(self, x, filters, strides, name, size=3):
        """A convolution of `size` pixels a side and its BatchNormalization."""
        initializer = self.next_initializer(self.stem_initializer if name == STEM else None)
        x = keras.layers.Conv2D(
            filters,
            size,
            strides=strides,
            padding="same",
            use_bias=False,  # BN's beta takes its place
            kernel_initializer=initializer,
            kernel_regularizer=self.regularizer,
            name=name,
        )(x)
        return FusedBatchNormalization(**self.normalization, name=f"{name}_bn")(x)

    def relu(self, x, name):
        relu = ShiftedReLU(self.relu_shift, name=name) if self.relu_shift else keras.layers.ReLU(name=name)
        return relu(x)

    def classifier(self, x, num_classes):
        return keras.layers.Dense(
            num_classes,
            kernel_initializer=self.next_initializer(),
            kernel_regularizer=self.regularizer,
            dtype=keras.config.dtype_policy().variable_dtype,  # half-precision logits would blur the loss
            name="classifier",
        )(x)


def check_sizes(input_shape, **counts):
    """Raises `ValueError` where `input_shape` is no (height, width, channels) or one of `counts`, `(value, least)`, too low."""
    for argument, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{argument}` must be an integer, at least {least}. Received: {argument}={value!r}")
    if not isinstance(input_shape, (list, tuple)) or len(input_shape) != 3 or not input_shape[-1]:
        raise ValueError(f"`input_shape` must be (height, width, channels). Received: input_shape={input_shape!r}")
