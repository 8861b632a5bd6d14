"""One experiment: a recipe and a directory in, a trained model and its figures out."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib

import keras
import tensorflow as tf

from ortho_keras.diagnosis.monitor import SignalMonitor
from ortho_keras.diagnosis.plots import plot_curves
from ortho_keras.method.chain import ModulationSwitch
from ortho_keras.method.checks import require
from ortho_keras.method.errors import InputError, WorkerLostError, first_line
from ortho_keras.method.files import check_folder, entries, only_one, whole_file, write_json
from ortho_keras.method.kernels import layer_kernels
from ortho_keras.nets.growth import grow
from ortho_keras.nets.shifted_relu import shift_for_depth
from ortho_keras.trainer.build import compiled_model, growth_step
from ortho_keras.trainer.data import load_data
from ortho_keras.trainer.loop import Trainer, new_epoch
from ortho_keras.trainer.recipe import MIRRORING, Recipe
from ortho_keras.trainer.result import result_of
from ortho_keras.trainer.runtime import Runtime, slowdown
from ortho_keras.trainer.steps import scores

PROBE_IMAGES = 64
GROWTH_IMAGES, GROWTH_PIXELS = 512, 512 * 64 * 64  # at most so many tell the new layers' statistics
SLOW = 2.0  # times as long as in float32, from which a type is worth a warning


def run(recipe, workdir, data_dir=None, name="", runtime=None, callbacks=(), keep_checkpoints=2, signal_every=0, log=print):
    """Trains, evaluates and reports one recipe; goes on where an earlier call with the same arguments was stopped.

    Writes into `workdir`: `run.json` (the recipe, at the start), `checkpoints/`, `tensorboard/`, and at the end `final.keras`,
    `curves.png`, `history.json` and `result.json`; with `signal_every`, `SignalMonitor`'s files too.

    Args:
        recipe: `Recipe`.
        workdir: Path of the run's own folder; made if missing.
        data_dir: TFDS's folder of prepared data, or `None` for its own.
        name: The recipe's name, for the report.
        runtime: `Runtime`, or `None` for this process on TensorFlow's default device.
        callbacks: List of `keras.callbacks.Callback`.
        keep_checkpoints: int, at least 1.
        signal_every: int, at least 0. Steps from one measurement of `SignalMonitor` to the next, on the first training images;
            0 for none.
        log: Function that takes a line of progress.

    Returns:
        The content of `result.json`, a dict; `None` on a worker other than the chief.

    Raises:
        InputError: If a value, the data or the workdir is not what was expected; nothing is written then.
        NonFiniteLossError: If the loss became inf or NaN.
        Interrupted: If SIGINT or SIGTERM came; a checkpoint is written.
        WorkerLostError: If another worker went away.
        ImportError: If a package that only runs need is not installed.
    """
    recipe.check()
    require("a run", "filelock", "matplotlib", "tensorboard")
    runtime = runtime or Runtime()
    workdir = pathlib.Path(workdir).expanduser()
    log = log if runtime.is_chief else lambda line: None
    try:
        with contextlib.ExitStack() as stack:
            hold = functools.cache(lambda: stack.enter_context(only_one(workdir)))  # once
            finished = _agreed(runtime, lambda: _enter_workdir(workdir, recipe, hold) if runtime.is_chief else None)
            if runtime.any(finished is not None):
                log(f"this run is finished already: {workdir / 'result.json'} (another --workdir or --seed starts a new one)")
                return finished
            return _run(recipe, workdir, hold, data_dir, name, runtime, callbacks, keep_checkpoints, signal_every, log)
    except tf.errors.ResourceExhaustedError as error:
        raise InputError(
            f"--batch_size must fit the device's memory. Received: {recipe.batch_size} ({first_line(error)})"
        ) from error
    except tf.errors.OpError as error:
        if runtime.workers == 1:
            raise
        message = "another worker was lost; start all workers again: the run goes on from the last checkpoint"
        raise WorkerLostError(message) from error


def _run(recipe, workdir, hold, data_dir, name, runtime, callbacks, keep_checkpoints, signal_every, log):
    data = _agreed(runtime, lambda: load_recipe_data(recipe, data_dir, runtime.replicas))
    log(f"computing on {runtime.describe()}")
    log(
        f"{recipe.dataset}: {len(data.train)} training, {len(data.validation or ())} validation and {len(data.test)} test "
        f"images {data.image_shape}, {len(data.class_names)} classes"
    )
    if recipe.precision != "float32" and not runtime.jit_compile:  # XLA's convolutions are its own
        times = slowdown(recipe.precision.removeprefix("mixed_"))
        if times > SLOW:
            told = f"a convolution's gradients take {times:.0f} times as long as in --precision=float32"
            log(f"--precision={recipe.precision} is slow here: {told}")
    with _precision(recipe.precision), runtime.strategy.scope():
        keras.utils.set_random_seed(recipe.seed)
        model, total_steps = compiled_model(recipe, data, runtime.replicas > 1)
    _agreed(runtime, lambda: _begin(workdir, recipe, data.fingerprint, hold) if runtime.is_chief else None)
    layers = sum(1 for layer in model.layers if layer_kernels(layer))
    log(f"{model.name}: {layers} layers, {model.count_params():,} parameters, {total_steps} steps of {recipe.batch_size}")
    if recipe.warmup_steps >= total_steps:
        log(f"--warmup_steps={recipe.warmup_steps} is no less than the run: the learning rate does not reach its highest")
    if recipe.modulation != "off" and recipe.modulation_steps:
        callbacks = [*callbacks, ModulationSwitch(recipe.modulation_steps)]
    monitor = None
    if signal_every and runtime.is_chief:
        images, labels = data.train.sample(PROBE_IMAGES)

        def loss(true, logits):
            return scores(true, logits, recipe.label_smoothing)[-1]

        monitor = SignalMonitor(images.astype("float32"), labels, workdir, loss, every=signal_every)
        callbacks = [*callbacks, monitor]
    settings = (data, workdir, total_steps, runtime, callbacks, keep_checkpoints, log)
    trainer = Trainer(model, recipe, *settings)
    begun = trainer.restore()
    if recipe.start_depth and begun is None:
        begun = _grown(model, recipe, settings)
    history = trainer.run(begun)
    if monitor is not None:
        log(f"signals.csv and signals.png took {100 * monitor.share:.1f} % of the training time")
    log("evaluating on the test split")
    test = trainer.evaluate(data.test, recipe.augment in MIRRORING)
    if not runtime.is_chief:
        return None
    result = result_of(name, recipe, data, model, history, test, runtime)
    _save_model(model, workdir / "final.keras")
    write_json(workdir / "history.json", history)
    plot_curves(history, workdir / "curves.png", f"{name or recipe.network} (depth {recipe.depth}, seed {recipe.seed})")
    write_json(workdir / "result.json", result)
    return result


def _grown(model, recipe, settings):
    """Trains `start_depth` layers for `grow_epoch` epochs, and sets `model` to what they are; returns what it goes on from."""
    data, workdir, _, runtime, *_, log = settings
    last_step = growth_step(recipe, data)
    shift = shift_for_depth(recipe.depth) if recipe.relu_shift < 0 else recipe.relu_shift
    recipe = dataclasses.replace(recipe, depth=recipe.start_depth, start_depth=0, relu_shift=shift)
    with _precision(recipe.precision), runtime.strategy.scope():
        shallow, _ = compiled_model(recipe, data, runtime.replicas > 1)
    log(f"it begins with {recipe.depth} layers, {shallow.count_params():,} parameters, for {last_step} steps")
    folder = workdir / "checkpoints" / f"{recipe.depth}_layers"
    trainer = Trainer(shallow, recipe, *settings, last_step, folder)
    history = trainer.run(trainer.restore())
    trainer.estimate()
    count = max(1, GROWTH_PIXELS // math.prod(data.image_shape[:2]))
    grow(shallow, model, trainer.images(min(GROWTH_IMAGES, count)))
    model.stop_training = shallow.stop_training
    log(f"{shallow.name} has become {model.name}")
    return history[-1]["step"], history, new_epoch()


def _agreed(runtime, prepare):
    """Returns `prepare()`; where a worker refuses, all of them end instead of waiting for it."""
    value = error = None
    try:
        value = prepare()
    except InputError as caught:
        error = caught
    refused = runtime.any(error is not None)
    if error is not None:
        raise error
    if refused:
        raise InputError("another worker refused the run; its own message says why")
    return value


def load_recipe_data(recipe, data_dir=None, replicas=1):
    """Returns the recipe's `ImageData`, of which the replicas can share a batch, or raises `InputError`."""
    if recipe.batch_size % replicas:
        raise InputError(f"--batch_size must be divisible by the {replicas} replicas. Received: {recipe.batch_size}")
    stream = recipe.augment == "resized_crop"
    data = load_data(recipe.dataset, data_dir, recipe.image_size, recipe.hold_out, stream)
    if len(data.class_names) < 2:
        raise InputError(f"--dataset {recipe.dataset} must have at least 2 classes. Received: {', '.join(data.class_names)}")
    if len(data.train) < recipe.batch_size:
        raise InputError(
            f"--batch_size must be at most the number of training images, {len(data.train)}. Received: {recipe.batch_size}"
        )
    shallow = growth_step(recipe, data)
    if 0 < recipe.max_steps <= shallow:
        raise InputError(
            f"--max_steps must be 0, or more than those before --grow_epoch, {shallow}. Received: {recipe.max_steps}"
        )
    side = min(data.image_shape[:2])
    for name in ("crop_border", "cutout"):
        if recipe.augment.startswith("crop") and getattr(recipe, name) > side:
            raise InputError(f"--{name} must be at most the images' side, {side}. Received: {getattr(recipe, name)}")
    return data


