"""Two logical CPUs for the strategy tests, before anything touches a device; the same seeds for every test.

Under another of Keras's backends, the files with the mark `every_backend` run, and TensorFlow is neither needed nor imported.
"""

import gc
import os

if "ORTHO_KERAS_TEST_GPU" not in os.environ:  # as `benchmarks/gpu.py` runs the tests marked `gpu`
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # a GPU rounds otherwise from one call to the next; for the runs started here too

TENSORFLOW = os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow"
if TENSORFLOW:
    import ortho_train  # noqa: F401 - the commands' settings of TensorFlow: a run in this process rounds as one in its own

# isort: split
import contextlib

import keras
import pytest

graphs_freed = contextlib.nullcontext
if keras.config.backend() == "torch":
    import torch

    as_numpy = torch.Tensor.numpy
    torch.Tensor.numpy = lambda tensor: as_numpy(tensor.detach())  # as the other backends' results

if TENSORFLOW:
    import tensorflow as tf

    from ortho_keras.trainer.runtime import graphs_freed

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )


def pytest_ignore_collect(collection_path):
    if TENSORFLOW:
        return None
    if collection_path.name.startswith("test_"):
        return "pytest.mark.every_backend\n" not in collection_path.read_text()
    return collection_path.name in ("commands", "diagnosis", "trainer") or None


def pytest_collection_finish():
    gc.freeze()  # what is imported stays, and no collection need look at it


@pytest.fixture(scope="session")
def two_replicas():
    """One strategy for all tests: a second one in a process would use the first one's numbers for its collective operations."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture(autouse=True)
def fresh_state():
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")
    keras.backend.clear_session(free_memory=False)  # a collection after each of many tests takes longer than they do


@pytest.fixture(scope="module", autouse=True)
def free_memory():
    with graphs_freed():
        yield
    gc.collect()
