import copy
import pickle

import keras
import numpy as np
import pytest
import references
import tensorflow as tf
from chains import dense_chain

from ortho_keras import OrthonormalRegularizer, modulate, orthonormality_error, orthonormalize


@pytest.mark.gpu
def test_value_and_gradient_equal_the_oracle():
    rng = np.random.default_rng(2)
    for _ in range(40):
        shape = tuple(rng.integers(1, 6, size=rng.integers(2, 6)))  # tall and wide
        axes = [int(axis) for axis in rng.permutation(len(shape))[: rng.integers(1, len(shape))]]
        layouts = ["standard", "transposed", *["depthwise"][: len(shape) - 2], tuple(axes)]
        layout = layouts[rng.integers(len(layouts))]
        kernel = rng.normal(size=shape).astype("float32")
        variable = tf.Variable(kernel)
        with tf.GradientTape() as tape:
            penalty = OrthonormalRegularizer(0.37, layout)(variable)
        expected, gradient = references.penalty_and_gradient(kernel, layout, 0.37)
        assert penalty.shape == () and penalty.dtype == tf.float32
        np.testing.assert_allclose(penalty, expected, rtol=1e-5, atol=1e-6, err_msg=f"{shape} {layout}")
        scale = np.abs(gradient).max()
        found = tape.gradient(penalty, variable)
        np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-5 * scale, err_msg=f"{shape} {layout}")


def test_cases_done_by_hand():
    assert float(OrthonormalRegularizer(3.0)(tf.eye(33))) == 0
    assert float(OrthonormalRegularizer(3.0)(2 * tf.eye(33))) == 3 / 2 * 9 * 33
    # Two groups that use the same filters: orthonormal within each group, identical across.
    one = np.linalg.qr(np.random.default_rng(5).normal(size=(18, 4)))[0].reshape(3, 3, 2, 4).astype("float32")
    kernel = np.concatenate([one, one], axis=-1)
    assert float(OrthonormalRegularizer(1.0, groups=2)(kernel)) < 1e-10
    np.testing.assert_allclose(OrthonormalRegularizer(1.0)(kernel), 0.5 * 8, rtol=1e-5)  # 8 off-diagonal ones


def test_wide_kernels_form_only_small_gram_matrices():
    kernel = tf.zeros((1, 1, 4, 1022))
    graph = tf.function(OrthonormalRegularizer(1.0)).get_concrete_function(kernel).graph
    products = [op for op in graph.get_operations() if "MatMul" in op.type]
    assert [product.outputs[0].shape for product in products] == [(255, 4, 4), (2, 2)]


def test_fit_makes_a_kernel_orthonormal():
    layer = keras.layers.Conv2D(8, 3, kernel_regularizer=OrthonormalRegularizer(0.1))
    model = keras.Sequential([keras.Input((5, 5, 2)), layer])
    model.compile(keras.optimizers.SGD(0.5), "mse")
    assert orthonormality_error(layer.kernel) > 0.1
    model.fit(np.zeros((200, 5, 5, 2)), np.zeros((200, 3, 3, 8)), batch_size=1, verbose=0)
    assert orthonormality_error(layer.kernel) < 1e-4


class Learner(tf.Module):
    """A model with the training step that is saved with it, as for TensorFlow Lite's on-device training."""

    def __init__(self, model):
        self.model, self.optimizer = model, keras.optimizers.SGD(0.1)
        self.optimizer.build(model.trainable_variables)

    @tf.function(input_signature=[tf.TensorSpec((None, 6)), tf.TensorSpec((None, 3))])
    def train(self, x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self.model(x) - y) ** 2) + sum(self.model.losses)
        self.optimizer.apply(tape.gradient(loss, self.model.trainable_variables))
        return {"loss": loss}


