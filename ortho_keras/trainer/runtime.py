"""Where a run computes: devices, strategy and determinism; and what it leaves behind there."""

import contextlib
import dataclasses
import functools
import os
import re
import signal
import socket
import sys
import threading
import time
import types

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import ops

from ortho_keras.method.console import say
from ortho_keras.method.errors import InputError
from ortho_keras.method.files import parse_json

MOST_CPUS = 64  # logical ones; a thousand took 11 GB and 15 minutes to make
STRATEGIES = ("auto", "none", "mirrored", "multi_worker")


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What `start` has set up. `Runtime()` is this process on TensorFlow's default device."""

    strategy: tf.distribute.Strategy = dataclasses.field(default_factory=tf.distribute.get_strategy)
    jit_compile: bool = False  # compiles the training step by XLA
    deterministic: bool = False  # two runs with one seed are equal to the bit

    @property
    def replicas(self):
        return self.strategy.num_replicas_in_sync

    @property
    def local_replicas(self):
        return len(self.strategy.extended.worker_devices) if self.replicas > 1 else 1

    @property
    def worker(self):
        """This process's number; worker 0, the chief, writes files and logs."""
        return self.strategy.cluster_resolver.task_id if self.workers > 1 else 0

    @property
    def workers(self):
        return self.replicas // self.local_replicas

    @property
    def is_chief(self):
        return self.worker == 0

    def any(self, flag):
        """Returns whether `flag` is true on any worker."""
        return bool(self._sum([float(flag)])[0])

    def from_chief(self, arrays):
        """Returns the chief's arrays on every worker, as a list of float64 arrays, which hold all types of a state exactly."""
        arrays = [np.asarray(array, np.float64) for array in arrays]
        own = np.concatenate([array.ravel() for array in arrays])
        parts = np.split(self._sum(own * self.is_chief), np.cumsum([array.size for array in arrays])[:-1])
        return [part.reshape(array.shape) for part, array in zip(parts, arrays)]

    def _sum(self, vector):
        """The sum of the workers' float64 vectors, a NumPy array."""
        vector = tf.convert_to_tensor(vector, tf.float64)
        return (vector if self.workers == 1 else self._reduce(vector)).numpy()

    @functools.cached_property  # one function for all calls: TensorFlow warns of functions that are traced repeatedly
    def _reduce(self):
        def own(vector):
            first = tf.distribute.get_replica_context().replica_id_in_sync_group % self.local_replicas == 0
            return tf.where(first, vector, tf.zeros_like(vector))  # once for each worker

        strategy = self.strategy
        return tf.function(lambda vector: strategy.reduce("SUM", strategy.run(own, args=(vector,)), axis=None))

    def describe(self):
        """Returns what the run computes on, one line for the log."""
        name = "MultiWorkerMirroredStrategy" if self.workers > 1 else "MirroredStrategy"
        name = "one device" if self.replicas == 1 else f"{name}, {self.replicas} replicas on {self.workers} machine(s)"
        parts = [name, ", ".join(device_names())]
        if tf.config.list_physical_devices("GPU"):
            tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
            parts.append(f"TF32 {'on: float32 products keep 10 bits' if tf32 else 'off'}")
        parts += ["XLA"] * self.jit_compile + ["deterministic"] * self.deterministic
        return "; ".join(parts)


