"""What a custom `train_step` needs to be right on several replicas: N replicas must equal one at the same global batch.

Here lives everything of ours that knows about `tf.distribute`: which strategy to use, how a loss becomes a gradient,
which sums cross the replicas, and which rows of a random draw belong to whom.
"""

import functools
import json
import os
import subprocess
from pathlib import Path

from einops import rearrange

from ldm.batches import UNSHARED, untuned
from ldm.later import keras
from ldm.later import tensorflow as tf


def make_strategy(replicas=None):
    """The strategy for this machine.

    With TF_CONFIG set, MultiWorkerMirroredStrategy; otherwise MirroredStrategy over all visible GPUs, or over
    `replicas` of them, or, without any GPU, over `replicas` logical CPU devices, which try out what several GPUs do.

    Args:
        replicas: number of devices; None takes all GPUs, or one CPU.

    Raises:
        ValueError: if more GPUs are asked for than there are, or CPU devices were set up before with another number.
    """
    _let_go_of_streams()
    if machines()[0]:
        return tf.distribute.MultiWorkerMirroredStrategy()
    gpus = tf.config.list_logical_devices("GPU") if tf.config.list_physical_devices("GPU") else []
    if gpus:
        if replicas and replicas > len(gpus):
            raise ValueError(
                f"--replicas {replicas} asks for more GPUs than the {len(gpus)} that are visible: give fewer"
            )
        return _mirrored(tuple(gpu.name for gpu in gpus[:replicas]))
    return _mirrored(tuple(cpu.name for cpu in _logical_cpus(replicas or 1)))


@functools.cache
def _let_go_of_streams():
    """Leave out the thread that tunes the streams which a strategy makes for its devices: see `batches.untuned`.

    They take no options from the dataset they are made of, so that every `fit` ended with up to a minute of waiting.
    """
    from tensorflow.python.data.ops import multi_device_iterator_ops as streams

    made = getattr(streams, "_create_device_dataset", None)  # no part of TensorFlow's public names
    if made:
        streams._create_device_dataset = lambda *options: made(*options).with_options(untuned())


def machines():
    """What TF_CONFIG says of several machines that train together.

    Returns:
        {job: its addresses}, and {"type": job, "index": number} of this process; both empty without TF_CONFIG.

    Raises:
        ValueError: if it says something else.
    """
    said = os.environ.get("TF_CONFIG") or "{}"
    try:
        config = json.loads(said)
        cluster, task = config.get("cluster", {}), config.get("task", {})
        lists = all(isinstance(job, list) and all(isinstance(one, str) for one in job) for job in cluster.values())
        if not cluster or (lists and task["index"] in range(len(cluster[task["type"]]))):
            return dict(cluster), dict(task)
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise ValueError(
        f"TF_CONFIG={said[:40]!r} does not say which machines train together: unset it, or give it as TensorFlow's "
        "guide to several workers does"
    )


def machine():
    """{"gpus": number of visible GPUs, "memory": GiB of the smallest, "fast": whether it has 16-bit arithmetic}.

    A card that does not say how large it is counts as one of 16 GiB.
    """
    gpus, fast = len(tf.config.list_physical_devices("GPU")), _fast_policy() != "float32"
    if not gpus:
        return {"gpus": 0, "memory": 0.0, "fast": fast}
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:  # in MiB, a line for each; TensorFlow tells what it has taken, not what there is
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
        memory = min(float(line) for line in said.splitlines()) / 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        memory = 16.0
    return {"gpus": gpus, "memory": memory, "fast": fast}


@functools.cache  # two strategies over the same devices number their collectives alike, and mix them up
def _mirrored(devices):
    return tf.distribute.MirroredStrategy(list(devices))


def wait_for_all(strategy):
    """Return when every machine has come to this line: before one reads what another wrote."""
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(tf.function(lambda: tf.ones(()))), axis=None)


def own_share(strategy, stream):
    """Training batches for `fit`, of which each of several hosts makes its own rows only.

    Args:
        strategy: of the model.
        stream: callable (share) -> endless dataset of batches, or of a part of each: `share` of `dataset.make_dataset`.
    """
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return stream(UNSHARED)

    def of_host(context):
        made = stream((context.input_pipeline_id, context.num_input_pipelines))
        replicas = context.num_replicas_in_sync // context.num_input_pipelines
        rows = tf.nest.flatten(made.element_spec)[0].shape[0]  # each replica takes an element in turn
        return made.rebatch(rows // replicas, drop_remainder=True) if replicas > 1 else made

    return strategy.distribute_datasets_from_function(of_host)


def for_logs(values):
    """{name: scalar} as a `train_step` must return it: Keras 3.15 averages over several machines along an axis."""
    several = isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy)
    return {name: value[None] for name, value in values.items()} if several else values


