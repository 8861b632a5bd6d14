"""Where a run computes: devices, strategy and determinism. The same loop runs on one CPU and on many machines."""

import dataclasses
import functools
import json
import os
import time

import tensorflow as tf

from ortho_keras.method.errors import InputError

STRATEGIES = ("auto", "none", "mirrored", "multi_worker")


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A started runtime. `Runtime()` is the plain one: this process, TensorFlow's default device.

    Attributes:
        strategy: The `tf.distribute.Strategy`.
        jit_compile: bool. Compiles the training step by XLA.
        deterministic: bool. Two runs with one seed are equal to the bit.
    """

    strategy: tf.distribute.Strategy = dataclasses.field(default_factory=tf.distribute.get_strategy)
    jit_compile: bool = False
    deterministic: bool = False

    @property
    def replicas(self):
        return self.strategy.num_replicas_in_sync

    @property
    def local_replicas(self):
        return len(self.strategy.extended.worker_devices) if self.replicas > 1 else 1

    @property
    def worker(self):
        """This process's number; worker 0, the chief, writes files and prints."""
        resolver = self.strategy.cluster_resolver
        return resolver.task_id if self.workers > 1 else 0

    @property
    def workers(self):
        return self.replicas // self.local_replicas

    @property
    def is_chief(self):
        return self.worker == 0

    def sum(self, vector):
        """Returns the sum of a float64 vector over the workers, a NumPy array; each worker gives its own."""
        vector = tf.convert_to_tensor(vector, tf.float64)
        return (vector if self.workers == 1 else self._sum(vector)).numpy()

    @functools.cached_property  # one function for all calls: TensorFlow warns of those that are traced again and again
    def _sum(self):
        @tf.function
        def reduce(vector):
            def own():
                first = tf.distribute.get_replica_context().replica_id_in_sync_group % self.local_replicas == 0
                return tf.where(first, vector, tf.zeros_like(vector))  # once for each worker

            return self.strategy.reduce(tf.distribute.ReduceOp.SUM, self.strategy.run(own), axis=None)

        return reduce

    def any(self, flag):
        """Returns whether `flag` is true on any worker."""
        return bool(self.sum([float(flag)])[0])

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
    """Starts the runtime; to be called once, before TensorFlow touches a device.

    Args:
        strategy: `"auto"`: `"multi_worker"` where TF_CONFIG names a cluster, `"mirrored"` where there are several GPUs, else
            `"none"`. `"mirrored"`: a `MirroredStrategy` over this machine's devices. `"multi_worker"`: a
            `MultiWorkerMirroredStrategy` over the machines in TF_CONFIG.
        devices: Which devices of this machine: a number of them, or names, `"GPU:0,GPU:2"`. Empty: all GPUs, or the CPU. A
            number without a GPU, or CPU names, makes logical CPUs (to try a distributed run without hardware).
        jit_compile: See `Runtime`; with one replica only.
        deterministic: See `Runtime`.
        tf32: bool. Lets GPUs round float32 matrix products to TF32. TensorFlow's default is on; ours is off.

    Returns:
        A `Runtime`.

    Raises:
        InputError: If a value does not fit the machine or TF_CONFIG.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"--strategy must be one of {', '.join(STRATEGIES)}. Received: {strategy!r}")
    cluster = _cluster(strategy)
    names = read_devices(devices)
    gpus = tf.config.list_physical_devices("GPU")
    if strategy == "auto":
        several = len(names) > 1 if names else len(gpus) > 1
        strategy = "multi_worker" if cluster else "mirrored" if several else "none"
    if strategy != "multi_worker":
        os.environ.pop("TF_CONFIG", None)  # MirroredStrategy would read it, an empty one too
    if strategy == "none" and len(names) > 1:
        raise InputError(f"--devices must be one device with --strategy none. Received: {devices!r}")
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    if strategy == "multi_worker":
        if names:
            raise InputError(f"--devices must be empty with --strategy multi_worker: a worker takes all. Received: {devices!r}")
        started = tf.distribute.MultiWorkerMirroredStrategy()
    elif strategy == "mirrored":
        started = tf.distribute.MirroredStrategy(names or None)
    else:
        started = tf.distribute.OneDeviceStrategy(names[0]) if names else tf.distribute.get_strategy()
    runtime = Runtime(started, jit_compile, deterministic)
    if jit_compile and runtime.replicas > 1:
        raise InputError(f"--jit_compile must be off with more than one replica. Received: {runtime.replicas} replicas")
    return runtime


def device_names():
    """Returns the names of the GPUs, or `["CPU"]`."""
    gpus = tf.config.list_physical_devices("GPU")
    return [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in gpus] or ["CPU"]


def slowdown(dtype):
    """Returns how many times as long as in float32 the gradients of a small convolution take in a type, on the default device.

    A processor without instructions for a type computes some operations in it by far slower code: without AVX-512,
    TensorFlow's (2.21) gradients of a bfloat16 convolution take four to twenty times as long as in float32.
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


def _cluster(strategy):
    """The cluster in TF_CONFIG, a dict of job to addresses; empty if there is none."""
    text = os.environ.get("TF_CONFIG", "")
    if not text:
        if strategy == "multi_worker":
            raise InputError(
                "--strategy multi_worker needs the environment variable TF_CONFIG, "
                '\'{"cluster": {"worker": ["host0:port", "host1:port"]}, "task": {"type": "worker", "index": 0}}\'. '
                "Received: TF_CONFIG is not set"
            )
        return {}
    try:
        config = json.loads(text)
        cluster, task = config.get("cluster", {}), config.get("task", {})
        hosts = cluster.get("worker", [])
        good = not cluster or (
            set(cluster) == {"worker"} and task.get("type") == "worker" and 0 <= int(task["index"]) < len(hosts)
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise InputError(
            "TF_CONFIG must be JSON with a cluster of workers and this task's index among them (worker 0 is the chief). "
            f"Received: {text!r}"
        )
    if strategy == "multi_worker" and not cluster:
        raise InputError(f"--strategy multi_worker needs a cluster in TF_CONFIG. Received: {text!r}")
    return cluster


def read_devices(text):
    """Reads --devices: `["GPU:0", ...]`, or an empty list for TensorFlow's own choice. Raises `InputError`."""
    if not text:
        return []
    gpus = len(tf.config.list_physical_devices("GPU"))
    if text.isdecimal():
        kind = "GPU" if gpus else "CPU"
        names = [f"{kind}:{index}" for index in range(int(text))]
    else:
        names = [name.strip() for name in text.upper().split(",")]
    kinds = {name.partition(":")[0] for name in names}
    indices = [name.partition(":")[2] for name in names]
    good = names and len(kinds) == 1 and kinds <= {"GPU", "CPU"} and all(i.isdecimal() for i in indices)
    if good and kinds == {"GPU"}:
        good = all(int(index) < gpus for index in indices)
    if not good or len(set(names)) != len(names):
        raise InputError(
            "--devices must be a number of devices or names of one kind, GPU:0,GPU:1, that this machine has "
            f"({gpus} GPU(s)). Received: {text!r}"
        )
    if kinds == {"CPU"}:
        _make_logical_cpus(1 + max(map(int, indices)), text)
    return names


def _make_logical_cpus(count, text):
    cpu = tf.config.list_physical_devices("CPU")[0]
    if len(tf.config.get_logical_device_configuration(cpu) or [None]) >= count:
        return
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError as error:
        raise InputError(f"--devices must be set before TensorFlow is used. Received: {text!r} ({error})") from error


def cpu_cores():
    """The cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
