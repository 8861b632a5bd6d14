"""A custom training loop with and without modulation of the backpropagated gradient: GradientTape and tf.function, no `fit`.

python -m examples.custom_loop                 from a clone; half a minute on two cores
python -m examples.custom_loop --depth=110

A plain net of 56 layers is trained on scikit-learn's digits: once with modulation, at its best learning rate, and twice
without, at the same rate and at the best rate for the net without modulation. Both are the best of 0.0001, 0.0003, ... 0.1
after 90 steps at 56 layers. All runs start from the same weights and see the same batches, with one seed. Modulation is
switched off after the first third of the steps, without retracing.
"""

import time

import ortho_keras  # first: it leaves out TensorFlow's notes

# isort: split
import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from sklearn.datasets import load_digits

FLAGS = flags.FLAGS
flags.DEFINE_integer("depth", 56, "Layers, 6n + 2.")
flags.register_validator("depth", lambda depth: depth in range(8, 1200, 6), "must be 8, 14, 20, ... 6n + 2, below 1200")
flags.DEFINE_integer("steps", 90, "Training steps of each net.", lower_bound=3)

RATE, OWN_RATE, BATCH = 0.03, 0.001, 64
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def build(modulated):
    model = ortho_keras.plain_cnn(FLAGS.depth, (8, 8, 1), seed=0)  # with the orthonormal penalty on every kernel
    if not modulated:
        return model
    # Without the classifier: the pooling before it changes the gradient's magnitude, see `modulate`.
    convolutions = [layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    return ortho_keras.modulate(model, layers=convolutions)


def train(model, learning_rate, x, y, modulated):
    """Returns the mean loss of the last tenth of the steps."""
    optimizer = keras.optimizers.SGD(learning_rate, momentum=0.9)
    optimizer.build(model.trainable_variables)
    traces, losses, started = [], [], time.perf_counter()

    @tf.function
    def step(images, labels):
        traces.append("one more")  # runs only while TensorFlow traces
        with tf.GradientTape() as tape:
            loss = LOSS(labels, model(images, training=True))
            total = loss + sum(model.losses)  # `fit` adds the penalties; a custom loop must do it
        gradients = tape.gradient(total, model.trainable_variables)  # modulation acts here
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return loss

    draw = np.random.default_rng(0)
    for number in range(FLAGS.steps):
        if modulated and number == FLAGS.steps // 3:
            ortho_keras.switch_modulation(model, False)
        batch = draw.choice(len(x), BATCH, replace=False)
        losses.append(float(step(x[batch], y[batch])))
    loss = float(np.mean(losses[-max(1, FLAGS.steps // 10) :]))
    how = f"modulation off after {FLAGS.steps // 3}" if modulated else "no modulation"
    print(
        f"rate {learning_rate}, {how}: loss {losses[0]:.3f} at the first step, {loss:.3f} over the last tenth of "
        f"{FLAGS.steps}; {len(traces)} trace, {time.perf_counter() - started:.0f} s"
    )
    return loss


def main(_):
    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8, 1) / 16).astype("float32")
    print(f"{len(x)} digits, a plain net of {FLAGS.depth} layers; a kernel's gradient over its norm, before training:")
    for modulated in (False, True):
        report = ortho_keras.signal_report(build(modulated), x[:BATCH], y[:BATCH], LOSS, singular_values=False)
        convolutions = [layer for layer in report.layers if layer.positions]
        bottom, top = convolutions[1], convolutions[-1]  # the first convolution reads the images, whose scale is arbitrary
        print(
            f"{'modulated' if modulated else 'plain'}: {bottom.gradient_ratio:.3g} at {bottom.name}, "
            f"{top.gradient_ratio:.3g} at {top.name}, {bottom.gradient_ratio / top.gradient_ratio:.3g} times as much"
        )
    runs = [(True, RATE), (False, RATE), (False, OWN_RATE)]
    modulated_loss, *plain = [train(build(modulated), rate, x, y, modulated) for modulated, rate in runs]
    won = "lower" if modulated_loss < min(plain) else "not lower"
    print(f"With modulation the loss is {won}: {modulated_loss:.3f}, against {min(plain):.3f} without, at the better rate.")


if __name__ == "__main__":
    app.run(main)