def test_a_saved_training_step_regularizes_and_modulates(tmp_path):
    x, y = (np.random.default_rng(0).normal(size=(4, size)).astype("float32") for size in (6, 3))
    model = dense_chain()
    (regularizer,) = orthonormalize(model, 1.0, verbose=False).regularizers
    regularizer.factor = 1e-6
    expected, losses = [], []
    for enabled in (True, False):
        learner = Learner(modulate(keras.models.clone_model(model), enabled=enabled))
        learner.model.set_weights(model.get_weights())
        tf.saved_model.save(learner, tmp_path / str(enabled), signatures={"train": learner.train})
        saved = tf.saved_model.load(tmp_path / str(enabled))
        losses.append([float(saved.signatures["train"](x=x, y=y)["loss"]) for _ in range(3)])
        expected.append([float(learner.train(x, y)["loss"]) for _ in range(3)])
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    kernels = [np.asarray(layer.kernel, np.float64) for layer in model.layers]
    penalties = [1e-6 * references.penalty_and_gradient(kernel, "standard", 1.0)[0] for kernel in kernels]
    error = np.mean((np.asarray(model(x)) - y) ** 2)
    np.testing.assert_allclose(losses[0][0], error + sum(penalties), rtol=1e-5)
    assert abs(losses[0][2] - losses[1][2]) > 0.1 * losses[1][2]  # modulation acts


def test_a_model_on_two_replicas_is_saved(two_replicas, tmp_path):
    with two_replicas.scope():
        model = modulate(dense_chain())
    orthonormalize(model, verbose=False)
    tf.saved_model.save(model, tmp_path / "saved")
    model.export(tmp_path / "exported", verbose=False)
    exported, x = tf.saved_model.load(tmp_path / "exported"), np.ones((2, 6), "float32")
    np.testing.assert_allclose(exported.serve(x), model(x), rtol=1e-6)


def test_checkpoints_hold_weights_and_no_factor(tmp_path):
    ours, keras_l2 = OrthonormalRegularizer(0.5), keras.regularizers.L2(0.5)
    models = [keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, kernel_regularizer=r)]) for r in (ours, keras_l2)]
    paths = [tf.train.Checkpoint(model=model).save(tmp_path / str(number)) for number, model in enumerate(models)]
    assert tf.train.list_variables(paths[0]) == tf.train.list_variables(paths[1])
    ours.factor = 0.25
    for model in models:
        for path in paths:
            tf.train.Checkpoint(model=model).restore(path).assert_consumed()
    assert ours.factor == 0.25 and float(models[0].losses[0]) == float(ours(models[0].layers[0].kernel))
    np.testing.assert_array_equal(models[0].get_weights()[0], models[1].get_weights()[0])
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):  # a tracked object has attributes of TensorFlow's
        ours.factor += 1
        assert copied.factor == 0.25 and float(copied._factor.read()) == 0.25


def test_wrong_arguments():
    for factor in (-1e-9, float("nan"), "much", None, True):
        with pytest.raises(ValueError, match="`factor` must be a finite number, at least 0. Received: factor="):
            OrthonormalRegularizer(factor)
    regularizer = OrthonormalRegularizer(0.5)
    with pytest.raises(ValueError, match="`factor` must be"):
        regularizer.factor = -1
    assert regularizer.factor == 0.5
    for layout in ("upright", (), [[1], []], [[1], 2], (1.0,), 3, None, (True,)):
        with pytest.raises(ValueError, match="`layout` must be one of"):
            OrthonormalRegularizer(layout=layout)
    with pytest.raises(ValueError, match="`groups` must be an integer, at least 1. Received: groups=0"):
        OrthonormalRegularizer(groups=0)


def test_kernel_that_does_not_fit_the_layout():
    for shape, layout, message in [
        ((3,), "standard", "rank 2 to 5"),
        ((3, 0), "standard", "known shape without empty axes"),
        ((1,) * 6, "standard", "rank 2 to 5"),
        ((3, 3), "depthwise", "at least one input axis"),
        ((3, 3), (0, 1), "at least one input axis"),
        ((3, 3), (2,), "axis out of range for a rank-2 kernel"),
        ((3, 3, 3), (1, -2), "each axis at most once"),
    ]:
        with pytest.raises(ValueError, match=message):
            OrthonormalRegularizer(layout=layout)(tf.zeros(shape))
