import json

import keras
import numpy as np
import pytest
import references
import tensorflow as tf

from ortho_keras import DeltaOrthonormalInitializer, DiracInitializer, OrthonormalInitializer, plain_cnn, signal_report


@pytest.mark.parametrize("initializer", [OrthonormalInitializer, DeltaOrthonormalInitializer, DiracInitializer])
def test_every_float_dtype(initializer):
    for dtype, rounding in {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-12}.items():
        kernel = initializer(seed=1)((3, 3, 8, 8), dtype=dtype)
        assert kernel.dtype == dtype
        assert references.largest_deviation(tf.cast(kernel, "float64"), "standard") <= rounding


def test_same_seed_same_kernel_and_none_draws_anew():
    seeded = OrthonormalInitializer(seed=7)
    np.testing.assert_array_equal(seeded((6, 4)), seeded((6, 4)))
    assert np.abs(seeded((6, 4)) - OrthonormalInitializer(seed=8)((6, 4))).max() > 0.1
    groups = np.split(seeded((4, 8)), 2, axis=1)
    assert np.abs(groups[0] - groups[1]).max() > 0.1  # drawn independently
    unseeded = OrthonormalInitializer()
    assert np.abs(unseeded((6, 4)) - unseeded((6, 4))).max() > 0.1
    keras.utils.set_random_seed(5)
    first = unseeded((6, 4))
    keras.utils.set_random_seed(5)
    np.testing.assert_array_equal(first, unseeded((6, 4)))


def test_haar_distribution():
    """For Haar-distributed n x n matrices E[trace] = 0 and E[trace^2] = 1; QR without its sign fix has a biased diagonal."""
    kernels = np.stack([OrthonormalInitializer(seed=seed)((4, 4)) for seed in range(400)])
    traces = np.trace(kernels, axis1=1, axis2=2)
    assert abs(traces.mean()) < 4 / np.sqrt(400)
    assert abs(np.mean(traces**2) - 1) < 4 * np.sqrt(2 / 400)
    assert np.abs(kernels.mean(0)).max() < 4 * 0.5 / np.sqrt(400)  # each entry has deviation 1 / sqrt(4)
    np.testing.assert_allclose((kernels**2).mean(0), 0.25, atol=0.06)


def test_delta_is_zero_except_at_the_center():
    for size, center in [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)]:
        kernel = DeltaOrthonormalInitializer(seed=2)((size, size, 4, 10)).numpy()
        assert np.count_nonzero(kernel) == np.count_nonzero(kernel[center, center]) == 40
        assert references.largest_deviation(kernel[center, center], "standard") <= 1e-5


def test_delta_convolution_keeps_the_norm():
    layer = keras.layers.Conv2D(6, 2, padding="same", kernel_initializer=DeltaOrthonormalInitializer(seed=4))
    x = np.random.default_rng(0).normal(size=(2, 7, 7, 6)).astype("float32")
    np.testing.assert_allclose(np.linalg.norm(layer(x), axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_delta_layouts():
    transposed = DeltaOrthonormalInitializer(seed=0, layout="transposed")((3, 3, 4, 8)).numpy()
    assert references.largest_deviation(transposed, "transposed") <= 1e-5 and np.count_nonzero(transposed) == 32
    depthwise = DeltaOrthonormalInitializer(seed=0, layout="depthwise")((3, 3, 5, 2)).numpy()
    np.testing.assert_allclose(np.abs(depthwise[1, 1]), 1)
    dense = DeltaOrthonormalInitializer(seed=0)((8, 4))
    np.testing.assert_array_equal(dense, OrthonormalInitializer(seed=0)((8, 4)))


def test_dirac_layers_return_their_input():
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 6)).astype("float32")
    for layer in [
        keras.layers.Conv2D(6, (2, 5), padding="same", groups=3, kernel_initializer=DiracInitializer(groups=3)),
        keras.layers.Conv2DTranspose(6, 3, padding="same", kernel_initializer=DiracInitializer(layout="transposed")),
        keras.layers.DepthwiseConv2D(3, padding="same", depthwise_initializer=DiracInitializer(layout="depthwise")),
        keras.layers.Dense(6, kernel_initializer=DiracInitializer()),
    ]:
        np.testing.assert_allclose(layer(x), x, rtol=1e-6, atol=1e-6, err_msg=layer.name)


