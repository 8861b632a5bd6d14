"""The same run on one replica, on two and on two machines; the loss scale; one seed, one result."""

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

import train
from ortho_keras import AllReplicaLossScaleOptimizer, ErrorModulation
from ortho_keras.method.errors import InputError
from ortho_keras.trainer.build import compiled_model
from ortho_keras.trainer.checkpoints import state_variables
from ortho_keras.trainer.data import BatchSettings, evaluation_batches, load_data, training_batches
from ortho_keras.trainer.loop import Trainer
from ortho_keras.trainer.recipes import find_preset
from ortho_keras.trainer.run import run
from ortho_keras.trainer.runtime import Runtime, start

ROOT = pathlib.Path(train.__file__).parent
# A deep ReLU net amplifies the last bit of a sum from step to step: at this learning rate 20 steps stay comparable.
RECIPE = dataclasses.replace(
    find_preset("digits").recipe,
    image_size=0,
    depth=20,
    relu_shift=0.0,
    modulation="anchor",
    factor=0.1,
    learning_rate=1e-4,
    rate_depth=0,
    augment="none",
    max_steps=20,
    warmup_steps=0,
    schedule="constant",
)


def trained(tmp_path, strategy, **changes):
    """Trains; returns each step's [cross-entropy, correct, penalty], the evaluation, and weights before and after."""
    recipe, data, runtime = dataclasses.replace(RECIPE, **changes), load_data("digits"), Runtime(strategy)
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model, total_steps = compiled_model(recipe, data, runtime.replicas > 1)
    trainer = Trainer(model, recipe, data, tmp_path / type(strategy).__name__, total_steps, runtime, log=lambda line: None)
    before, steps, step = model.get_weights(), [], trainer._train

    def observed(*arguments):
        steps.append(step(*arguments))
        return steps[-1]

    trainer._train = observed
    trainer.run()
    return np.array(steps)[:, :3], trainer.evaluate(data.test, mirrored=True), before, model.get_weights()


def relative(mine, expected):
    return np.linalg.norm(np.float64(mine) - expected) / np.linalg.norm(np.float64(expected))


def test_two_replicas_train_as_one(tmp_path, two_replicas):
    one = trained(tmp_path, tf.distribute.get_strategy(), relu_shift=1.0)
    two = trained(tmp_path, two_replicas, relu_shift=1.0)
    for mine, expected in zip(two[2], one[2]):
        np.testing.assert_array_equal(mine, expected)
    np.testing.assert_allclose(two[0][:, 0], one[0][:, 0], rtol=1e-4)
    np.testing.assert_allclose(two[0][5:, 2], one[0][5:, 2], rtol=1e-2)  # the penalty, from 0 up: counted once
    for name in ("accuracy", "mirrored_accuracy"):
        assert two[1][name] == pytest.approx(one[1][name], abs=3 / 360)
    start_, mine, expected = (np.concatenate([w.ravel() for w in run]) for run in (one[2], two[3], one[3]))
    assert relative(mine, expected) < 1e-4
    assert relative(mine - start_, expected - start_) < 0.05  # the way is the same, and not only the small length of it


@pytest.mark.parametrize("modulation", ["off", "neighbour", "anchor"])
def test_one_step_of_two_replicas_equals_one(tmp_path, two_replicas, modulation):
    changes = {"depth": 8, "max_steps": 1, "momentum": 0.0, "learning_rate": 0.1, "modulation": modulation, "bn_batches": 0}
    changes["initializer"] = "orthonormal"  # through identities gamma's gradient is 0 at first, and its step a rounding error
    one = trained(tmp_path, tf.distribute.get_strategy(), **changes)
    two = trained(tmp_path, two_replicas, **changes)
    for start_, mine, expected in zip(one[2], two[3], one[3]):
        if np.any(expected != start_):
            assert relative(mine - start_, expected - start_) < 1e-4


def test_statistics_of_each_replica_on_request(tmp_path, two_replicas):
    changes = {"depth": 8, "max_steps": 1, "bn_sync": False, "modulation_sync": False}
    one = trained(tmp_path, tf.distribute.get_strategy(), **changes)
    two = trained(tmp_path, two_replicas, **changes)
    assert relative(two[0][0, 0], one[0][0, 0]) > 1e-4  # half the batch normalizes itself
    assert all(np.isfinite(w).all() for w in two[3])


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


