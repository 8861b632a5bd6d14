"""The same run on one replica, on two and on two machines; loss scales; XLA; which runtimes are refused."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_runs import RECIPE as SHALLOW
from small_runs import silent

from ortho_keras import AllReplicaLossScaleOptimizer, ErrorModulation, OrthonormalRegularizer
from ortho_keras.method.errors import InputError
from ortho_keras.trainer.build import compiled_model
from ortho_keras.trainer.checkpoints import state_variables
from ortho_keras.trainer.data import BatchSettings, evaluation_batches, load_data, training_batches
from ortho_keras.trainer.loop import Trainer
from ortho_keras.trainer.run import run
from ortho_keras.trainer.runtime import Runtime, start
from ortho_keras.trainer.steps import train_function

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Through identities, gamma's gradient is 0 at first and its step a rounding error: kernels are random here.
RECIPE = dataclasses.replace(
    SHALLOW, initializer="orthonormal", relu_shift=0.0, factor=0.1, learning_rate=0.01, max_steps=3, schedule="constant"
)


def trained(folder, runtime=None, **changes):
    """Trains; returns each step's [cross-entropy, penalty], the evaluation, and the way that the weights went."""
    recipe, data, runtime = dataclasses.replace(RECIPE, **changes), load_data("digits"), runtime or Runtime()
    keras.config.set_dtype_policy(recipe.precision)
    keras.utils.set_random_seed(0)
    with runtime.strategy.scope():
        model, total_steps = compiled_model(recipe, data, runtime.replicas > 1)
    trainer = Trainer(model, recipe, data, folder, total_steps, runtime, log=silent)
    before, steps, step = model.get_weights(), [], trainer._train

    def observed(*arguments):
        steps.append(step(*arguments))
        return steps[-1]

    trainer._train = observed
    trainer.run()
    way = np.concatenate([np.ravel(w - b) for w, b in zip(model.get_weights(), before)])
    return np.concatenate(steps)[:, [0, 3]], trainer.evaluate(data.test, mirrored=True), way


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("one"))


def relative(mine, expected):
    return np.linalg.norm(np.float64(mine) - expected) / np.linalg.norm(np.float64(expected))


def test_two_replicas_train_as_one(tmp_path, two_replicas, one):
    steps, metrics, way = trained(tmp_path, Runtime(two_replicas))
    np.testing.assert_allclose(steps[:, 0], one[0][:, 0], rtol=1e-4)
    np.testing.assert_allclose(steps[1:, 1], one[0][1:, 1], rtol=1e-3)  # the penalty, from 0 up: counted once
    for name in ("accuracy", "mirrored_accuracy"):
        assert metrics[name] == pytest.approx(one[1][name], abs=3 / 360)
    assert relative(way, one[2]) < 1e-3


def test_statistics_of_each_replica_on_request(tmp_path, two_replicas, one):
    steps, _, way = trained(tmp_path, Runtime(two_replicas), bn_sync=False, modulation_sync=False)
    assert relative(steps[0, 0], one[0][0, 0]) > 1e-4  # half the batch normalizes itself
    assert np.isfinite(way).all()


def test_half_precision_on_two_replicas(tmp_path, two_replicas):
    results = [trained(tmp_path, runtime, precision="mixed_float16") for runtime in (Runtime(), Runtime(two_replicas))]
    np.testing.assert_allclose(results[1][0][:, 0], results[0][0][:, 0], rtol=0.02)
    assert relative(results[1][2], results[0][2]) < 0.2  # half precision rounds each replica's sums apart