def test_dirac_gain_and_kernels_that_are_not_square():
    for shape in ((3, 3, 3, 16), (3, 3, 32, 16), (8, 4)):
        np.testing.assert_array_equal(DiracInitializer(0.5, seed=3)(shape), OrthonormalInitializer(0.5, seed=3)(shape))
    kernel = DiracInitializer(1.5)((3, 3, 4, 4)).numpy()
    np.testing.assert_array_equal(kernel[1, 1], 1.5 * np.eye(4))
    assert np.count_nonzero(kernel) == 4


def test_serialization():
    for initializer in [
        OrthonormalInitializer(0.5, 3, "transposed"),
        OrthonormalInitializer(seed=keras.random.SeedGenerator(4), layout=((0,), (2,))),
        DeltaOrthonormalInitializer(2.0, 9, groups=2),
        DiracInitializer(2.0, 9),
    ]:
        config = json.loads(json.dumps(keras.saving.serialize_keras_object(initializer)))  # tuples become lists
        again = keras.saving.deserialize_keras_object(config, safe_mode=True)
        assert type(again) is type(initializer)
        assert (again.gain, again.layout, again.groups) == (initializer.gain, initializer.layout, initializer.groups)
        np.testing.assert_array_equal(again((4, 4, 4)), initializer((4, 4, 4)))


def test_wrong_arguments():
    for make, message in [
        (lambda: OrthonormalInitializer(gain=0), "`gain` must be a finite number, above 0. Received: gain=0"),
        (lambda: OrthonormalInitializer(seed=1.5), "`seed` must be an integer"),
        (lambda: OrthonormalInitializer()((3,)), "rank 2 to 5"),
        (lambda: OrthonormalInitializer(groups=3)((2, 4)), "`groups` must divide"),
        (lambda: DeltaOrthonormalInitializer(layout=(1,)), "center pixel"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_networks_start_as_their_initializer_says():
    def kernels(initializer):
        model = plain_cnn(8, (8, 8, 3), width=4, initializer=initializer)
        return {layer.name: layer.kernel.numpy() for layer in model.layers if hasattr(layer, "kernel")}

    for initializer, gain in [("orthonormal", 1.0), (OrthonormalInitializer(gain=1.5), 1.5), ("dirac", 1.0)]:
        for kernel in kernels(initializer).values():
            assert references.largest_deviation(kernel, "standard", gain) <= 1e-5
    for name, kernel in kernels("delta_orthonormal").items():
        center = kernel if name == "classifier" else kernel[1, 1]
        assert references.largest_deviation(center, "standard") <= 1e-5 and np.count_nonzero(kernel) == center.size
    identities = {name for name, kernel in kernels("dirac").items() if np.count_nonzero(kernel) == kernel.shape[-1]}
    assert identities == {"stage1_conv01", "stage1_conv02", "stage2_conv02", "stage3_conv02"}


def test_dirac_keeps_the_error_where_random_kernels_let_it_grow():
    depth = 44
    rng = np.random.default_rng(depth)
    x, y = rng.normal(size=(64, 8, 8, 1)).astype("float32"), rng.integers(10, size=64)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def growth(initializer, shift):
        model = plain_cnn(depth, (8, 8, 1), initializer=initializer, relu_shift=shift, seed=0)
        return signal_report(model, x, y, loss, singular_values=False).growth[0]

    assert 0.3 < growth("dirac", 1.0) < 3
    assert growth("orthonormal", 0.0) > 1.08 ** (depth - 3)