def start(strategy="auto", devices="", jit_compile=False, deterministic=False, tf32=False):
    """Returns a `Runtime`, or raises `InputError`; to be called once, before TensorFlow uses a device.

    Args:
        strategy: `"mirrored"`: this machine's devices; `"multi_worker"`: the machines in TF_CONFIG; `"auto"`:
            `"multi_worker"` where TF_CONFIG defines a cluster, `"mirrored"` where there are several devices, else `"none"`.
        devices: A number of this machine's devices, or names, `"GPU:0,GPU:2"`. Empty: all GPUs, or the CPU. A number without
            a GPU, or CPU names, makes logical CPUs (to try a distributed run without hardware).
        jit_compile: bool. Compiles the training step by XLA; with one replica only.
        deterministic: bool. Makes two runs with one seed equal to the bit.
        tf32: bool. Lets GPUs round float32 matrix products to TF32. TensorFlow's default is on; ours is off.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"--strategy must be one of {', '.join(STRATEGIES)}. Received: {strategy!r}")
    cluster = _cluster()
    names = read_devices(devices)
    if strategy == "auto":
        several = len(names or tf.config.list_physical_devices("GPU")) > 1
        strategy = "multi_worker" if cluster else "mirrored" if several else "none"
    if strategy == "multi_worker" and not cluster:
        raise InputError(
            "--strategy multi_worker needs the environment variable TF_CONFIG, "
            '\'{"cluster": {"worker": ["host0:port", "host1:port"]}, "task": {"type": "worker", "index": 0}}\'. '
            f"Received: TF_CONFIG is {os.environ.get('TF_CONFIG') or 'not set'}"
        )
    if (strategy == "none" and len(names) > 1) or (strategy == "multi_worker" and names):
        expected = "one device" if strategy == "none" else "empty, as each worker uses all its devices,"
        raise InputError(f"--devices must be {expected} with --strategy {strategy}. Received: {devices!r}")
    if strategy != "multi_worker":
        os.environ.pop("TF_CONFIG", None)  # MirroredStrategy would read it, an empty one too
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    if strategy == "multi_worker":
        _announce(cluster)
        started = tf.distribute.MultiWorkerMirroredStrategy()
    elif strategy == "mirrored":
        started = tf.distribute.MirroredStrategy(names or None)
    else:
        started = tf.distribute.OneDeviceStrategy(names[0]) if names else tf.distribute.get_strategy()
    runtime = Runtime(started, jit_compile, deterministic)
    if jit_compile and runtime.replicas > 1:
        raise InputError(f"--jit_compile must be off with more than one replica. Received: {runtime.replicas} replicas")
    return runtime


@contextlib.contextmanager
def graphs_freed():
    """Removes, at the end, the gradients that `tf.custom_gradient` registered meanwhile.

    TensorFlow (2.21) keeps each traced one for good, and with it the whole graph: memory that grows with each run of a process.
    Graphs that were traced meanwhile can be called, but not differentiated, afterwards.
    """
    registered = ops.gradient_registry._registry
    before = set(registered)
    try:
        yield
    finally:
        for name in set(registered) - before:
            if name.startswith("CustomGradient-"):
                del registered[name]


def device_names():
    """Returns the names of the GPUs, or `["CPU"]`."""
    gpus = tf.config.list_physical_devices("GPU")
    return [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in gpus] or ["CPU"]


def slowdown(dtype):
    """Returns how many times as long as in float32 the gradients of a small convolution take, on the default device.

    A processor without instructions for a type computes it by far slower code: without AVX-512, TensorFlow's (2.21)
    gradients of a bfloat16 convolution take four to twenty times as long as in float32.
    """

    def seconds(dtype):
        images, kernel = tf.ones((32, 16, 16, 16), dtype), tf.ones((3, 3, 16, 16), dtype)
        times = []
        for _ in range(4):
            started = time.perf_counter()
            with tf.GradientTape() as tape:
                tape.watch([images, kernel])
                outputs = tf.nn.conv2d(images, kernel, 1, "SAME")
            for gradient in tape.gradient(outputs, [images, kernel]):
                gradient.numpy()
            times.append(time.perf_counter() - started)
        return min(times)

    return seconds(dtype) / seconds("float32")


def _cluster():
    """The addresses of the workers in TF_CONFIG, a list; empty if there is no cluster."""
    text = os.environ.get("TF_CONFIG") or "{}"
    form = {"cluster": {"worker": [str]}, "task": {"type": str, "index": (int, str)}}
    try:
        if not parse_json(text, dict).get("cluster"):
            return []
        config = parse_json(text, form)
        hosts, task = config["cluster"]["worker"], config["task"]
        sound = len(set(hosts)) == len(hosts) and all(re.fullmatch(r"\S+:\d{1,5}", host) for host in hosts)
        if set(config["cluster"]) == {"worker"} and task["type"] == "worker" and 0 <= int(task["index"]) < len(hosts) and sound:
            return hosts
        reason = ""
    except ValueError as error:
        reason = f" ({error})"
    raise InputError(
        "TF_CONFIG must be JSON with a cluster of workers, a different host:port each, and this task's index among them "
        f"(worker 0 is the chief). Received: {text[:400]!r}{reason}"
    )


def _announce(hosts):
    """Logs who is waited for: TensorFlow waits for all workers without a word, and until then ignores signals."""
    unknown = []
    for host in hosts:
        try:
            socket.getaddrinfo(host.rpartition(":")[0].strip("[]"), None)
        except (OSError, UnicodeError):
            unknown.append(host)
    note = f" (unknown here: {', '.join(unknown)})" if unknown else ""
    print(f"waiting for the workers of TF_CONFIG, {', '.join(hosts)}{note}", file=sys.stderr, flush=True)


def read_devices(text):
    """Reads --devices: `["GPU:0", ...]`, or an empty list for TensorFlow's own choice. Raises `InputError`."""
    if not text:
        return []
    gpus = len(tf.config.list_physical_devices("GPU"))
    kind = "GPU" if gpus else "CPU"
    names = text.upper().replace(" ", "").split(",")
    if re.fullmatch(r"\d{1,3}", text):
        names = [f"{kind}:{index}" for index in range(int(text))]
    kind = names[0][:3] if names else ""
    indices = [int(name[4:]) for name in names if re.fullmatch(r"[GC]PU:\d{1,3}", name) and name[:3] == kind]
    most = gpus if kind == "GPU" else MOST_CPUS
    if not names or len(set(indices)) < len(names) or max(indices) >= most:
        raise InputError(
            "--devices must be a number of devices or names of one kind, GPU:0,GPU:1, that this machine has "
            f"({gpus} GPU(s)), or at most {MOST_CPUS} logical CPUs. Received: {text!r}"
        )
    cpu = tf.config.list_physical_devices("CPU")[0]
    if kind == "CPU" and len(tf.config.get_logical_device_configuration(cpu) or [None]) <= max(indices):
        try:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * (1 + max(indices)))
        except RuntimeError as error:
            raise InputError(f"--devices must be set before TensorFlow is used. Received: {text!r} ({error})") from error
    return names


def cpu_cores():
    """Returns the number of cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@contextlib.contextmanager
def stop_requests():
    """Yields an object whose `signum` the first SIGINT or SIGTERM sets, so that a trainer stops soon; a second SIGINT kills."""
    stop = types.SimpleNamespace(signum=0)

    def request(signum, frame):
        stop.signum = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if signum == signal.SIGINT:  # from someone at a terminal
            say("stopping at the next step; Ctrl-C again stops at once", sys.stderr)

    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {signum: signal.signal(signum, request) for signum in signals}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