@pytest.mark.gpu
def test_jit_compile_trains_the_same():
    batch = next(iter(training_batches(load_data("digits").train, BatchSettings(64))))
    results = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        convolution = keras.layers.Conv2D(4, 3, activation="relu", kernel_regularizer=OrthonormalRegularizer(0.1))
        model = keras.Sequential([keras.Input((8, 8, 1)), convolution, keras.layers.Flatten(), keras.layers.Dense(10)])
        model.compile(keras.optimizers.SGD(1e-4, 0.9))
        model.optimizer.build(model.trainable_variables)
        train = train_function(model, 64, 0.1, Runtime(jit_compile=jit_compile), penalty_every=2)
        batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
        results.append([*train(batches, 3, 0.0, 0.0).numpy(), *model.get_weights()])
    for mine, expected in zip(*results, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("synchronized", [True, False])
def test_moments_of_all_replicas_or_of_each(two_replicas, synchronized):
    strategy = two_replicas
    with strategy.scope():
        lower, upper = (ErrorModulation(1.0, synchronized=synchronized) for _ in range(2))
    errors, slopes = tf.constant([1.0, 7.0]), tf.constant([2.0, 1.0])  # at the upper layer; from there to the lower one

    def replica():
        index = tf.distribute.get_replica_context().replica_id_in_sync_group
        x = tf.ones((1, 2))
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, token = lower(x)
            z, _ = upper(slopes[index] * y, token)
            total = tf.reduce_sum(z * errors[index])
        return tape.gradient(total, x)

    results = strategy.experimental_local_results(tf.function(lambda: strategy.run(replica))())
    scale = np.sqrt((1 + 49) / (4 + 49))  # q_upper / q_own over both replicas
    expected = (2 * scale, 7 * scale) if synchronized else (1, 7)
    np.testing.assert_allclose(results[0], np.full((1, 2), expected[0]), rtol=1e-6)
    np.testing.assert_allclose(results[1], np.full((1, 2), expected[1]), rtol=1e-6)


def test_shares_of_all_replicas_are_the_batch():
    split = load_data("digits").train
    settings = BatchSettings(12, "crop_flip", 3)
    whole = list(training_batches(split, settings, 105, 109))
    shares = [list(training_batches(split, settings, 105, 109, replicas=3, own=own)) for own in ([0, 1], [2])]
    for step, (images, labels) in enumerate(whole):
        parts = [*shares[0][2 * step : 2 * step + 2], shares[1][step]]
        np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), images)
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), labels)
    held = list(evaluation_batches(split, 100, replicas=2, own=[1]))
    assert len(held) == 13 and all(images.shape == (50, 8, 8, 1) for images, _, _ in held)
    assert sum(float(tf.reduce_sum(weights)) for _, _, weights in held) == 12 * 50 + (1293 - 1250)


def test_a_gradient_that_is_not_finite_on_replica_1_skips_the_step_on_all(two_replicas):
    strategy = two_replicas
    with strategy.scope():
        variable = keras.Variable(np.ones(3, "float32"))
        optimizer = AllReplicaLossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=1024.0)
        optimizer.build([variable])

    @tf.function
    def step(plant):
        def replica():
            second = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)
            gradient = tf.ones(3) * optimizer.scale_loss(1.0) + tf.where(second > 0, plant, 0.0)
            optimizer.apply([gradient], [variable])

        strategy.run(replica)

    def copies(of):
        return [copy.numpy().tolist() for copy in strategy.experimental_local_results(of.value)]

    expected = {np.inf: (1, 512, 0), np.nan: (1, 256, 0), 0.0: (0, 256, 1)}  # finite: 1 - 0.5 * (1 + 1)
    for plant, (value, scale, iterations) in expected.items():
        step(tf.constant(plant, tf.float32))
        assert copies(variable) == 2 * [3 * [value]]
        assert copies(optimizer.dynamic_scale) == 2 * [scale] and copies(optimizer.iterations) == 2 * [iterations]


def test_modulation_commutes_with_the_loss_scale():
    keras.config.set_dtype_policy("mixed_float16")
    recipe, data, updates = dataclasses.replace(RECIPE, precision="mixed_float16"), load_data("digits"), []
    images, labels = next(iter(training_batches(data.train, BatchSettings(64))))
    for scale in (1.0, 2.0**15):
        keras.utils.set_random_seed(0)
        model, _ = compiled_model(recipe, data)
        model.optimizer.initial_scale = scale
        model.optimizer.build(model.trainable_variables)
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(images, training=True))
            loss = model.optimizer.scale_loss(tf.reduce_mean(losses))
        gradients = tape.gradient(loss, model.trainable_variables)
        updates.append([np.float64(g) / scale for g in gradients])
    for unscaled, scaled in zip(*updates):
        if np.linalg.norm(scaled) > 1e-4:  # float16 errors of scale 1 lose bits below 6e-5
            assert relative(unscaled, scaled) < 0.05


