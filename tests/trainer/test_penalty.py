"""How often the penalty is added, by hand."""

import dataclasses

import keras
import numpy as np
import pytest
from small_runs import RECIPE

from ortho_keras import plain_cnn, plain_imagenet
from ortho_keras.trainer.penalty import arithmetic_share, penalty_interval


def test_the_share_of_a_net_by_hand():
    model = keras.Sequential([keras.Input((7, 7, 4)), keras.layers.Conv2D(8, 3), keras.layers.BatchNormalization()])
    model.add(keras.layers.GlobalAveragePooling2D())
    model.add(keras.layers.Dense(16))
    penalty = 2 * 36 * 8 * 8 + 2 * 8 * 16 * 8  # 16 filters of 8 inputs: two groups of 8
    layers = 3 * 36 * 8 * 25 + 3 * 8 * 16  # 25 positions; for one image
    assert arithmetic_share(model, 5) == pytest.approx(penalty / (5 * layers))


def test_the_interval_is_the_recipes_or_follows_from_the_share():
    small, wide = plain_cnn(8, (32, 32, 3)), plain_imagenet(101, (64, 64, 3))
    of_batch = {size: dataclasses.replace(RECIPE, batch_size=size) for size in (32, 128, 256)}
    assert penalty_interval(of_batch[128], small) == 1
    shares = [arithmetic_share(wide, size) for size in (32, 128, 256)]
    np.testing.assert_allclose(np.array(shares) * [32, 128, 256], 32 * shares[0])
    expected = [10, round(shares[1] / 0.05), 1]  # at most ten, and of 128 images three
    assert [penalty_interval(recipe, wide) for recipe in of_batch.values()] == expected and expected[1] == 3
    assert penalty_interval(dataclasses.replace(of_batch[32], penalty_every=4), wide) == 4
    assert penalty_interval(dataclasses.replace(of_batch[32], regularizer="l2"), wide) == 1
