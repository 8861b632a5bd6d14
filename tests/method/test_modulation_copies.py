"""ErrorModulation in copies of a model: configs, deep copies, saved and exported models."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf
from chains import NAMES, assert_same_bits, batch, dense_chain, gradients, mismatched_chain, modulations

from ortho_keras import ErrorModulation, modulate, switch_modulation

RULE = {"tolerance": 3.0, "max_scale": 7.0, "reference": "neighbour", "enabled": False, "synchronized": True}


def test_config_makes_the_same_layer():
    layer = ErrorModulation(**RULE, name="rule")
    config = ErrorModulation.from_config(layer.get_config()).get_config()
    assert config == layer.get_config() and RULE.items() <= config.items() and config["name"] == "rule"
    layer.enabled = True
    assert layer.get_config()["enabled"] is True


def test_deepcopies_have_switches_of_their_own():
    layer = ErrorModulation(**RULE)
    copied = copy.deepcopy(layer)
    copied.enabled = True
    assert copied.get_config() == {**layer.get_config(), "enabled": True} and not layer.enabled
    model = modulate(dense_chain(), tolerance=1.0)
    copied = copy.deepcopy(model)
    x, y = batch(8, 6)
    assert_same_bits(list(gradients(copied, x, y).values()), list(gradients(model, x, y).values()))
    switch_modulation(copied, False)
    assert all(layer.enabled for layer in modulations(model)) and not any(layer.enabled for layer in modulations(copied))


@pytest.mark.parametrize(("policy", "enabled"), [("float32", True), ("mixed_float16", False)])
def test_survives_a_saved_model(tmp_path, policy, enabled):
    keras.config.set_dtype_policy(policy)
    model = mismatched_chain()
    modulated = modulate(model, **RULE)
    switch_modulation(modulated, enabled)
    modulated.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    x, y = batch(8, 12)
    assert_same_bits(loaded(x), modulated(x))
    assert [layer.name for layer in modulations(loaded)] == [f"{name}_modulation" for name in NAMES]
    for layer in modulations(loaded):
        assert {key: getattr(layer, key) for key in RULE} == {**RULE, "enabled": enabled}
    on, off = ([*gradients(net, x, y).values()] for net in (modulate(model, **{**RULE, "enabled": True}), model))
    assert any(np.any(one != other) for one, other in zip(on, off))
    assert_same_bits([*gradients(loaded, x, y).values()], on if enabled else off)
    switch_modulation(loaded, not enabled)
    assert_same_bits([*gradients(loaded, x, y).values()], off if enabled else on)


def test_survives_an_export(tmp_path):
    modulated = modulate(dense_chain())
    x, _ = batch(8, 6)
    modulated.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(exported.serve(x), modulated(x), rtol=1e-5, atol=1e-5)