@contextlib.contextmanager
def _precision(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _begin(workdir, recipe, fingerprint, hold):
    workdir.mkdir(parents=True, exist_ok=True)
    hold()
    path = workdir / "run.json"
    held = json.loads(path.read_text()).get("data_sha256") if path.exists() else None
    if held and held != fingerprint:
        raise InputError(
            f"--workdir must be empty or hold a run on these images. Received: {str(workdir)!r}, whose images are others "
            f"(data_sha256 {held[:16]} there, {(fingerprint or 'none')[:16]} here)"
        )
    write_json(path, {"recipe": recipe.to_json(), "data_sha256": fingerprint})


def _enter_workdir(workdir, recipe, hold):
    """Makes sure that a run may use the workdir, and holds it; returns its result if it is finished there already."""
    shown = str(workdir)
    check_folder("--workdir", workdir)
    if not entries(workdir):
        return None
    try:
        held = json.loads((workdir / "run.json").read_text())["recipe"]
        held = Recipe.from_json(held).to_json()  # a value that is younger than the run had its default then
    except FileNotFoundError:
        raise InputError(f"--workdir must be empty or hold this very run. Received: {shown!r}, with other files") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--workdir must be empty or hold a run. Received: {shown!r}, whose run.json is damaged") from error
    mine = recipe.to_json()
    different = [
        f"{key}={held.get(key)!r} there, {mine.get(key)!r} here" for key in {**held, **mine} if held.get(key) != mine.get(key)
    ]
    if different:
        raise InputError(
            f"--workdir must be empty or hold this very run. Received: {shown!r}, which holds another: {'; '.join(different)}"
        )
    hold()
    result = workdir / "result.json"
    return json.loads(result.read_text()) if result.exists() else None


def _save_model(model, path):
    with whole_file(path) as own:
        model.save(own, include_optimizer=False)
