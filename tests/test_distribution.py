"""ldm/training/distribution.py: what runs on N replicas must equal one replica at the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import dataset
from ldm.batches import untuned
from ldm.training import distribution

ROOT = Path(__file__).parents[1]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def everywhere(replicas, function, *arrays):
    """Run `function` on each replica with its contiguous rows of the arrays; the list of the replicas' results."""
    strategy = distribution.make_strategy(replicas)

    def rows(array):
        parts = np.split(np.asarray(array), replicas)
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[context.replica_id_in_sync_group])
        )

    results = tf.function(lambda *values: strategy.run(function, values))(*map(rows, arrays))
    return [[np.asarray(part) for part in strategy.experimental_local_results(r)] for r in tf.nest.flatten(results)]


def test_strategy_has_as_many_replicas_as_asked_for():
    assert distribution.make_strategy().num_replicas_in_sync == 1
    assert distribution.make_strategy(1).num_replicas_in_sync == 1
    assert distribution.make_strategy(2).num_replicas_in_sync == 2


def test_who_lets_go_of_a_stream_does_not_wait_for_its_tuning():
    """Neither for that of the dataset nor for those of the streams that a strategy makes of it, one for each device."""
    numbers = tf.data.Dataset.range(8).batch(2).with_options(untuned())
    stream = iter(distribution.make_strategy(2).experimental_distribute_dataset(numbers))._iterators[0]
    assert stream._dataset.options().autotune.enabled is False
    parts = stream._iterator._device_iterators
    assert [part._dataset.options().autotune.enabled for part in parts] == [False, False]


def test_more_replicas_than_devices_are_refused():
    with pytest.raises(ValueError, match="--replicas 64 asks for more"):
        distribution.make_strategy(64)


def steps_with(replicas, x, y, clip_norm, optimizer):
    """Three steps of linear regression; the weights and the norms reported."""
    strategy = distribution.make_strategy(replicas)
    with strategy.scope():
        weights = keras.Variable(normal(4, 1, seed=7), name="w")
        optimizer = optimizer()
        optimizer.build([weights])

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = distribution.replica_loss(tf.reduce_mean((x @ weights - y) ** 2))
        gradients = tape.gradient(loss, [weights.value])
        return distribution.apply_gradients(optimizer, gradients, [weights], clip_norm)

    parts = [np.split(array, replicas) for array in (x, y)]
    x, y = (
        strategy.experimental_distribute_values_from_function(
            lambda context, p=p: tf.constant(p[context.replica_id_in_sync_group])
        )
        for p in parts
    )
    run = tf.function(lambda: strategy.run(step, (x, y)))
    norms = [[np.asarray(n) for n in strategy.experimental_local_results(run())] for _ in range(3)]
    return np.asarray(weights), np.asarray(norms)


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "adamw": lambda: keras.optimizers.AdamW(0.1, epsilon=1e-2, weight_decay=0.1),  # a large epsilon feels the scale
}


