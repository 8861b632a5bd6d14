"""One experiment: trains a model by a recipe and writes the model, its metrics and plots into a directory."""

import contextlib
import dataclasses
import errno
import math
import os
import time

import keras
import tensorflow as tf

from ortho_keras.diagnosis.monitor import SignalMonitor
from ortho_keras.method.chain import ModulationSwitch
from ortho_keras.method.checks import require
from ortho_keras.method.console import say
from ortho_keras.method.errors import InputError, WorkerLostError, first_line
from ortho_keras.method.files import (
    check_folder,
    entries,
    expanded,
    only_one,
    read_json,
    remove_temporary,
    whole_file,
    write_json,
)
from ortho_keras.method.kernels import layer_kernels
from ortho_keras.method.loading import load_model
from ortho_keras.nets.growth import grow
from ortho_keras.nets.shifted_relu import shift_for_depth
from ortho_keras.trainer.build import compiled_model, growth_step
from ortho_keras.trainer.checkpoints import restore_checkpoint
from ortho_keras.trainer.data import load_data
from ortho_keras.trainer.loop import BEST, Trainer, new_epoch
from ortho_keras.trainer.recipe import MIRRORING, STORED, Recipe
from ortho_keras.trainer.result import EVALUATE_AGAIN, RESULT, result_of
from ortho_keras.trainer.runtime import Runtime, graphs_freed, slowdown, stop_requests
from ortho_keras.trainer.steps import scores

PROBE_IMAGES = 64
GROWTH_IMAGES, GROWTH_PIXELS = 512, 512 * 64 * 64  # the most that the new layers' statistics are computed on
LAYER_BYTES = 100_000  # at least, of a layer in Keras and in TensorFlow's graph
LAYER_WEIGHTS = 36  # times width^2, the mean of plain_cnn's shortest network, 8 layers; all others have more
FILES = ("run.json", "history.json", "curves.png", "final.keras", "best.keras", "result.json", "signals.csv", "signals.png")
SLOW = 2.0  # a type that takes so many times as long as float32 is worth a warning