def _logical_cpus(count):
    cpu = tf.config.list_physical_devices("CPU")[0]
    made = tf.config.get_logical_device_configuration(cpu)
    if not made:
        try:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
        except RuntimeError as error:  # TensorFlow has started, with one device
            if count > 1:
                raise ValueError("--replicas comes too late, TensorFlow has started: begin anew") from error
    cpus = tf.config.list_logical_devices("CPU")
    if len(cpus) < count:
        raise ValueError(f"--replicas {count} asks for more devices than the {len(cpus)} that were set up: give fewer")
    return cpus[:count]


def replica_loss(loss, optimizer=None):
    """This replica's part of the global mean: the loss over the number of replicas, for the tape only.

    Gradients are summed over replicas, so plain means would give N times the gradient. Report the undivided loss.

    Args:
        loss: mean over this replica's rows.
        optimizer: that will step; in float16 the loss is multiplied by its scale, which `apply_gradients` takes back.
    """
    return loss * loss_scale(optimizer) / tf.distribute.get_replica_context().num_replicas_in_sync


def loss_scale(optimizer):
    """What the losses of an optimizer are multiplied by, a scalar: 1 but in float16."""
    return tf.convert_to_tensor(optimizer.loss_scale) if getattr(optimizer, "scaled", False) else 1.0


def sum_over_replicas(tensors):
    """All-reduce a nest of tensors by SUM; with one replica, the tensors themselves."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return tensors
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def mean_over_replicas(value):
    """The mean of a tensor that every replica holds, the same on all of them."""
    return sum_over_replicas(value) / tf.distribute.get_replica_context().num_replicas_in_sync


def apply_gradients(optimizer, gradients, variables, clip_norm=None):
    """One optimiser step with the gradients of `replica_loss`, clipped by their global norm.

    Keras optimizers clip before they sum over replicas, so that two replicas would clip two half gradients and step
    elsewhere than one. Here the sum comes first, then the loss scale of float16 is taken back; a step whose gradients
    are not finite, anywhere, is skipped everywhere. Returns the norm before clipping.
    """
    gradients, scale = sum_over_replicas(gradients), loss_scale(optimizer)
    norm = tf.linalg.global_norm(gradients) / scale
    factor = 1.0 / (scale * tf.distribute.get_replica_context().num_replicas_in_sync)  # the optimizer sums once more
    if clip_norm is not None:
        factor *= tf.minimum(1.0, clip_norm / (norm + 1e-12))
    gradients = [g * tf.cast(factor, g.dtype) for g in gradients]
    if getattr(optimizer, "scaled", False):
        optimizer.step_if(tf.math.is_finite(norm), gradients, variables)
    else:
        optimizer.apply(gradients, variables)
    return norm


def global_rows(draw, rows):
    """This replica's rows of one draw for the global batch.

    Noise that is drawn per replica depends on the number of replicas. `draw(n)` is a stateless random function of the
    number of rows; all replicas make the same global draw, and each keeps its own contiguous part, as `tf.distribute`
    splits a batch.

    Args:
        draw: callable n -> tensor (n, ...).
        rows: number of rows on this replica.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return draw(rows)
    start = context.replica_id_in_sync_group * rows
    return draw(rows * context.num_replicas_in_sync)[start : start + rows]


def normal(shape, seed):
    """Standard normal noise (rows, ...) for this replica's rows; all rows are those of one draw for the global batch.

    Args:
        shape: its first entry is the number of rows on this replica, the others are numbers.
        seed: two integers.
    """
    return global_rows(lambda n: tf.random.stateless_normal((n, *shape[1:]), seed), shape[0])


def gather_rows(part):
    """The rows of the global batch, in order, of which each replica holds a contiguous part; the same everywhere."""
    context = tf.distribute.get_replica_context()
    rows, replicas = tf.shape(part)[0], context.num_replicas_in_sync
    before = context.replica_id_in_sync_group * rows
    margins = [[before, (replicas - 1) * rows - before]] + [[0, 0]] * (part.shape.rank - 1)
    return sum_over_replicas(tf.pad(part, margins))  # each contributes its rows, and zeros for the others


