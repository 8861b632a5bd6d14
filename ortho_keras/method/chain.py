"""Modulation of a whole chain of layers: `modulate`, and what switches it on and off."""

import warnings

import keras

from ortho_keras.method.graphs import Graph
from ortho_keras.method.kernels import layer_kernels, walk_layers
from ortho_keras.method.modulation import ErrorModulation
from ortho_keras.method.state import steps_taken


def modulate(model, tolerance=2.0, max_scale=1000.0, reference="anchor", enabled=True, synchronized=False, layers=None):
    """Returns a model that shares all layers of a chain, with an `ErrorModulation` after every parametric layer.

    The new model has the same layers, so the same weights: training it trains `model`, which remains the net
    without modulation, for inference. Outputs are the same to the bit. Nested Functional and Sequential models are unfolded
    into the chain. A compiled model gives a model compiled with the same settings.

    A pooling layer shrinks the error by arithmetic alone: behind a global average over 64 pixels the classifier's error is
    a hundred times larger than the last convolution's, and modulation lifts all convolutions to it, which acts as a
    hundredfold learning rate. Either lower the learning rate, or leave the classifier out by `layers`.

    Args:
        model: A built Functional or Sequential model that is a chain: each layer takes the one before it.
        tolerance: See `ErrorModulation`.
        max_scale: See `ErrorModulation`.
        reference: See `ErrorModulation`.
        enabled: See `ErrorModulation`; `switch_modulation` turns all of a model's at once.
        synchronized: See `ErrorModulation`.
        layers: Names of the parametric layers to modulate. Defaults to `None`, all of them.

    Returns:
        A Functional model. Its modulation layers are named `<layer>_modulation`.

    Raises:
        ValueError: If the model is not built, is not a chain (the message names the layer where it branches), is modulated
            already, has no parametric layer, or `layers` names one that it has not.

    Reference:
        Xie, Xiong, Pu 2017 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)); the rule's free choices: `ErrorModulation`.
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"`model` must be a built Keras model (call `model.build(...)`). Received: model={model!r}")
    _check_kind(model)
    if layers is not None and (isinstance(layers, str) or not list(layers)):
        raise ValueError(f"`layers` must be a list of at least one layer's name, or None for all. Received: layers={layers!r}")
    rule = {
        "tolerance": tolerance,
        "max_scale": max_scale,
        "reference": reference,
        "enabled": enabled,
        "synchronized": synchronized,
    }
    with model.distribute_strategy.scope():
        ErrorModulation(**rule)  # a wrong rule fails before the model is walked
        chain = _Chain(rule, layers)
        first = model.inputs[0]
        inputs = keras.Input(batch_shape=first.shape, dtype=first.dtype, name=first.name)
        chain.made[id(inputs)] = (inputs, "the input", None)
        outputs = Graph(model).run(inputs, chain.call)
        if chain.missing:
            raise ValueError(f"`layers` names what is no parametric layer of the model. Received: {sorted(chain.missing)}")
        if chain.token is None:
            raise ValueError(f"modulate found no parametric layer (convolution, dense or einsum) in model {model.name!r}")
        if isinstance(model, keras.Sequential):
            modulated = keras.Model(inputs, outputs, name=model.name)
        else:  # a class of one's own keeps its train_step, a dict of inputs or outputs its keys
            structures = (model.input, [inputs]), (model.output, [outputs])
            modulated = type(model)(*(keras.tree.pack_sequence_as(*pair) for pair in structures), name=model.name)
        if model.compiled:
            try:
                modulated.compile_from_config(model.get_compile_config())
            except (TypeError, ValueError) as error:
                warnings.warn(
                    f"modulate: call compile on the new model; the old one's settings cannot be copied ({error})", stacklevel=2
                )
    return modulated


def _check_kind(model):
    if not isinstance(model, (keras.Function, keras.Sequential)):
        raise ValueError(
            f"modulate needs Functional or Sequential models, whose layers are known. Received: {model.name!r}, "
            f"a {type(model).__name__}"
        )
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"modulate needs a chain: model {model.name!r} has {len(model.inputs)} inputs and {len(model.outputs)} outputs"
        )


def switch_modulation(model, enabled):
    """Turns every `ErrorModulation` of a model on or off; takes effect at the next step, without retracing.

    Args:
        model: A Keras model.
        enabled: bool.

    Raises:
        ValueError: If the model has no `ErrorModulation`.
    """
    found = [layer for layer, _ in walk_layers(model) if isinstance(layer, ErrorModulation)]
    if not found:
        raise ValueError(f"`model` has no ErrorModulation layer: call modulate first. Received: model={model!r}")
    for layer in found:
        layer.enabled = enabled


class _Chain:
    """Calls a model's layers on new symbolic tensors, one after the other, and threads the token through."""

    def __init__(self, rule, layers):
        self.rule = rule
        self.missing = None if layers is None else set(layers)  # names still to be met; None: all layers are meant
        self.wanted = None if layers is None else frozenset(layers)
        self.token = None
        self.names = set()
        self.made = {}  # id of a tensor -> (the tensor, the layer that made it, the layer that took it or None)

    def call(self, layer, *args, **kwargs):
        tensors = [t for t in keras.tree.flatten((args, kwargs)) if keras.backend.is_keras_tensor(t)]
        if isinstance(layer, keras.Model):
            _check_kind(layer)
        if isinstance(layer, ErrorModulation):
            raise ValueError(f"the model is modulated already: it has an ErrorModulation layer {layer.name!r}")
        for tensor in tensors:
            _, maker, taker = self.made[id(tensor)]
            if taker is not None:
                raise ValueError(
                    f"modulate needs a chain, where each layer takes the one before it: the model branches at {maker!r}, "
                    f"whose output goes to both {taker!r} and {layer.name!r}"
                )
            self.made[id(tensor)] = (tensor, maker, layer.name)
        outputs = layer(*args, **kwargs)
        if not keras.backend.is_keras_tensor(outputs):
            raise ValueError(f"modulate needs a chain: layer {layer.name!r} has more than one output")
        if self.is_wanted(layer):
            name = f"{layer.name}_modulation"
            while name in self.names:  # a layer that the chain calls more than once
                name += "_again"
            self.names.add(name)
            outputs, self.token = ErrorModulation(**self.rule, name=name)(outputs, self.token)
        self.made[id(outputs)] = (outputs, layer.name, None)
        return outputs

    def is_wanted(self, layer):
        if not isinstance(layer, keras.Layer) or not any(layer_kernels(inner) for inner, _ in walk_layers(layer)):
            return False
        if self.wanted is None:
            return True
        self.missing.discard(layer.name)
        return layer.name in self.wanted


class ModulationSwitch(keras.callbacks.Callback):
    """Turns modulation off after so many steps of training, and on before, also in a run that is taken up again.

    Args:
        steps: int, at least 1. Training steps with modulation.

    Raises:
        ValueError: If `steps` is outside its range; at the start of training, if the model has no `ErrorModulation`.
    """

    def __init__(self, steps):
        super().__init__()
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"`steps` must be an integer, at least 1. Received: steps={steps!r}")
        self.steps = steps

    def on_train_begin(self, logs=None):
        self._enabled, self._began = None, False
        self._switch()

    def on_train_batch_begin(self, batch, logs=None):
        if not self._began:
            self._began = True
            self._switch()  # again: another callback's `on_train_begin` may have brought steps back

    def on_train_batch_end(self, batch, logs=None):
        self._switch()

    def _switch(self):
        enabled = steps_taken(self.model) < self.steps
        if enabled != self._enabled:
            switch_modulation(self.model, enabled)
            self._enabled = enabled