def run(
    recipe,
    workdir,
    data_dir=None,
    name="",
    runtime=None,
    callbacks=(),
    keep_checkpoints=2,
    signal_every=0,
    checkpoint_minutes=10.0,
    log=say,
):
    """Trains and evaluates a recipe; resumes where an earlier call with the same arguments was stopped.

    Writes into `workdir`: `run.json` (the recipe, at the start), `checkpoints/`, `tensorboard/`, `history.json` and
    `curves.png` (after an epoch), `final.keras`, `best.keras` (of the epoch with the highest validation accuracy) and
    `result.json` (at the end); with `signal_every`, `SignalMonitor`'s files.

    Args:
        recipe: `Recipe`.
        workdir: Path of the run's own folder; made if missing.
        data_dir: TFDS's folder of prepared data, or `None` for its own.
        name: The recipe's name, for the report.
        runtime: `Runtime`, or `None` for this process on TensorFlow's default device.
        callbacks: List of `keras.callbacks.Callback`. One that is called at each batch makes each call of the graph one step,
            which is slower, unless it has a method `steps_to_due(step)`: how many more steps a call may take.
        keep_checkpoints: int, at least 1.
        signal_every: int, steps from one measurement of `SignalMonitor` on the first training images to the next; 0: none.
        checkpoint_minutes: float, minutes after which a checkpoint is written within an epoch too.
        log: Function that takes a line of progress.

    Returns:
        The content of `result.json`, a dict; `None` on a worker other than the chief.

    Raises:
        InputError: If a value, the data or the workdir is not what was expected; nothing is written then.
        NonFiniteLossError: If the loss became inf or NaN.
        Interrupted: If SIGINT or SIGTERM came; a checkpoint is written.
        WorkerLostError: If another worker was lost.
        ImportError: If a package that only runs need is not installed.
    """
    recipe.check()
    if keras.config.floatx() != "float32":
        raise InputError(f"Keras's floatx must be float32; use --precision instead. Received: {keras.config.floatx()!r}")
    require("a run", "filelock", "matplotlib", "tensorboard")
    runtime = runtime or Runtime()
    workdir = expanded(workdir)
    log = log if runtime.is_chief else lambda line: None
    with _resource_errors(recipe, runtime, workdir), graphs_freed(), contextlib.ExitStack() as lock:
        _check_memory(recipe)
        finished = _agreed(runtime, lambda: _check_workdir(workdir, recipe) if runtime.is_chief else None)
        if runtime.any(finished is not None):
            log(f"this run is finished already: {workdir / 'result.json'} (another --workdir or --seed starts a new one)")
            return finished
        data = _agreed(runtime, lambda: load_recipe_data(recipe, data_dir, runtime.replicas))
        log(f"computing on {runtime.describe()}")
        _describe_data(recipe, data, log)
        if recipe.precision != "float32" and not runtime.jit_compile:  # XLA's convolutions are its own
            times = slowdown(recipe.precision.removeprefix("mixed_"))
            if times > SLOW:
                slow = f"a convolution's gradients take {times:.0f} times as long as in --precision=float32"
                log(f"--precision={recipe.precision} is slow here: {slow}")
        keras.utils.set_random_seed(recipe.seed)
        model, total_steps, build_seconds = _compiled(recipe, data, runtime)
        resumes = runtime.any(runtime.is_chief and (workdir / "checkpoints").exists())
        if recipe.initial_weights and not resumes:
            _agreed(runtime, lambda: _load_weights(model, recipe.initial_weights))
            log(f"training begins with the weights of {recipe.initial_weights}, at the recipe's own learning rate")
        _agreed(runtime, lambda: _begin(workdir, recipe, data.fingerprint, lock) if runtime.is_chief else None)
        _describe_training(recipe, model, total_steps, log)
        callbacks = list(callbacks)
        if recipe.modulation != "off" and recipe.modulation_steps:
            callbacks.append(ModulationSwitch(recipe.modulation_steps))
        if signal_every and runtime.is_chief:
            callbacks.append(_monitor(recipe, data, workdir, signal_every))
        title = f"{name or recipe.network} (depth {recipe.depth}, seed {recipe.seed})"
        with stop_requests() as stop:
            trainer = Trainer(
                model,
                recipe,
                data,
                workdir,
                total_steps,
                runtime,
                callbacks,
                keep_checkpoints=keep_checkpoints,
                log=log,
                title=title,
                stop=stop,
                build_seconds=build_seconds,
                checkpoint_minutes=checkpoint_minutes,
            )
            begun = trainer.restore()
            if recipe.initial_weights and resumes and begun is None:  # no checkpoint is intact
                _agreed(runtime, lambda: _load_weights(model, recipe.initial_weights))
            if recipe.start_depth and begun is None:
                begun = _grown(trainer)
            history = trainer.run(begun)
            if signal_every and runtime.is_chief:
                log(f"signals.csv and signals.png took {100 * callbacks[-1].share:.1f} % of the training time")
            log("evaluating on the test split")
            test = trainer.evaluate(data.test, recipe.augment in MIRRORING, confusion=True)
        if not runtime.is_chief:
            return None
        result = result_of(name, recipe, data, model, history, test, runtime)
        with whole_file(workdir / "final.keras") as own:
            model.save(own, include_optimizer=False)
        best = restore_checkpoint(trainer.checkpoints / BEST, model, log)
        if best:  # only at the end: writing a model takes up to ten times as long as writing a checkpoint
            with whole_file(workdir / "best.keras") as own:
                model.save(own, include_optimizer=False)
            result |= {"best_epoch": best[1][0]["epoch"], "best_validation_accuracy": best[1][0]["validation_accuracy"]}
        write_json(workdir / "result.json", result)
        return result


def _describe_data(recipe, data, log):
    log(
        f"{recipe.dataset}: {len(data.train)} training, {len(data.validation or ())} validation and {len(data.test)} test "
        f"images {data.image_shape}, {len(data.class_names)} classes"
    )
    for note in data.notes:
        log(f"{recipe.dataset}: {note}")


def _describe_training(recipe, model, total_steps, log):
    layers = sum(1 for layer in model.layers if layer_kernels(layer))
    log(f"{model.name}: {layers} layers, {model.count_params():,} parameters, {total_steps} steps of {recipe.batch_size}")
    if recipe.rate_depth not in (0, recipe.depth):
        scaled = f"--rate_depth / --depth = {recipe.rate_depth} / {recipe.depth}"
        log(f"the learning rate is --learning_rate={recipe.learning_rate} times {scaled}: {recipe.peak_learning_rate:.4g}")
    if recipe.warmup_steps >= total_steps:
        log(f"--warmup_steps={recipe.warmup_steps} is no less than the run: the learning rate does not reach its highest")


