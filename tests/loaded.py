"""What `load_data` returned, or how it refused."""

import numpy as np
import pytest

from ortho_keras.method.errors import InputError
from ortho_keras.trainer.data import load_data


def refusal(name, data_dir=None, image_size=0, **options):
    """The message with which `load_data` refuses: one line that names the flag, what was expected and what came."""
    with pytest.raises(InputError) as caught:
        load_data(name, data_dir, image_size, **options)
    message = str(caught.value)
    assert message.startswith("--dataset") and " must " in message and "Received: " in message and "\n" not in message
    return message


def values(split):
    """The value of each image, and that it is the same in the whole image."""
    flat = split.images.reshape(len(split), -1)
    assert np.all(flat == flat[:, :1])
    return flat[:, 0].tolist()