def planted(strategy, plant, scale=1024.0):
    """One step of float16 training on two replicas, with `plant` added to replica 1's gradient."""
    with strategy.scope():
        variable = keras.Variable(np.ones(3, "float32"))
        optimizer = AllReplicaLossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=scale)
        optimizer.build([variable])

    @tf.function
    def step():
        def replica():
            second = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)
            gradient = tf.ones(3) * optimizer.scale_loss(1.0) + tf.where(second > 0, plant, 0.0)
            optimizer.apply([gradient], [variable])

        strategy.run(replica)

    step()
    copies = [copy.numpy() for copy in strategy.experimental_local_results(variable.value)]
    scales = [copy.numpy() for copy in strategy.experimental_local_results(optimizer.dynamic_scale.value)]
    iterations = strategy.experimental_local_results(optimizer.iterations.value)
    return copies, scales, [int(copy) for copy in iterations]


@pytest.mark.parametrize("plant", [np.inf, -np.inf, np.nan])
def test_a_gradient_that_is_not_finite_on_replica_1_skips_the_step_on_all(two_replicas, plant):
    copies, scales, iterations = planted(two_replicas, np.float32(plant))
    np.testing.assert_array_equal(copies, np.ones((2, 3)))
    assert scales == [512.0, 512.0] and iterations == [0, 0]


def test_finite_gradients_take_the_step(two_replicas):
    copies, scales, iterations = planted(two_replicas, np.float32(0))
    np.testing.assert_array_equal(copies, np.zeros((2, 3)))  # 1 - 0.5 * (1 + 1)
    assert scales == [1024.0, 1024.0] and iterations == [1, 1]


def test_modulation_commutes_with_the_loss_scale():
    keras.config.set_dtype_policy("mixed_float16")
    recipe = dataclasses.replace(RECIPE, depth=8, precision="mixed_float16", max_steps=1)
    data, updates = load_data("digits"), []
    for scale in (1.0, 2.0**15):
        keras.utils.set_random_seed(0)
        model, _ = compiled_model(recipe, data)
        model.optimizer.initial_scale = scale
        model.optimizer.build(model.trainable_variables)
        images, labels = next(iter(training_batches(data.train, BatchSettings(64))))
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(images, training=True))
            loss = model.optimizer.scale_loss(tf.reduce_mean(losses))
        gradients = tape.gradient(loss, model.trainable_variables)
        updates.append([np.float64(g) / scale for g in gradients])
    for one, scaled in zip(*updates):
        if np.linalg.norm(scaled) > 1e-4:  # float16 errors of scale 1 lose bits below 6e-5
            assert relative(one, scaled) < 0.05


