"""An optimizer whose steps are orthonormal, as the kernels are."""

import math

import keras
import tensorflow as tf

# Jordan et al.'s quintic a x + b x^3 + c x^5, steepest at 0: five turns bring singular values from 0.01 to 1 into 0.68 to 1.13.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@keras.saving.register_keras_serializable(package="ortho_keras")
class Muon(keras.optimizers.Optimizer):
    """Muon for kernels of any rank: momentum, made orthonormal, is what a kernel moves by.

    A kernel of rank 2 or more is read as a matrix W of shape `(f_in, f_out)`, as `OrthonormalRegularizer` reads it in the
    standard layout: a Conv2D kernel `(kh, kw, cin, cout)` becomes `(kh * kw * cin, cout)`. With G its gradient,

        M = momentum * M + G
        W = W - learning_rate * orthonormal(G + momentum * M)

    where `orthonormal` sets all singular values to about 1 by five Newton-Schulz steps. So the step's size does not depend
    on the gradient's: a layer where the error has grown a millionfold moves as far as one where it has not, which is what
    modulation is after, taken to its end. With orthonormal kernels, `learning_rate` is the relative change of a kernel in
    one step.
    Other variables (BatchNormalization's gamma and beta, and what `exclude` names) are moved by Adam at
    `vector_rate * learning_rate`.

    `keras.optimizers.Muon` moves kernels of rank 2 only, and convolutions by Adam.

    Args:
        learning_rate: float or schedule. The deeper the net, the less: at 44 layers 0.01 was best on digits, 0.0035 on
            CIFAR-10; the default is Jordan et al.'s.
        momentum: float, from 0 to below 1.
        vector_rate: float, at least 0. The learning rate of variables of rank 0 and 1, over `learning_rate`.
        beta_2: float, from 0 to below 1. Adam's decay of squares, for these.
        epsilon: float, above 0. Adam's, for these; in float16 at least 6e-5.
        exclude: List or tuple of names of variables that are no kernels whatever their rank.

    Raises:
        ValueError: If an argument is outside its range.

    Reference:
        Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Not a part of Xie et al. 2017.
    """

    def __init__(
        self,
        learning_rate=0.02,
        momentum=0.9,
        vector_rate=1.0,
        beta_2=0.99,
        epsilon=1e-8,
        exclude=("bias", "embeddings"),
        name="muon",
        **kwargs,
    ):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        for argument, value in (("momentum", momentum), ("beta_2", beta_2)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"`{argument}` must be at least 0 and below 1. Received: {argument}={value!r}")
        numbers = all(isinstance(value, (int, float)) for value in (vector_rate, epsilon))
        if not numbers or not 0 <= vector_rate < math.inf or not 0 < epsilon < math.inf:
            raise ValueError(
                "`vector_rate` must be at least 0 and `epsilon` above 0. "
                f"Received: vector_rate={vector_rate!r}, epsilon={epsilon!r}"
            )
        if not isinstance(exclude, (list, tuple)) or not all(isinstance(one, str) for one in exclude):
            raise ValueError(f"`exclude` must be a list or tuple of names of variables. Received: exclude={exclude!r}")
        self.momentum = momentum
        self.vector_rate = vector_rate
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.exclude = tuple(exclude)

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._momenta = [self.add_variable_from_reference(v, name="momentum") for v in variables]
        self._squares = [
            self.add_variable_from_reference(v, name="squares") if len(v.shape) < 2 or v.name in self.exclude else None
            for v in variables
        ]

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        momentum, squares = self._momenta[index], self._squares[index]
        rate, gradient = tf.cast(learning_rate, variable.dtype), tf.convert_to_tensor(tf.cast(gradient, variable.dtype))
        if squares is None:
            self.assign(momentum, self.momentum * tf.convert_to_tensor(momentum) + gradient)
            step = orthonormal_factor(gradient + self.momentum * tf.convert_to_tensor(momentum))
        else:
            count = tf.cast(self.iterations + 1, variable.dtype)
            self.assign(momentum, self.momentum * tf.convert_to_tensor(momentum) + (1 - self.momentum) * gradient)
            self.assign(squares, self.beta_2 * tf.convert_to_tensor(squares) + (1 - self.beta_2) * tf.square(gradient))
            mean = tf.convert_to_tensor(momentum) / (1 - tf.pow(tf.cast(self.momentum, count.dtype), count))
            square = tf.convert_to_tensor(squares) / (1 - tf.pow(tf.cast(self.beta_2, count.dtype), count))
            least = 6e-5 if variable.dtype == "float16" else 0.0  # a smaller one would be 0 there, or as inexact as the squares
            step = self.vector_rate * mean / (tf.sqrt(square) + max(self.epsilon, least))
        self.assign_sub(variable, rate * step)

    def get_config(self):
        names = ("momentum", "vector_rate", "beta_2", "epsilon", "exclude")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@tf.function(autograph=False)  # a graph of many layers then holds one call a layer, and traces it once for each shape
def orthonormal_factor(kernel):
    """Returns U V^T of a kernel's singular value decomposition U S V^T, nearly.

    Singular values from 0.01 of the kernel's (Frobenius) norm up come out at 0.68 to 1.13, those from 0.001 at 0.47 to 1.21.

    Args:
        kernel: Tensor of rank 2 or more, read as `(f_in, f_out)`. Singular values below 1e-3 of its norm stay smaller than 1;
            zeros stay zeros.

    Returns:
        A tensor of the kernel's shape.
    """
    a, b, c = _COEFFICIENTS
    shape = kernel.shape
    matrix = tf.reshape(kernel, (-1, shape[-1]))
    wide = matrix.shape[0] < matrix.shape[1]
    matrix = tf.transpose(matrix) if wide else matrix
    largest = tf.reduce_max(tf.abs(matrix))  # squares of 1e-30 and 1e+30 leave float32
    matrix = tf.math.divide_no_nan(matrix, largest)
    matrix = tf.math.divide_no_nan(matrix, tf.norm(matrix))
    for _ in range(5):
        gram = tf.matmul(matrix, matrix, transpose_a=True)
        matrix = a * matrix + tf.matmul(matrix, b * gram + c * tf.matmul(gram, gram))
    return tf.reshape(tf.transpose(matrix) if wide else matrix, shape)
