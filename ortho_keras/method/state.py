"""The state of layers and models: steps, variables, and what Keras keeps besides weights."""

import contextlib
import tempfile

import keras
from keras import ops

from ortho_keras.method import backend
from ortho_keras.method.kernels import walk_layers


def steps_taken(model):
    """Returns the number of training steps of a model: its optimizer's, and those before the net grew (`first_step`)."""
    backend.sync(model)
    optimizer = model.optimizer
    return 0 if optimizer is None else int(ops.convert_to_numpy(optimizer.iterations)) + getattr(optimizer, "first_step", 0)


class StepCounter:
    """Counts a model's training steps for a callback, which forwards `on_train_batch_begin` and `on_train_batch_end`.

    The count is the optimizer's, so that a resumed run continues it. In a model whose `train_step` uses other optimizers,
    `model.optimizer` is Keras's default one and takes no step: there the batches since the start of training are counted.
    """

    def __init__(self, model):
        self.model = model
        self.before, self.batches, self.begun = steps_taken(model), 0, 0
        self._asked = self.before, 0  # steps, after how many batches

    def begin(self, batch):
        self.begun = batch
        if batch == 0:
            self.ask()

    def end(self, batch):
        self.batches += batch - self.begun + 1  # with `steps_per_execution`, a call takes several steps

    def ask(self):
        """On JAX, asks the optimizer: with `steps_per_execution`, an epoch's last call says more batches than there were."""
        if backend.NAME == "jax" and self.interval > 1 and steps_taken(self.model) > self.before:
            self._asked = steps_taken(self.model), self.batches

    @property
    def _accumulated(self):
        return getattr(self.model.optimizer, "gradient_accumulation_steps", None) or 1

    @property
    def idle(self):
        """Whether the model's optimizer has had a batch, and took no step."""
        if isinstance(self.model.optimizer, keras.optimizers.LossScaleOptimizer):
            return False  # it may skip steps
        return self.batches >= self._accumulated and steps_taken(self.model) == self.before

    @property
    def steps(self):
        if backend.NAME == "jax":  # where to ask the optimizer takes as long as a step
            steps, batches = self._asked
            return steps + (self.batches - batches) // self._accumulated
        return self.batches if self.idle else steps_taken(self.model)

    def reached(self, steps):
        """Whether so many steps were taken; on JAX, the optimizer is asked where the batches say so."""
        if self.steps < steps:
            return False
        self.ask()
        return self.steps >= steps

    @property
    def interval(self):
        """The number of steps between two calls of a callback."""
        return getattr(self.model, "steps_per_execution", 1)

    def check_multiple(self, name, value):
        """Raises `ValueError` where a callback's number of steps falls between two of its calls."""
        if value % self.interval:
            raise ValueError(
                f"`{name}` must be a multiple of the model's steps_per_execution, {self.interval}, between which no "
                f"callback is called. Received: {name}={value}"
            )


def copy_state(layer, copy):
    """Copies the state of a layer (or model) to one of the same structure."""
    copy.set_weights(layer.get_weights())
    copy_rest(layer, copy)


def copy_rest(layer, copy):
    """Copies what layers keep besides weights, as loading a file would: Normalization's statistics, a lookup's table."""
    for (one, _), (other, _) in zip(walk_layers(layer), walk_layers(copy)):
        if isinstance(other, keras.layers.Normalization) and other.input_mean is None:
            other.finalize_state()
        if hasattr(one, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                one.save_assets(folder)
                other.load_assets(folder)


@contextlib.contextmanager
def unchanged(model):
    """Restores, at the end, what a call in training mode changes in a model: BatchNormalization's averages, dropout's seeds, a
    SpectralNormalization's kernel, metrics (which `compute_loss` makes at its first call), and states of recurrent layers.
    """
    recurrent = [layer for layer, _ in walk_layers(model) if isinstance(layer, keras.layers.RNN) and layer.stateful]
    states = [state for layer in recurrent for state in keras.tree.flatten(layer.states)]
    before = [(variable, ops.copy(variable.value)) for variable in (*model.variables, *states, *_counters(model))]
    try:
        yield
    finally:
        known = {id(variable) for variable, _ in before}
        before += [(new, ops.zeros_like(new.value)) for new in _counters(model) if id(new) not in known]
        for variable, value in before:
            variable.assign(value)


def _counters(model):
    return [variable for metric in model.metrics for variable in metric.variables]
