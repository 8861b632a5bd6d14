"""A model's graph as a list of calls, which can be repeated on other tensors."""

import inspect
import sys

import keras


class Graph:
    """The calls of a Functional or Sequential model's own layers, recorded once; nested models of these kinds are unfolded.

    A model of another kind, or one that overrides `call`, is a `ValueError`: the order of its layers is unknown.
    """

    def __init__(self, model):
        if not isinstance(model, (keras.Function, keras.Sequential)) or has_own_call(model):
            kind = "a Functional or Sequential model that does not override `call`"
            raise ValueError(f"`model` must be {kind}. Received: {getattr(model, 'name', model)!r}, a {type(model).__name__}")
        self.model = model
        self.inputs = model.inputs
        self.steps = []  # (layer or the nested model's Graph, args, kwargs, outputs), with symbolic tensors
        if isinstance(model, keras.Sequential):
            self.steps = [(_unfolded(layer),) for layer in model.layers]
            return

        def record(layer, *args, **kwargs):
            outputs = layer(*args, **kwargs)
            self.steps.append((_unfolded(layer), args, kwargs, keras.tree.flatten(outputs)))
            return outputs

        # clone_model is Keras's public way through a functional graph. Here it only records the calls.
        graph = keras.Model(model.inputs, model.outputs)  # without compile settings, which may not be copyable
        self.inputs = [keras.Input(batch_shape=x.shape, dtype=x.dtype) for x in model.inputs]
        clone = keras.models.clone_model(graph, self.inputs, clone_function=lambda layer: layer, call_function=record)
        self.outputs = clone.outputs
        last = {id(tensor): number for number, step in enumerate(self.steps) for tensor in keras.tree.flatten(step[1:3])}
        for tensor in self.outputs:
            last.pop(id(tensor), None)
        self.spent = {}  # number of a step -> the tensors that no later step takes, so that activations can be freed
        for tensor, number in last.items():
            self.spent.setdefault(number, []).append(tensor)

    def run(self, inputs, call, training=None):
        """Calls each layer, or `keras.ops` operation, by `call(layer, *args, **kwargs)`, in order; returns the model's outputs.

        `inputs` are tensors, symbolic or not, in the structure of `model.input`. `training` is passed to all layers that take
        it, even where the model fixes it, as Keras (3.15) does in `fit`; `None` leaves what the model fixes.
        """
        tensors = self._arranged(inputs, call)
        if isinstance(self.model, keras.Sequential):
            (outputs,) = tensors
            for (layer,) in self.steps:
                outputs = _call(layer, (outputs,), {}, call, training)
            return outputs
        tensors = {id(symbol): tensor for symbol, tensor in zip(self.inputs, tensors)}
        for number, (layer, args, kwargs, symbols) in enumerate(self.steps):
            args, kwargs = keras.tree.map_structure(lambda value: tensors.get(id(value), value), (args, kwargs))
            outputs = keras.tree.flatten(_call(layer, args, kwargs, call, training))
            tensors.update((id(symbol), tensor) for symbol, tensor in zip(symbols, outputs))
            for spent in self.spent.get(number, ()):
                tensors.pop(spent, None)
        outputs = [tensors[id(symbol)] for symbol in self.outputs]
        return keras.tree.pack_sequence_as(self.model.output, outputs)

    def _arranged(self, inputs, call):
        """Returns the inputs in the order and types of the model's, as Keras arranges those of a nested model."""
        if isinstance(inputs, dict) and not isinstance(self.model.input, dict):
            inputs = [inputs[tensor.name] for tensor in self.model.inputs]
        arranged = keras.tree.flatten(inputs)
        for index, (tensor, symbol) in enumerate(zip(arranged, self.inputs)):
            if _is_float(symbol) and not _is_float(tensor):
                arranged[index] = call(keras.layers.Rescaling(1.0, dtype=symbol.dtype), tensor)  # which casts integers
        return arranged


def allow_deep_graphs(layers):
    """Raises Python's recursion limit, permanently, to what Keras needs to build or load a graph of this many layers."""
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 2 * layers + 1000))


def has_own_call(layer):
    """Whether a layer or model overrides Keras's `call`."""
    return not type(layer).call.__module__.startswith("keras.")


def _is_float(tensor):
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))


def _unfolded(layer):
    return Graph(layer) if isinstance(layer, (keras.Function, keras.Sequential)) and not has_own_call(layer) else layer


def _call(layer, args, kwargs, call, training):
    if isinstance(layer, Graph):
        inputs = args[0] if args else kwargs["inputs"]
        return layer.run(inputs, call, kwargs.get("training") if training is None else training)
    if training is not None and "training" in inspect.signature(layer.call).parameters:
        kwargs = {**kwargs, "training": training}
    return call(layer, *args, **kwargs)