def own_rows(everyone, rows):
    """This replica's part of the global batch: its `rows` rows."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return everyone
    start = context.replica_id_in_sync_group * rows
    return everyone[start : start + rows]


def moments(x):
    """Mean and standard deviation per channel, (C,) each, of the global batch (B, ..., C)."""
    flat = tf.reshape(x, (-1, x.shape[-1]))
    mean, square = (mean_over_replicas(tf.reduce_mean(part, 0)) for part in (flat, flat**2))
    return mean, tf.sqrt(tf.maximum(square - mean**2, 1e-12))


def at_least_one_row(batch):
    """A replica's part of the last, smaller batch may be empty, which convolutions refuse: one row of zeros instead.

    Args:
        batch: {name: tensor (B, ...)}.

    Returns:
        (B as it was, the batch): weigh what comes of the batch by B.
    """
    rows = tf.shape(tf.nest.flatten(batch)[0])[0]
    missing = tf.maximum(1 - rows, 0)
    return rows, {
        name: tf.pad(value, [[0, missing]] + [[0, 0]] * (value.shape.rank - 1)) for name, value in batch.items()
    }


def random_rows(flat, count, seed):
    """Rows drawn at random from those of all replicas, the same ones everywhere: flat (N, D) -> (count, D).

    Args:
        flat: (N, D), this replica's contiguous part of the rows.
        count: number of rows to draw; one may come twice.
        seed: two integers.
    """
    everywhere = tf.shape(flat)[0] * tf.distribute.get_replica_context().num_replicas_in_sync
    picks = tf.random.stateless_uniform((count,), seed, 0, everywhere, dtype=tf.int32)
    return sum_over_replicas(pick_rows(flat, picks))


def accumulated(learn, batch, parts, variables):
    """The loss and the gradients of a batch that goes through the network in parts, for less memory.

    Args:
        learn: callable (*part of the batch) -> (loss, gradients of the variables), both of which add up.
        batch: nest of tensors (B, ...).
        parts: their number; divides B.
        variables: what the gradients are of.

    Returns:
        (loss, gradients), summed over the parts.
    """
    if parts == 1:
        return learn(*batch)
    split = tf.nest.map_structure(lambda value: rearrange(value, "(k b) ... -> k b ...", k=parts), batch)

    def add(i, sums):
        more = learn(*tf.nest.map_structure(lambda value: value[i], split))
        return i + 1, tf.nest.map_structure(tf.add, sums, more)

    nothing = (0.0, [tf.zeros(v.shape, v.dtype) for v in variables])
    # strictly one after the other: side by side they would need the memory of the whole batch
    _, sums = tf.while_loop(lambda i, _: i < parts, add, (0, nothing), parallel_iterations=1)
    return sums


def pick_rows(flat, indices):
    """Rows of the global batch of which each replica holds one contiguous part; the same on all replicas.

    Each replica contributes the rows that it holds and zeros for the others: sum the result with `sum_over_replicas`.

    Args:
        flat: (N, D), this replica's rows.
        indices: (K,) int32 in [0, N * replicas).
    """
    rows = tf.shape(flat)[0]
    local = indices - tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int32) * rows
    mine = (local >= 0) & (local < rows)
    return tf.where(mine[:, None], tf.gather(flat, tf.clip_by_value(local, 0, rows - 1)), 0.0)


def set_precision(name="auto"):
    """Set the Keras precision policy, and say which it is.

    "auto" takes the 16 bits that the hardware multiplies fast: mixed_bfloat16 on GPUs of compute capability 8 and above
    (and those that do not say theirs), and on processors with AMX or AVX512-BF16; mixed_float16 on GPUs from 7 on, that
    have no bfloat16 (V100, T4, RTX 20), and there losses are scaled (`ldm.training.optimizers`); float32 elsewhere. Of
    several GPUs the oldest decides.

    Args:
        name: "auto" or a Keras policy name.

    Returns:
        The policy's name.
    """
    if name == "auto":
        name = _fast_policy()
    keras.mixed_precision.set_dtype_policy(name)
    return name


def _fast_policy():
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
        oldest = min(tuple(about.get("compute_capability") or (8, 0)) for about in details)
        return "mixed_bfloat16" if oldest >= (8, 0) else "mixed_float16" if oldest >= (7, 0) else "float32"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return "float32"
    return "mixed_bfloat16" if "amx_bf16" in flags or "avx512_bf16" in flags else "float32"