def free_ports():
    sockets = [socket.socket() for _ in range(2)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


WORKER = """
import dataclasses, sys
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
    addresses = [f"127.0.0.1:{port}" for port in free_ports()]
    workers = []
    for index in range(2):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(config), "PYTHONPATH": str(ROOT)}
        arguments = [str(folder / str(index)), str(folder / f"{index}.npz"), repr(recipe.to_json())]
        with open(folder / f"{index}.out", "a") as out, open(folder / f"{index}.err", "a") as err:
            command = [sys.executable, "-u", "-c", WORKER, *arguments]
            workers.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))
    return workers


MACHINES = dataclasses.replace(RECIPE, depth=8, width=4, max_steps=0, epochs=4, learning_rate=1e-3, evaluate_every=1)


def test_two_machines_train_as_one_process_and_survive_a_kill(tmp_path):
    run(MACHINES, tmp_path / "one", log=lambda line: None)
    workers = start_workers(tmp_path, MACHINES)
    deadline = time.monotonic() + 240
    while "epoch 2/4" not in (tmp_path / "0.out").read_text():
        assert time.monotonic() < deadline and workers[0].poll() is None, (tmp_path / "0.err").read_text()
        time.sleep(0.05)
    workers[1].send_signal(signal.SIGKILL)
    assert workers[0].wait(timeout=240) != 0
    assert "WorkerLostError: another worker was lost" in (tmp_path / "0.err").read_text()
    workers = start_workers(tmp_path, MACHINES)
    assert [worker.wait(timeout=240) for worker in workers] == [0, 0], (tmp_path / "0.err").read_text()[-2000:]
    assert "resuming after step" in (tmp_path / "0.out").read_text()
    assert not (tmp_path / "1").exists() and (tmp_path / "1.out").read_text() == ""  # the chief writes and prints
    with np.load(tmp_path / "0.npz") as chief, np.load(tmp_path / "1.npz") as other:
        for name in chief.files:
            np.testing.assert_array_equal(chief[name], other[name])
    models = [keras.models.load_model(tmp_path / name / "final.keras").get_weights() for name in ("0", "one")]
    mine, expected = (np.concatenate([w.ravel() for w in weights]) for weights in models)
    assert relative(mine, expected) < 1e-3
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("0", "one")]
    for key in ("test_crossentropy", "penalty"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-3)

    (tmp_path / "0" / "result.json").unlink()  # as after a kill behind the last step
    workers = start_workers(tmp_path, MACHINES)
    assert [worker.wait(timeout=240) for worker in workers] == [0, 0], (tmp_path / "1.err").read_text()[-2000:]
    again = json.loads((tmp_path / "0" / "result.json").read_text())
    assert again["steps"] == results[0]["steps"]
    assert again["test_crossentropy"] == pytest.approx(results[0]["test_crossentropy"], rel=1e-6)


def test_the_chiefs_state_reaches_every_worker():
    """What `restore` sends through a float64 vector comes out as it went in: every type of a state is exact in it."""
    data = load_data("digits")
    model, _ = compiled_model(dataclasses.replace(RECIPE, depth=8, precision="mixed_float16"), data)
    model.optimizer.build(model.trainable_variables)
    for variable in state_variables(model):
        value = np.asarray(variable)
        np.testing.assert_array_equal(value.astype("float64").astype(value.dtype), value)


@pytest.mark.parametrize(
    ("arguments", "tf_config", "message"),
    [
        ({"strategy": "multi_worker"}, "{", "TF_CONFIG must be JSON"),
        ({"strategy": "auto"}, '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}', "this task's index"),
        ({"strategy": "auto"}, '{"cluster": {"ps": ["a:1"]}, "task": {"type": "ps", "index": 0}}', "a cluster of workers"),
        ({"strategy": "none", "devices": "2"}, "", "--devices must be one device with --strategy none"),
        ({"devices": "CPU:0,CPU:0"}, "", "--devices must be a number of devices or names"),
        ({"devices": "TPU:0"}, "", "Received: 'TPU:0'"),
        ({"devices": "0"}, "", "Received: '0'"),
        ({"strategy": "mirrored", "devices": "2", "jit_compile": True}, "", "--jit_compile must be off with more than one"),
    ],
)
def test_wrong_runtimes(monkeypatch, arguments, tf_config, message):
    monkeypatch.setenv("TF_CONFIG", tf_config)
    with pytest.raises(InputError, match=message):
        start(**arguments)


def test_batch_that_replicas_cannot_share(tmp_path):
    runtime = start("mirrored", "2")
    with pytest.raises(InputError, match="--batch_size must be divisible by the 2 replicas. Received: 63"):
        run(dataclasses.replace(RECIPE, batch_size=63), tmp_path / "run", runtime=runtime)
    assert not (tmp_path / "run").exists()


def test_auto_takes_what_there_is(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert start().replicas == 1 and start(devices="2").replicas == 2
    assert start(devices="CPU:1").strategy.extended.worker_devices[0].endswith("CPU:1")


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_on_two_replicas(tmp_path, two_replicas, precision):
    changes = {"depth": 8, "max_steps": 3, "precision": precision, "learning_rate": 0.01}
    keras.config.set_dtype_policy(precision)
    one = trained(tmp_path, tf.distribute.get_strategy(), **changes)
    two = trained(tmp_path, two_replicas, **changes)
    np.testing.assert_allclose(two[0][:, 0], one[0][:, 0], rtol=0.02)
    moves = [np.concatenate([(w - b).ravel() for w, b in zip(run_[3], run_[2])]) for run_ in (two, one)]
    assert relative(*moves) < 0.2  # half precision rounds each replica's sums apart


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_jit_compile_trains_the_same(tmp_path, precision):
    recipe = dataclasses.replace(RECIPE, depth=8, max_steps=3, precision=precision)
    keras.config.set_dtype_policy(precision)
    data, losses = load_data("digits"), []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        model, total_steps = compiled_model(recipe, data)
        runtime = Runtime(jit_compile=jit_compile)
        history = Trainer(model, recipe, data, tmp_path / str(jit_compile), total_steps, runtime, log=lambda line: None).run()
        losses.append(history[-1]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if precision == "float32" else 2e-2)
