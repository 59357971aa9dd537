"""The optimizer's average, and the callbacks, are what they say."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest

from ldm.judging import fidelity
from ldm.training import callbacks, runs


def test_averaged_weights_look_back_over_a_tenth_of_the_first_steps():
    optimizer = callbacks.make_optimizer(0.1, steps=1000, averaged=True)
    weight, average = keras.Variable([1.0]), None
    for i in range(30):
        optimizer.apply([keras.ops.ones((1,))], [weight])
        value = float(weight.value.numpy()[0])
        momentum = min(1.0 - 1.0 / 50.0, (1.0 + i) / (10.0 + i)) if i else 0.0
        average = value if average is None else momentum * average + (1.0 - momentum) * value
        assert float(optimizer._model_variables_moving_average[0].numpy()[0]) == pytest.approx(average, rel=1e-5)


@pytest.mark.parametrize("averaged", [True, False])
def test_the_learning_rate_warms_up_to_its_peak_and_decays_to_a_fiftieth(averaged):
    optimizer = callbacks.make_optimizer(0.1, steps=1000, averaged=averaged)
    rates = []
    for step in range(1001):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    assert rates[0] == pytest.approx(0.001) and rates[100] == pytest.approx(0.1)
    assert rates[1000] == pytest.approx(0.002)
    assert np.all(np.diff(rates[:101]) > 0) and np.all(np.diff(rates[100:]) < 0)


@pytest.mark.parametrize("averaged", [True, False])
def test_weights_without_a_gradient_decay(averaged):
    optimizer, weight = callbacks.make_optimizer(0.1, steps=10, averaged=averaged), keras.Variable([1.0])
    optimizer.iterations.assign(1)  # of 10 steps the first is the warm-up
    optimizer.apply([keras.ops.zeros((1,))], [weight])
    assert 1.0 - float(weight.value.numpy()[0]) == pytest.approx(0.1 * 1e-4, rel=0.02)


@pytest.mark.parametrize(
    "past, then, epochs, stops",
    [
        ([], [3.0, 2.0, 2.5, 2.4], 2, [False, False, False, True]),
        ([2.0, 3.0], [2.5, 1.0], 2, [True, False]),  # gone on with: what came before counts
        ([1.0, 3.0, 3.0], [3.0], None, [False]),
    ],
)
def test_patience_counts_the_epochs_since_the_least_loss(past, then, epochs, stops):
    patience = callbacks.Patience(past, "val_loss", epochs)
    said = []
    for value in then:
        patience.set_model(SimpleNamespace(stop_training=False))
        patience.on_epoch_end(0, {"val_loss": value})
        said.append(patience.model.stop_training)
    assert said == stops
    assert callbacks.Patience([1.0, 2.0, 2.0], "val_loss", 2).spent and not callbacks.Patience([], "val_loss", 2).spent


def test_a_loss_that_is_no_number_stops_the_training_with_a_sentence(tmp_path):
    watch = callbacks.StopAtNaN(tmp_path, "diffusion")
    watch.on_train_batch_end(3, {"loss": 1.0, "gradient_norm": 2.0})
    for bad in ({"loss": float("nan"), "gradient_norm": 2.0}, {"loss": 1.0, "gradient_norm": float("inf")}):
        with pytest.raises(runs.RunError, match="--learning-rate"):
            watch.on_train_batch_end(3, bad)


def test_kid_is_measured_now_and_then_and_ranks_epochs(tmp_path, monkeypatch):
    """Samples like the validation slices have a KID around 0, others more; a measured epoch beats all unmeasured."""
    rng = np.random.default_rng(0)
    real = rng.random((40, 4, 4, 1))
    drawn = {"model": real + 1.0}
    monkeypatch.setattr(callbacks.runs, "copy_for_use", lambda model, copy=None: model)
    kid = callbacks.Kid(
        lambda model: lambda: drawn["model"],
        describe=lambda images: images.reshape(40, -1),
        distance=fidelity.kernel_distance,
        real=real,
        every=2,
    )
    kid.set_params({"epochs": 3})
    rows = [{"epoch": epoch, "val_loss": 3.0 - epoch} for epoch in range(3)]
    for epoch, row in enumerate(rows):
        drawn["model"] = rng.random((40, 4, 4, 1)) + (1.0 if epoch < 2 else 0.0)
        kid.on_epoch_end(epoch, row)
    assert np.isnan(rows[0]["val_kid"]) and rows[1]["val_kid"] > 1.0 and abs(rows[2]["val_kid"]) < 0.5
    rank = callbacks.Checkpoint(tmp_path, "diffusion", "val_loss").rank
    assert rank(rows[2]) < rank(rows[1]) < rank(rows[0])
    assert rank({"val_loss": 1.0}) < rank({"val_loss": 2.0})


def test_the_codes_of_an_epoch_are_written_down_and_drawn(tmp_path):
    drawn = []
    usage = {
        "usage_foreground": SimpleNamespace(counts=np.array([0.0, 3.0, 0.0])),
        "usage_background": SimpleNamespace(counts=np.array([0.0, 1.0, 2.0])),
    }
    health = callbacks.CodebookHealth(tmp_path, usage, lambda **counts: drawn.append(counts))
    health.on_test_begin()
    usage["usage_foreground"].counts = np.zeros(3)  # reset, by the time that the epoch ends
    health.on_epoch_end(4)
    counts = {"foreground": [0, 3, 0], "background": [0, 1, 2]}
    assert drawn == [counts]
    assert runs.load_json(tmp_path / "codebook.json") == {"epoch": 5, "dead": [0], **counts}


def test_a_decay_without_an_end_knows_no_end():
    """The rate is peak / sqrt(i / KNEE) behind the knee, and neither rate nor average depend on the planned steps."""
    short, long = (callbacks.make_optimizer(0.1, steps, averaged=True, decay="inverse_sqrt") for steps in (40, 40_000))
    for done, rate in ((0, 0.1 / 200), (199, 0.1), (1000, 0.1), (4000, 0.05), (100_000, 0.01)):
        for optimizer in (short, long):
            optimizer.iterations.assign(done)
            assert float(optimizer.learning_rate) == pytest.approx(rate)
            assert float(optimizer.ema_momentum) == pytest.approx((1 + done) / (10 + done))


def test_the_average_weighs_a_step_by_its_eighth_power():
    """arXiv 2312.02696, eq. 2: of weights that grow as i, it is (gamma + 1) / (gamma + 2) of the last."""
    optimizer, average = callbacks.make_optimizer(0.1, 10, averaged=True, decay="inverse_sqrt"), 0.0
    for i in range(3000):
        optimizer.iterations.assign(i)
        momentum = float(optimizer.ema_momentum) if i else 0.0
        average = momentum * average + (1 - momentum) * i
    assert average / 3000 == pytest.approx(9 / 10, abs=2e-3)
