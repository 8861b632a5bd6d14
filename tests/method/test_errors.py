"""first_line: what is left of an error that is reported in one line."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from ortho_keras.method.errors import first_line


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 7)])
def test_what_keras_says_in_a_graph(shape):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="^in user code:") as caught:
        tf.function(lambda x: model(x, training=True))(np.zeros(shape, "float32"))
    line = first_line(caught.value)
    assert line.startswith(("Input 0 with name", "Invalid input shape")) and line.endswith(f" shape {shape}")


def test_what_tensorflow_says_of_a_graph():
    header = "Graph execution error:\n\nDetected at node a/add defined at (most recent call last):\n"
    place = '  File "m.py", line 3, in f\n\n'
    for text, line in {
        header + "<stack traces unavailable>\nIncompatible: In[0]: [4,5]\n\t [[{{node a}}]]": "Incompatible: In[0]: [4,5]",
        header + place + place + "Out of memory": "Out of memory",
        f"in user code:\n\n  {place}    framework.errors_impl.ResourceExhaustedError: no room": "no room",
        "Exception encountered when calling Dense.call().\n\n\x1b[1mtoo wide\x1b[0m": "too wide",
        "ValueError: as it was": "ValueError: as it was",
    }.items():
        assert first_line(RuntimeError(text)) == line
    assert first_line(KeyError()) == "KeyError"