def load_recipe_data(recipe, data_dir=None, replicas=1):
    """Returns the recipe's `ImageData`, or raises `InputError` where the recipe's values do not fit it or the replicas."""
    if recipe.batch_size % replicas:
        raise InputError(f"--batch_size must be divisible by the {replicas} replicas. Received: {recipe.batch_size}")
    data = load_data(recipe.dataset, data_dir, recipe.image_size, recipe.hold_out, recipe.storage)
    if len(data.class_names) < 2:
        raise InputError(f"--dataset {recipe.dataset} must have at least 2 classes. Received: {', '.join(data.class_names)}")
    side, crops, grown = min(data.image_shape[:2]), recipe.augment.startswith("crop"), growth_step(recipe, data)
    for flag, wrong, expected in (
        ("batch_size", recipe.batch_size > len(data.train), f"at most the number of training images, {len(data.train)}"),
        ("max_steps", 0 < recipe.max_steps <= grown, f"0, or more than the {grown} steps before --grow_epoch"),
        ("crop_border", crops and recipe.crop_border > side, f"at most the images' side, {side}"),
        ("cutout", crops and recipe.cutout > side, f"at most the images' side, {side}"),
    ):
        if wrong:
            raise InputError(f"--{flag} must be {expected}. Received: {getattr(recipe, flag)}")
    return data


def _check_memory(recipe):
    """Raises `InputError` where the kernels alone of the recipe's network, in float32, exceed the memory."""
    least = recipe.depth * (LAYER_BYTES + 4 * LAYER_WEIGHTS * recipe.width**2)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if least > memory:
        expected = f"--depth and --width must be of a network that fits the memory, {memory / 2**30:.0f} GiB"
        raise InputError(f"{expected}. Received: {recipe.depth} layers of width {recipe.width}, over {least / 2**30:.3g} GiB")


@contextlib.contextmanager
def _resource_errors(recipe, runtime, workdir):
    """Explains the errors of a device that lacks memory, of a full disk, and of a worker that was lost."""
    try:
        yield
    # RuntimeError: h5py's, of a full disk
    except (OSError, ValueError, RuntimeError, MemoryError, tf.errors.ResourceExhaustedError) as error:
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            message = "the disk of --workdir must have space; then the same command resumes from the last checkpoint"
            raise InputError(f"{message}. Received: {str(workdir)!r} ({first_line(error)})") from error
        if not isinstance(error, (MemoryError, tf.errors.ResourceExhaustedError)):
            raise
        sizes = " ".join(f"--{name}={getattr(recipe, name)}" for name in ("batch_size", "image_size", "width", "depth"))
        raise InputError(f"a step must fit the device's memory. Received: {sizes} ({first_line(error)})") from error
    except tf.errors.OpError as error:
        if runtime.workers == 1:
            raise
        message = "another worker was lost; start all workers again: the run resumes from the last checkpoint"
        raise WorkerLostError(message) from error


def _agreed(runtime, prepare):
    """Returns `prepare()`; where it raises `InputError` on a worker, all workers raise one instead of waiting for it."""
    value = error = None
    try:
        value = prepare()
    except InputError as caught:
        error = caught
    if runtime.any(error is not None):
        raise error or InputError("another worker refused the run; its own message says why")
    return value


def _compiled(recipe, data, runtime):
    before, started = keras.config.dtype_policy(), time.perf_counter()
    keras.config.set_dtype_policy(recipe.precision)
    try:
        with runtime.strategy.scope():
            return *compiled_model(recipe, data, runtime.replicas > 1), time.perf_counter() - started
    finally:
        keras.config.set_dtype_policy(before)


def _load_weights(model, path):
    """Sets a model's weights to those of a `.keras` file, or raises `InputError` where they do not fit."""
    try:
        model.set_weights(load_model(expanded(path), compile=False).get_weights())
    except ValueError as error:
        expected = "--initial_weights must be a .keras file of the recipe's network"
        raise InputError(f"{expected}. Received: {path!r} ({first_line(error)})") from error


