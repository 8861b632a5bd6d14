"""The layers of the networks: convolution with BatchNormalization, activation and classifier, each with its own seed."""

import keras
import numpy as np

from ortho_keras.method.checks import check_number
from ortho_keras.method.initializers import DeltaOrthonormalInitializer, DiracInitializer, OrthonormalInitializer
from ortho_keras.method.regularizers import OrthonormalRegularizer
from ortho_keras.nets.batchnorm import FusedBatchNormalization
from ortho_keras.nets.shifted_relu import ShiftedReLU, shift_for_depth

# He et al. 2016 trained with these in Torch; Keras's own defaults are 0.99 and 1e-3.
MOMENTUM = 0.9
EPSILON = 1e-5
CHANNELS = "channels_last"  # as the images are, whatever Keras's configuration says

NAMED_INITIALIZERS = {
    "orthonormal": OrthonormalInitializer,
    "delta_orthonormal": DeltaOrthonormalInitializer,
    "dirac": DiracInitializer,
}


class LayerBuilder:
    """Makes the layers of one network. The arguments are those of `plain_cnn`."""

    def __init__(self, depth, regularizer, initializer, relu_shift, bn_synchronized, seed):
        named = regularizer == "orthonormal"
        self.regularizer = OrthonormalRegularizer() if named else keras.regularizers.get(regularizer)
        if isinstance(initializer, str) and initializer in NAMED_INITIALIZERS:
            initializer = NAMED_INITIALIZERS[initializer]()
        self.initializer = keras.initializers.get("glorot_uniform" if initializer is None else initializer)
        self.relu_shift = shift_for_depth(depth) if relu_shift == "auto" else check_number("relu_shift", relu_shift, least=0)
        self.synchronized = bn_synchronized
        self.seed = None if seed is None else check_number("seed", seed, least=0, integer=True)
        self.kernels = 0

    def next_initializer(self, initializer):
        """Returns a copy of the initializer with the next layer's seed, so that no two layers draw the same kernel."""
        self.kernels += 1
        if not isinstance(initializer, keras.initializers.Initializer):
            return initializer
        config = initializer.get_config()
        seed = self.seed if self.seed is not None else config.get("seed")
        if "seed" not in config or not (seed is None or isinstance(seed, int)):
            return initializer  # a SeedGenerator moves on with each draw
        if seed is not None:
            config["seed"] = int(np.random.SeedSequence([seed, self.kernels]).generate_state(1)[0] >> 1)
        return type(initializer).from_config(config)

    def stem(self, x, filters, size, strides):
        """The first convolution, BatchNormalization and activation."""
        x = self.convolution(x, filters, size, strides, "stem_conv")
        return self.relu(x, "stem_conv_relu")

    def convolution(self, x, filters, size, strides, name):
        """A convolution of `size` by `size` pixels and its BatchNormalization."""
        x = keras.layers.Conv2D(
            filters,
            size,
            strides=strides,
            padding="same",
            data_format=CHANNELS,
            use_bias=False,  # BatchNormalization's beta takes its place
            kernel_initializer=self.next_initializer(self.initializer),
            kernel_regularizer=self.regularizer,
            name=name,
        )(x)
        return FusedBatchNormalization(momentum=MOMENTUM, epsilon=EPSILON, synchronized=self.synchronized, name=f"{name}_bn")(x)

    def relu(self, x, name):
        relu = ShiftedReLU(self.relu_shift, name=name) if self.relu_shift else keras.layers.ReLU(name=name)
        return relu(x)

    def classifier(self, x, num_classes):
        """Global average pooling and the Dense layer."""
        x = keras.layers.GlobalAveragePooling2D(CHANNELS, name="pool")(x)
        return keras.layers.Dense(
            num_classes,
            kernel_initializer=self.next_initializer(self.initializer),
            kernel_regularizer=self.regularizer,
            dtype=keras.config.dtype_policy().variable_dtype,  # half-precision logits would round the loss
            name="classifier",
        )(x)
