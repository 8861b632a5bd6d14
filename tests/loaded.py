"""What `load_data` returns, how it refuses, and small TFDS sets to load."""

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


def values(*splits):
    """The value of each image of splits in memory; each is constant over the image."""
    flat = np.concatenate([split.images.reshape(len(split), -1) for split in splits])
    assert np.all(flat == flat[:, :1])
    return flat[:, 0].tolist()


def as_numpy(batches):
    return [tuple(part.numpy() for part in batch) for batch in batches]


def assert_equal_batches(found, expected):
    assert len(found) == len(expected) > 0
    for batch, other in zip(found, expected):
        for part, other_part in zip(batch, other, strict=True):
            np.testing.assert_array_equal(part, other_part, strict=True)


def prepare(data_dir, name, splits, **features):
    """Prepares a TFDS set without code: `splits` maps names to `(images or other inputs, labels)`."""
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(shape=(4, 6, 1)), "label": tfds.features.ClassLabel(names=["a", "b"])} | features
    first, second = features = {key: feature for key, feature in features.items() if feature is not None}
    examples = {
        split: [(i, {first: image, second: label}) for i, (image, label) in enumerate(zip(*content, strict=True))]
        for split, content in splits.items()
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name, version="1.0.0", features=tfds.features.FeaturesDict(features), split_datasets=examples, data_dir=data_dir
    )
