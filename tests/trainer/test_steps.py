"""Several training steps in one call of a graph: the same run to the bit, whatever a call takes."""

import csv
import dataclasses
import json
import math
import types

import keras
import numpy as np
import pytest
from small_runs import RECIPE, silent
from tensorflow.python.framework import config

from ortho_keras import OrthonormalDecay, OrthonormalRegularizer, modulate
from ortho_keras.method.errors import NonFiniteLossError
from ortho_keras.trainer import steps
from ortho_keras.trainer.data import BatchSettings, load_data, training_batches
from ortho_keras.trainer.run import run
from ortho_keras.trainer.runtime import Runtime
from ortho_keras.trainer.steps import StepsPerCall, train_function

# 20 steps an epoch; modulation is switched off in the first one.
MODULATED = dataclasses.replace(
    RECIPE, width=2, batch_size=64, epochs=2, modulation="neighbour", tolerance=1.01, modulation_steps=7, evaluate_every=9
)


@pytest.fixture
def deterministic():
    config.enable_op_determinism()
    yield
    config.disable_op_determinism()


class Calls(keras.callbacks.Callback):
    """Records the first and the last step of each call; waits for any number of steps, or for each one."""

    def __init__(self, each=False):
        super().__init__()
        self.seen = []
        if not each:
            self.steps_to_due = lambda step: math.inf

    def on_train_batch_begin(self, batch, logs=None):
        self.seen.append([batch])

    def on_train_batch_end(self, batch, logs=None):
        self.seen[-1].append(batch)


def test_calls_of_many_steps_end_where_a_callback_waits_and_give_the_same_run_to_the_bit(tmp_path, monkeypatch, deterministic):
    signals, histories, weights, lines = [], [], [], []
    for calls in (Calls(each=True), Calls()):
        folder = tmp_path / str(len(weights))
        run(MODULATED, folder, callbacks=[calls, OrthonormalDecay(0.01, every=5)], signal_every=4, log=lines.append)
        with open(folder / "signals.csv") as file:
            signals.append(list(csv.reader(file)))
        rows = json.loads((folder / "history.json").read_text())
        histories.append([{name: row[name] for name in row.keys() - {"seconds", "images/s"}} for row in rows])
        weights.append(keras.models.load_model(folder / "final.keras", compile=False).get_weights())
        if len(weights) == 1:
            assert calls.seen == [[step, step] for step in range(40)]
            assert "each call of the graph takes one step, not several, because of callbacks at each step: Calls" in lines
            lines.clear()
            monkeypatch.setattr(steps, "CALL_SECONDS", 1e9)
    # After three single steps, calls end at multiples of 4 and 5, and at step 7.
    ends = [1, 2, 3, 4, 5, 7, 8, 10, 12, 15, 16, 20, 24, 25, 28, 30, 32, 35, 36, 40]
    assert calls.seen == [[first, last - 1] for first, last in zip([0, *ends], ends)]
    assert not [line for line in lines if "callbacks" in line]
    assert signals[0] == signals[1] and {int(row[0]) for row in signals[1][1:]} == {*range(0, 41, 4)}
    assert histories[0] == histories[1] and all(map(np.array_equal, *weights))


@pytest.mark.parametrize("kind", ["XLA", "two replicas"])
def test_the_same_by_xla_and_on_replicas(kind, deterministic, request):
    runtime = Runtime(request.getfixturevalue("two_replicas")) if kind == "two replicas" else Runtime(jit_compile=True)
    data, found, replicas = load_data("digits").train, [], runtime.replicas

    def batches(_):
        return training_batches(data, BatchSettings(64, "crop"), 0, 6, replicas, range(replicas))

    for counts in ([1] * 6, [1, 5]):
        keras.utils.set_random_seed(0)
        with runtime.strategy.scope():
            model = [keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3, kernel_regularizer=OrthonormalRegularizer(0.1))]
            model += [keras.layers.BatchNormalization(synchronized=replicas > 1), keras.layers.Dropout(0.5)]
            model += [keras.layers.Flatten(), keras.layers.Dense(16), keras.layers.Dense(10)]
            model = modulate(keras.Sequential(model), 1.01, reference="neighbour", synchronized=replicas > 1)
            model.compile(keras.optimizers.Adam(0.01))
            model.optimizer.build(model.trainable_variables)
        train, rows = train_function(model, 64, 0.1, runtime, penalty_every=2), []
        own = iter(batches(None) if replicas == 1 else runtime.strategy.distribute_datasets_from_function(batches))
        for count in counts:
            rows += [*train(own, count, 0.0, 3.0).numpy()]
        found.append([np.array(rows), *(variable.numpy() for variable in model.variables)])
    assert all(map(np.array_equal, *found)) and (found[0][0][:, -1] == 3 * replicas).all()
    assert list(found[0][0][:, 3] > 0) == [True, False] * 3  # the penalty in the loss of each second step


def test_the_first_step_with_a_loss_that_is_not_finite_is_found_within_a_call(tmp_path, monkeypatch):
    recipe = dataclasses.replace(
        RECIPE, learning_rate=1e5, regularizer="l2", initializer="he_normal", modulation="off", width=2
    )
    messages = []
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(steps, "CALL_SECONDS", seconds)
        with pytest.raises(NonFiniteLossError) as raised:
            run(recipe, tmp_path / str(seconds), log=silent)
        messages.append(str(raised.value))
    assert messages[0] == messages[1] and "at step " in messages[0]


def test_the_chief_decides_for_all_workers():
    """By hand: of steps of 12.5 ms a quarter of a second has 20, unless a callback waits for fewer."""
    due = types.SimpleNamespace(steps_to_due=lambda step: 40 - step % 40, on_train_batch_end=None)
    workers = [types.SimpleNamespace(is_chief=chief, local_replicas=2) for chief in (True, False)]
    chief, other = (StepsPerCall([due], worker) for worker in workers)
    wished = []
    for step in (1, 2, 3, 28, 33):
        wish = [one.wish(step) for one in (chief, other)]
        for one, seconds in ((chief, 0.0125), (other, 7.0)):
            one.update(seconds, 2 * sum(wish))  # two replicas on each worker send their worker's wish
        assert chief.steps == other.steps == wish[0] and wish[1] == 0
        wished.append(wish[0])
    assert wished == [1, 1, 20, 12, 7] and StepsPerCall([keras.callbacks.EarlyStopping()], workers[0]).waiting == []
    each = [keras.callbacks.TerminateOnNaN(), keras.callbacks.LambdaCallback(on_train_batch_end=print)]
    assert StepsPerCall(each, workers[0]).waiting == each