@pytest.mark.parametrize("clip_norm", [None, 0.5, 1e6], ids=["no clipping", "clipping", "clipping that is not reached"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_two_replicas_step_where_one_does(optimizer, clip_norm):
    x, y = normal(8, 4), normal(8, 1, seed=1)
    x[4:] *= 3.0  # the halves have different gradients: clipping each would turn the sum
    one, norms_of_one = steps_with(1, x, y, clip_norm, optimizer)
    two, norms_of_two = steps_with(2, x, y, clip_norm, optimizer)
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norms_of_two, np.repeat(norms_of_one, 2, axis=1), rtol=1e-5)
    assert norms_of_one[0, 0] > 1.0  # so that the clipping at 0.5 was active


def test_one_step_is_gradient_descent_with_the_norm_clipped():
    x, y, start = normal(8, 4), normal(8, 1, seed=1), normal(4, 1, seed=7)
    gradient = 2.0 * x.T @ (x @ start - y) / 8
    norm = np.linalg.norm(gradient)
    _, norms = steps_with(1, x, y, 0.5, OPTIMIZERS["sgd"])
    np.testing.assert_allclose(norms[0, 0], norm, rtol=1e-5)  # as it was before clipping

    weights = keras.Variable(start)
    optimizer = keras.optimizers.SGD(0.1)
    distribution.apply_gradients(optimizer, [tf.constant(gradient)], [weights], 0.5)
    np.testing.assert_allclose(weights, start - 0.1 * 0.5 * gradient / norm, atol=1e-6)


def test_replica_losses_add_up_to_the_global_mean():
    loss = normal(8)
    (parts,) = everywhere(2, lambda part: distribution.replica_loss(tf.reduce_mean(part)), loss)
    np.testing.assert_allclose(np.sum(parts), loss.mean(), rtol=1e-5)


@pytest.mark.parametrize("replicas", [1, 2])
def test_sums_over_replicas_are_the_same_on_each(replicas):
    x = normal(8, 3)
    sums, ones = everywhere(
        replicas, lambda part: distribution.sum_over_replicas((tf.reduce_sum(part, 0), tf.ones(2))), x
    )
    for total, count in zip(sums, ones, strict=True):
        np.testing.assert_allclose(total, x.sum(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(count, [replicas, replicas])


def test_global_rows_are_the_same_noise_on_one_replica_and_two():
    def noise(part):
        return distribution.global_rows(lambda n: tf.random.stateless_normal((n, 3), (1, 2)), tf.shape(part)[0])

    (one,), (two,) = everywhere(1, noise, normal(8)), everywhere(2, noise, normal(8))
    assert [part.shape for part in two] == [(4, 3), (4, 3)]
    np.testing.assert_array_equal(np.concatenate(two), one[0])
    assert np.abs(two[0] - two[1]).max() > 0.1


def test_normal_noise_is_one_draw_for_the_global_batch():
    def noise(part):
        return distribution.normal((tf.shape(part)[0], 3), (1, 2))

    (one,), (two,) = everywhere(1, noise, normal(8)), everywhere(2, noise, normal(8))
    np.testing.assert_array_equal(one[0], tf.random.stateless_normal((8, 3), (1, 2)))
    np.testing.assert_array_equal(np.concatenate(two), one[0])


def test_random_rows_are_the_same_on_one_replica_and_on_each_of_two():
    flat = normal(8, 3)

    def pick(part, seed=(3, 4)):
        return distribution.random_rows(part, 64, seed)

    (one,), (two,) = everywhere(1, pick, flat), everywhere(2, pick, flat)
    for picked in two:
        np.testing.assert_array_equal(picked, one[0])
    assert len(np.unique(one[0], axis=0)) == 8 and {tuple(row) for row in one[0]} == {tuple(row) for row in flat}
    ((other,),) = everywhere(1, lambda part: pick(part, (3, 5)), flat)
    assert np.abs(other - one[0]).max() > 0.1


def test_a_batch_in_parts_has_the_loss_and_the_gradient_of_the_whole_and_never_more_than_a_part_at_a_time():
    weight, x, seen = tf.Variable(normal(3)), tf.constant(normal(12, 3)), []

    def learn(part, parts):
        seen.append(part.shape[0])
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(tf.linalg.matvec(part, weight))) / parts
        return loss, [tape.gradient(loss, weight)]

    whole = distribution.accumulated(lambda part: learn(part, 1), (x,), 1, [weight])
    again = distribution.accumulated(lambda part: learn(part, 4), (x,), 4, [weight])
    assert seen[0] == 12 and set(seen[1:]) == {3}
    np.testing.assert_allclose(again[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(again[1][0], whole[1][0], rtol=1e-5)


@pytest.mark.parametrize("replicas", [1, 2])
def test_picked_rows_are_those_of_the_global_batch(replicas):
    flat, picks = normal(8, 3), np.array([7, 0, 3, 4, 4])

    def pick(part):
        return distribution.sum_over_replicas(distribution.pick_rows(part, tf.constant(picks, tf.int32)))

    (results,) = everywhere(replicas, pick, flat)
    for result in results:
        np.testing.assert_array_equal(result, flat[picks])


@pytest.mark.parametrize("replicas", [1, 2])
def test_gathered_rows_are_the_global_batch_in_order_and_own_rows_take_them_apart(replicas):
    x = normal(8, 3)

    def there_and_back(part):
        everyone = distribution.gather_rows(part)
        return everyone, distribution.own_rows(everyone, tf.shape(part)[0])

    gathered, own = everywhere(replicas, there_and_back, x)
    for whole in gathered:
        np.testing.assert_array_equal(whole, x)
    np.testing.assert_array_equal(np.concatenate(own), x)


@pytest.mark.parametrize("replicas", [1, 2])
def test_moments_are_those_of_the_global_batch(replicas):
    x = 3.0 * normal(8, 5, 3) + np.arange(3, dtype="float32")
    means, deviations = everywhere(replicas, distribution.moments, x)
    for mean, deviation in zip(means, deviations, strict=True):
        np.testing.assert_allclose(mean, x.mean((0, 1)), rtol=1e-4)
        np.testing.assert_allclose(deviation, x.std((0, 1)), rtol=1e-4)


def test_an_empty_part_of_a_batch_gets_one_row_of_zeros_and_others_stay_as_they_are():
    batch = {"image": normal(3, 2, 2, 1), "z": np.array([4, 5, 6], "int32")}
    for rows in (0, 1, 3):
        part = {name: tf.constant(value[:rows]) for name, value in batch.items()}
        count, found = distribution.at_least_one_row(part)
        assert int(count) == rows and {name: value.dtype for name, value in found.items()} == {
            name: value.dtype for name, value in part.items()
        }
        for name, value in batch.items():
            expected = value[:rows] if rows else np.zeros_like(value[:1])
            np.testing.assert_array_equal(found[name], expected)


def test_what_is_logged_has_an_axis_to_average_along_on_several_machines_only(monkeypatch):
    values = {"loss": tf.constant(2.0)}
    assert distribution.for_logs(values) is values
    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", type(tf.distribute.get_strategy()))
    assert distribution.for_logs(values)["loss"].numpy().tolist() == [2.0]


def test_each_host_makes_its_own_rows_and_each_replica_gets_its_part_of_them(monkeypatch):
    """As one of one host with two replicas, which is all that one machine can be: halves of each batch, in order."""
    strategy, asked = distribution.make_strategy(2), []

    def stream(share):
        asked.append(share)
        rows = tf.data.Dataset.range(24).batch(4, drop_remainder=True)
        return rows.map(lambda n: {"image": n}).with_options(untuned())

    plain = distribution.own_share(strategy, stream)
    assert isinstance(plain, tf.data.Dataset) and asked == [(0, 1)]
    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", type(strategy))
    shared = distribution.own_share(strategy, stream)
    assert isinstance(shared, tf.distribute.DistributedDataset) and asked == [(0, 1)] * 2
    for one, parts in zip(plain, shared, strict=True):
        parts = strategy.experimental_local_results(parts["image"])
        assert [part.numpy().tolist() for part in parts] == [
            one["image"][:2].numpy().tolist(),
            one["image"][2:].numpy().tolist(),
        ]


def test_of_two_hosts_with_two_replicas_each_makes_its_half_in_the_parts_of_its_replicas(monkeypatch):
    class Hosts:
        def distribute_datasets_from_function(self, made):
            return [made(tf.distribute.InputContext(2, host, 4)) for host in range(2)]

    def stream(share):
        part, parts = share
        return tf.data.Dataset.from_tensors({"image": tf.range(8)[part * 8 // parts : (part + 1) * 8 // parts]})

    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", Hosts)
    found = [
        [batch["image"].tolist() for batch in host.as_numpy_iterator()]
        for host in distribution.own_share(Hosts(), stream)
    ]
    assert found == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_precision_that_is_named_is_set():
    assert distribution.set_precision("mixed_bfloat16") == "mixed_bfloat16"
    assert keras.mixed_precision.dtype_policy().compute_dtype == "bfloat16"
    assert distribution.set_precision("float32") == "float32"
    assert keras.mixed_precision.dtype_policy().compute_dtype == "float32"


@pytest.mark.parametrize(
    ("flags", "policy"),
    [("fpu sse avx2 avx512f", "float32"), ("avx512_bf16", "mixed_bfloat16"), ("fpu amx_bf16", "mixed_bfloat16")],
)
def test_precision_follows_the_processor(flags, policy, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags : {flags}\n")
    assert distribution.set_precision("auto") == policy
    assert keras.mixed_precision.dtype_policy().name == policy


def test_precision_is_float32_where_the_processor_cannot_be_asked(monkeypatch):
    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert distribution.set_precision() == "float32"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("diffusion", "--autoencoder none --multipliers 1 2 --attention 16 --width 16 --head-size 16"),
        ("autoencoder", "--autoencoder-width 16 --num-codes 32"),
    ],
)
def test_two_machines_train_as_one(stage, flags, tmp_path):
    """Two processes under TF_CONFIG, each a worker, end with the losses of one process at the same global batch."""
    archive = tmp_path / "phantom.zip"
    dataset.write_phantoms(archive, people=4, image_size=32)
    flags += " --image-size 32 --epochs 1 --steps-per-epoch 2 --batch-size 4 --precision float32"
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            ports.append(f"localhost:{free.getsockname()[1]}")

    def start(run, config=None):
        environment = os.environ | ({"TF_CONFIG": json.dumps(config)} if config else {})
        command = [sys.executable, ROOT / "train.py", stage, "--data", archive, "--run", tmp_path / run, *flags.split()]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    workers = [
        start("two", {"cluster": {"worker": ports}, "task": {"type": "worker", "index": index}}) for index in range(2)
    ]
    try:
        for process in (*workers, start("one")):
            assert process.wait(timeout=300) == 0
    finally:
        for process in workers:  # one that has lost its peer would wait for ever
            process.kill()
    one, two = (np.genfromtxt(tmp_path / run / f"{stage}.csv", delimiter=",", names=True) for run in ("one", "two"))
    for name in ("loss", "val_loss", "gradient_norm"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4)