def _monitor(recipe, data, workdir, every):
    def loss(labels, logits):
        return scores(labels, logits, recipe.label_smoothing)[-1]

    images, labels = data.train.sample(PROBE_IMAGES)
    return SignalMonitor(images.astype("float32"), labels, workdir, loss, every=every)


def _grown(trainer):
    """Trains `start_depth` layers for `grow_epoch` epochs and grows the trainer's model from them; returns where it begins."""
    recipe, data, log = trainer.recipe, trainer.data, trainer.log
    shift = shift_for_depth(recipe.depth) if recipe.relu_shift < 0 else recipe.relu_shift
    first = dataclasses.replace(recipe, depth=recipe.start_depth, start_depth=0, relu_shift=shift)
    model, _, build_seconds = _compiled(first, data, trainer.runtime)
    last_step, folder = growth_step(recipe, data), trainer.checkpoints / f"{first.depth}_layers"
    rate = f"a learning rate of up to {first.peak_learning_rate:.4g}"
    log(f"training begins with {first.depth} layers, {model.count_params():,} parameters, for {last_step} steps, at {rate}")
    shallow = dataclasses.replace(
        trainer, model=model, recipe=first, end_step=last_step, checkpoints=folder, build_seconds=build_seconds
    )
    history = shallow.run(shallow.restore())
    shallow.estimate()
    count = max(1, GROWTH_PIXELS // math.prod(data.image_shape[:2]))
    grow(model, trainer.model, shallow.images(min(GROWTH_IMAGES, count)))
    trainer.model.stop_training = model.stop_training
    log(f"{model.name} has become {trainer.model.name}")
    return history[-1]["step"], history, new_epoch()


def _check_workdir(workdir, recipe, fingerprint=None):
    """Raises `InputError` unless the workdir is empty or holds this run; returns the run's result if it is finished."""
    shown = str(workdir)
    check_folder("--workdir", workdir)
    images = os.path.expanduser(recipe.dataset.removeprefix("folder:"))
    if images != recipe.dataset and os.path.isdir(images) and workdir.resolve().is_relative_to(os.path.realpath(images)):
        raise InputError(f"--workdir must be outside of the images' folder, where it would be a class. Received: {shown!r}")
    if not entries(workdir):
        return None
    files = [*(workdir / name for name in FILES), *(workdir / "checkpoints").rglob("*.npz")]
    folders = [workdir / name for name in ("checkpoints", "tensorboard")]
    wrong = [path for path in files if not path.is_file()] + [path for path in folders if not path.is_dir()]
    wrong = [path for path in wrong if os.path.lexists(path)]
    if wrong:
        expected = "--workdir must hold files and folders of a run where it has their names"
        kind = "folder" if wrong[0].is_dir() else "file" if wrong[0].exists() else "dangling link"
        raise InputError(f"{expected}. Received: {wrong[0]}, a {kind}")
    if not (workdir / "run.json").exists():
        raise InputError(f"--workdir must be empty or hold this very run. Received: {shown!r}, with other files")
    held = read_json(workdir / "run.json", STORED, "--workdir must be empty or hold a run with an intact run.json")
    try:
        theirs, mine = Recipe.from_json(held["recipe"]).to_json(), recipe.to_json()
    except ValueError as error:
        raise InputError(f"--workdir must be empty or hold this very run. Received: {shown!r} ({error})") from error
    if fingerprint and held.get("data_sha256"):
        theirs["data_sha256"], mine["data_sha256"] = held["data_sha256"], fingerprint
    different = [f"{key}={theirs[key]!r} there, {mine[key]!r} here" for key in mine if theirs[key] != mine[key]]
    if different:
        raise InputError(
            f"--workdir must be empty or hold this very run. Received: {shown!r}, which holds another: {'; '.join(different)}"
        )
    result, expected = workdir / "result.json", f"the result of a finished run must be intact; {EVALUATE_AGAIN}"
    return read_json(result, RESULT, expected) if result.exists() else None


def _begin(workdir, recipe, fingerprint, lock):
    workdir.mkdir(parents=True, exist_ok=True)
    lock.enter_context(only_one(workdir))
    remove_temporary(workdir)
    _check_workdir(workdir, recipe, fingerprint)
    write_json(workdir / "run.json", {"recipe": recipe.to_json(), "data_sha256": fingerprint})