WORKER = """
import sys
import numpy as np
import keras
from ortho_keras.trainer import runtime
from ortho_keras.trainer.run import run
from ortho_keras.trainer.recipe import Recipe

class Keep(keras.callbacks.Callback):
    def on_train_end(self, logs=None):
        np.savez(sys.argv[2], *[np.asarray(w) for w in self.model.weights])

machine = runtime.start()
run(Recipe(**eval(sys.argv[3])), sys.argv[1], runtime=machine, callbacks=[Keep()])
"""


def start_workers(folder, recipe):
    """Starts two workers on the loopback interface, each with a workdir of its own and its last weights in a file."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    workers = []
    for index in range(2):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(config), "PYTHONPATH": str(ROOT)}
        arguments = [str(folder / str(index)), str(folder / f"{index}.npz"), repr(recipe.to_json())]
        with open(folder / f"{index}.out", "a") as out, open(folder / f"{index}.err", "a") as err:
            command = [sys.executable, "-u", "-c", WORKER, *arguments]
            workers.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))
    return workers


def test_two_machines_train_as_one_process_and_survive_a_kill(tmp_path):
    """The second start resumes from the chief's checkpoint, which reaches the other worker's net and optimizer too."""
    recipe = dataclasses.replace(RECIPE, max_steps=0, epochs=3, learning_rate=1e-3, evaluate_every=1)
    result = run(recipe, tmp_path / "one", log=silent)
    workers = start_workers(tmp_path, recipe)
    deadline = time.monotonic() + 240
    while "epoch 1/3" not in (tmp_path / "0.out").read_text():
        assert time.monotonic() < deadline and workers[0].poll() is None, (tmp_path / "0.err").read_text()
        time.sleep(0.05)
    workers[1].send_signal(signal.SIGKILL)
    assert workers[0].wait(timeout=240) != 0
    assert "WorkerLostError: another worker was lost" in (tmp_path / "0.err").read_text()
    workers = start_workers(tmp_path, recipe)
    assert [worker.wait(timeout=240) for worker in workers] == [0, 0], (tmp_path / "0.err").read_text()[-2000:]
    assert "resuming after step" in (tmp_path / "0.out").read_text()
    assert not (tmp_path / "1").exists() and (tmp_path / "1.out").read_text() == ""  # the chief writes and logs
    with np.load(tmp_path / "0.npz") as chief, np.load(tmp_path / "1.npz") as other:
        for name in chief.files:
            np.testing.assert_array_equal(chief[name], other[name])
    models = [keras.models.load_model(tmp_path / name / "final.keras").get_weights() for name in ("0", "one")]
    assert relative(*(np.concatenate([w.ravel() for w in weights]) for weights in models)) < 1e-3
    mine = json.loads((tmp_path / "0" / "result.json").read_text())
    for key in ("test_crossentropy", "penalty"):
        assert mine[key] == pytest.approx(result[key], rel=1e-3)


def test_the_chiefs_state_is_sent_exactly():
    """It is sent as float64, which every type of a state comes out of as it went in."""
    model, _ = compiled_model(dataclasses.replace(RECIPE, precision="mixed_float16"), load_data("digits"))
    model.optimizer.build(model.trainable_variables)
    values = [np.asarray(variable) for variable in state_variables(model)]
    for value, sent in zip(values, Runtime().from_chief(values), strict=True):
        np.testing.assert_array_equal(sent.astype(value.dtype), value, strict=True)


@pytest.mark.parametrize(
    ("arguments", "tf_config", "message"),
    [
        ({"strategy": "many"}, "", "--strategy must be one of auto, none, mirrored, multi_worker"),
        ({"strategy": "multi_worker"}, "{", "TF_CONFIG must be JSON"),
        ({"strategy": "multi_worker"}, "", "--strategy multi_worker needs the environment variable TF_CONFIG.* not set"),
        ({"strategy": "auto"}, '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}', "this task's index"),
        ({"strategy": "auto"}, '{"cluster": {"ps": ["a:1"]}, "task": {"type": "ps", "index": 0}}', "a cluster of workers"),
        (
            {},
            '{"cluster": {"worker": "a:1"}, "task": {"type": "worker", "index": 0}}',
            "cluster.worker is 'a:1', expected a list",
        ),
        (
            {},
            '{"cluster": {"worker": [["a:1"]]}, "task": {"type": "worker", "index": 0}}',
            "worker.0. is ..a:1.., expected a str",
        ),
        ({}, '{"cluster": {"worker": ["a:1", "a:1"]}, "task": {"type": "worker", "index": 0}}', "a different host:port each"),
        ({}, '{"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}', "a different host:port each"),
        (
            {},
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1e400}}',
            "task.index is inf, expected an int",
        ),
        ({}, "[" * 100_000, "TF_CONFIG must be JSON.* .it is nested too deep.$"),
        (
            {"devices": "2"},
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}',
            "--devices must be empty, as each worker uses all its devices, with --strategy multi_worker",
        ),
        ({"strategy": "none", "devices": "2"}, "", "--devices must be one device with --strategy none"),
        ({"devices": "CPU:0,CPU:0"}, "", "--devices must be a number of devices or names"),
        ({"devices": "CPU:0,GPU:0"}, "", "Received: 'CPU:0,GPU:0'"),
        ({"devices": "TPU:0"}, "", "Received: 'TPU:0'"),
        ({"devices": "GPU:0"}, "", "Received: 'GPU:0'"),
        ({"devices": "0"}, "", "Received: '0'"),
        ({"devices": "65"}, "", "or at most 64 logical CPUs. Received: '65'"),
        ({"devices": "9" * 5000}, "", "or at most 64 logical CPUs. Received: '9{5000}'"),
        ({"devices": "CPU:0,CPU:64"}, "", "or at most 64 logical CPUs. Received: 'CPU:0,CPU:64'"),
        ({"devices": f"CPU:{'9' * 5000}"}, "", "Received: 'CPU:9{5000}'"),
        ({"strategy": "mirrored", "devices": "2", "jit_compile": True}, "", "--jit_compile must be off with more than one"),
    ],
)
def test_wrong_runtimes(monkeypatch, arguments, tf_config, message):
    monkeypatch.setenv("TF_CONFIG", tf_config)
    with pytest.raises(InputError, match=message):
        start(**arguments)


def test_who_is_waited_for_is_said_before_tensorflow_waits(monkeypatch, capsys):
    """TensorFlow itself would wait here without an end: the second host does not exist."""
    cluster = {"worker": ["127.0.0.1:1", "[::1]:2", "no-such-host.invalid:3"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": "worker", "index": 0}}))
    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", lambda: tf.distribute.OneDeviceStrategy("CPU:0"))
    assert start().replicas == 1
    expected = "waiting for the workers of TF_CONFIG, 127.0.0.1:1, [::1]:2, no-such-host.invalid:3 (unknown here: no-such-host."
    assert capsys.readouterr().err.startswith(expected)


def test_auto_takes_what_there_is_and_replicas_share_a_batch(tmp_path, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert start().replicas == 1 and start(devices="2").replicas == 2
    assert start(devices="CPU:1").strategy.extended.worker_devices[0].endswith("CPU:1")
    with pytest.raises(InputError, match="--batch_size must be divisible by the 2 replicas. Received: 63"):
        run(dataclasses.replace(RECIPE, batch_size=63), tmp_path / "run", runtime=start("mirrored", "2"))
    assert not (tmp_path / "run").exists()
