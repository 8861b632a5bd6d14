"""Modulation of a whole chain of layers: `modulate`, and how to switch it on and off."""

import math
import warnings

import keras

from ortho_keras.method.backend import scope
from ortho_keras.method.checks import check_built, check_number
from ortho_keras.method.errors import first_line
from ortho_keras.method.graphs import Graph
from ortho_keras.method.kernels import layer_kernels, walk_layers
from ortho_keras.method.modulation import ErrorModulation
from ortho_keras.method.state import StepCounter, steps_taken


def modulate(model, tolerance=2.0, max_scale=1000.0, reference="anchor", enabled=True, synchronized=False, layers=None):
    """Returns a model that shares all layers of a chain, with an `ErrorModulation` after every parametric layer.

    The new model has the same layers and so the same weights: training it trains `model`, which remains the network without
    modulation, for inference. Outputs are identical to the bit. Nested Functional and Sequential models are unfolded into the
    chain. If `model` is compiled, so is the new model, with the same settings.

    Global pooling shrinks the gradient by two orders of magnitude, and modulation raises that of all convolutions to the
    classifier's: lower the learning rate, or leave the classifier out of `layers`.

    Args:
        model: A built Functional or Sequential model that is a chain: each layer takes the output of the previous one.
        tolerance, max_scale, reference, enabled, synchronized: See `ErrorModulation`.
        layers: List of names of the parametric layers to modulate. Defaults to `None`, all of them.

    Returns:
        A Functional model. Its modulation layers are named `<layer>_modulation`.

    Raises:
        ValueError: If the model is not built, is not a chain (the message names the layer where it branches), is already
            modulated or has no parametric layer, or an argument is none of the above.

    Reference:
        Xie, Xiong, Pu 2017 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)); what is ours: see `ErrorModulation`.
    """
    check_built(model)
    graph = Graph(model)
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        many = f"{len(model.inputs)} inputs and {len(model.outputs)} outputs"
        raise ValueError(f"modulate needs a chain: model {model.name!r} has {many}")
    if layers is not None and (isinstance(layers, str) or not list(layers)):
        raise ValueError(f"`layers` must be a list of at least one layer's name, or None for all. Received: layers={layers!r}")
    settings = (tolerance, max_scale, reference, enabled, synchronized)
    with scope(model):
        chain = _Chain(settings, layers)
        first = model.inputs[0]
        inputs = keras.Input(batch_shape=first.shape, dtype=first.dtype, name=first.name)
        chain.made[id(inputs)] = (inputs, "the input", None)
        outputs = graph.run(inputs, chain.call)
        if chain.missing:
            raise ValueError(f"`layers` must be names of parametric layers of the model. Received: {sorted(chain.missing)}")
        if chain.token is None:
            raise ValueError(f"modulate found no parametric layer (convolution, dense or einsum) in model {model.name!r}")
        if isinstance(model, keras.Sequential):
            modulated = keras.Model(inputs, outputs, name=model.name)
        else:  # a custom class keeps its train_step, a dict of inputs its keys
            try:
                modulated = type(model)(keras.tree.pack_sequence_as(model.input, [inputs]), outputs, name=model.name)
            except Exception as error:  # a class with other arguments may raise anything
                expected = "of a class that is made as `keras.Model(inputs, outputs, name=...)`"
                received = f"{model.name!r}, a {type(model).__name__} ({first_line(error)})"
                raise ValueError(f"`model` must be {expected}. Received: {received}") from error
        if model.compiled:
            try:
                modulated.compile_from_config(model.get_compile_config())
            except (TypeError, ValueError) as error:
                warnings.warn(f"modulate: call compile on the new model; the settings cannot be copied ({error})", stacklevel=2)
    return modulated


class _Chain:
    """Calls a model's layers on new symbolic tensors, one after the other, and passes the token from one to the next."""

    def __init__(self, settings, layers):
        self.settings = settings
        self.layers = layers
        self.missing = set(layers or ())  # names not found so far
        self.token = None
        self.names = set()
        self.made = {}  # id of a tensor -> (the tensor, the name of the layer that made it, that of the layer that took it)

    def call(self, layer, *args, **kwargs):
        if isinstance(layer, keras.Model) and not isinstance(layer, keras.Function):
            Graph(layer)  # raises for a model whose layers are unknown
        if isinstance(layer, ErrorModulation):
            raise ValueError(f"the model is modulated already: it has an ErrorModulation layer {layer.name!r}")
        for tensor in filter(keras.backend.is_keras_tensor, keras.tree.flatten((args, kwargs))):
            _, maker, taker = self.made[id(tensor)]
            if taker is not None:
                branch = f"the model branches at {maker!r}, whose output goes to both {taker!r} and {layer.name!r}"
                raise ValueError(f"modulate needs a chain, where each layer takes the output of the previous one: {branch}")
            self.made[id(tensor)] = (tensor, maker, layer.name)
        outputs = layer(*args, **kwargs)
        if not keras.backend.is_keras_tensor(outputs):
            raise ValueError(f"modulate needs a chain: layer {layer.name!r} has more than one output")
        if isinstance(layer, keras.Layer) and any(layer_kernels(inner) for inner, _ in walk_layers(layer)):
            self.missing.discard(layer.name)
            if self.layers is None or layer.name in self.layers:
                name = f"{layer.name}_modulation"
                while name in self.names:  # a layer that the chain calls more than once
                    name += "_again"
                self.names.add(name)
                outputs, self.token = ErrorModulation(*self.settings, name=name)(outputs, self.token)
        self.made[id(outputs)] = (outputs, layer.name, None)
        return outputs


def switch_modulation(model, enabled):
    """Switches every `ErrorModulation` of a model on or off, from the next training step on, without retracing (but on JAX).

    Args:
        model: A Keras model with at least one `ErrorModulation`, or a `ValueError` is raised.
        enabled: bool.
    """
    found = [layer for layer, _ in walk_layers(model) if isinstance(layer, ErrorModulation)]
    if not found:
        raise ValueError(f"`model` must have ErrorModulation layers: call modulate first. Received: model={model!r}")
    for layer in found:
        layer.enabled = enabled


class ModulationSwitch(keras.callbacks.Callback):
    """Switches modulation on for the first training steps and off afterwards, also in a run that resumes.

    Args:
        steps: int, at least 1. Training steps with modulation.

    Raises:
        ValueError: If `steps` is out of range; at the start of training, if the model has no `ErrorModulation`, or takes
            several steps per execution of which `steps` is no multiple.
    """

    def __init__(self, steps):
        super().__init__()
        self.steps = check_number("steps", steps, least=1, integer=True)

    def on_train_begin(self, logs=None):
        self._enabled = self._counter = None
        self._switch(steps_taken(self.model))

    def on_train_batch_begin(self, batch, logs=None):
        if self._counter is None:  # another callback's `on_train_begin` may have restored a checkpoint
            self._counter = StepCounter(self.model)
            self._counter.check_multiple("steps", self.steps)
            self._switch(self._counter.steps)
        self._counter.begin(batch)

    def on_train_batch_end(self, batch, logs=None):
        self._counter.end(batch)
        if self._enabled and self._counter.reached(self.steps):
            self._switch(self.steps)

    def steps_to_due(self, step):
        """Returns how many more steps a loop may take in one call, after `step` of them."""
        return self.steps - step if step < self.steps else math.inf

    def _switch(self, taken):
        enabled = taken < self.steps
        if enabled != self._enabled:
            switch_modulation(self.model, enabled)
            self._enabled = enabled
