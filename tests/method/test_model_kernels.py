"""The kernels of a whole model, nested, shared and unused layers among them."""

import keras
from keras import layers

from ortho_keras.method import kernels


class Composite(layers.Layer):
    """Holds layers as an attribute, in a list and in a dictionary."""

    def __init__(self, unused=False):
        super().__init__()
        self.first = layers.Dense(3)
        self.stack = [layers.Dense(4), layers.Dense(5)]
        self.named = {"last": layers.Dense(6)}
        self.unused = layers.Dense(7) if unused else None

    def build(self, input_shape):
        for layer in (self.first, *self.stack, self.named["last"]):
            layer.build(input_shape)
            input_shape = layer.compute_output_shape(input_shape)

    def call(self, x):
        return self.named["last"](self.stack[1](self.stack[0](self.first(x))))


def nested_model():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.BatchNormalization()], name="inner")
    innermost = keras.Sequential([keras.Input((4,)), inner, layers.Dense(3)], name="innermost")
    x = keras.Input((5, 4))
    shared = layers.Dense(4)
    y = layers.TimeDistributed(inner)(shared(shared(x)))
    y = layers.MultiHeadAttention(2, 3)(y, y)
    return keras.Model(x, [Composite()(innermost(y[:, 0])), inner(y[:, 1])])


def test_model_kernels_of_nested_models():
    model = nested_model()
    found = kernels.model_kernels(model)
    variables = [kernel.variable for kernel in found]
    assert len({id(variable) for variable in variables}) == len(variables)
    assert {kernel.path for kernel in found} == {weight.path for weight in model.weights if weight.name == "kernel"}
    assert len(found) == 1 + 1 + 4 + 1 + 4  # shared, inner, attention, innermost, composite
    layouts = {kernel.layer.name: kernel.layout for kernel in found if isinstance(kernel.layer, layers.EinsumDense)}
    assert layouts == {"query": (1, 2), "key": (1, 2), "value": (1, 2), "attention_output": (2,)}


def test_model_kernels_come_in_the_order_of_the_layers():
    model = keras.Sequential([keras.Input((4,)), *[layers.Dense(size) for size in (3, 9, 2, 7)]])
    assert [kernel.variable.shape[-1] for kernel in kernels.model_kernels(model)] == [3, 9, 2, 7]


def test_walk_layers_names_the_owners():
    model = nested_model()
    walked = list(kernels.walk_layers(model))
    assert walked[0] == (model, ()) and len({id(layer) for layer, _ in walked}) == len(walked)
    owners = {id(layer): within for layer, within in walked}
    attention, composite = (model.get_layer(name) for name in ("multi_head_attention", "composite"))
    assert owners[id(attention)] == (model,)
    assert owners[id(attention.query_dense)] == (model, attention)
    assert owners[id(composite.stack[1])] == owners[id(composite.named["last"])] == (model, composite)
    (wrapper,) = (layer for layer in model.layers if isinstance(layer, layers.TimeDistributed))
    assert owners[id(wrapper.layer.layers[0])] == (model, wrapper, wrapper.layer)


class Keyed(layers.Layer):
    """Its dicts have keys that no order exists for."""

    def __init__(self):
        super().__init__()
        self.settings, self.heads = {"a": 1, 2: [3]}, {1: layers.Dense(3), "b": (layers.Dense(5),)}

    def call(self, x):
        return self.heads[1](x), self.heads["b"][0](x)


def test_layers_in_dicts_of_any_keys():
    model = keras.Sequential([keras.Input((4,)), Keyed()])
    assert [kernel.variable.shape for kernel in kernels.model_kernels(model)] == [(4, 3), (4, 5)]


def test_an_unused_layer_has_no_kernel():
    model = keras.Sequential([keras.Input((4,)), Composite(unused=True)])
    assert len(kernels.model_kernels(model)) == 4  # the fifth was never built
