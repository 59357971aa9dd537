"""ldm/training/planning.py: what `--minutes` plans fits into the minutes, by a clock of the test's own."""

from types import SimpleNamespace

import pytest

import dataset
import plans
import train
from ldm.training import planning, records, runs
from ldm.training import settings as schema
from ldm.training.planning import Budget, Speed, Stopwatch, plan

NOBODY = {  # what a run says of its data
    **{"source": "x.zip", "kind": "oasis", "images": 0, "labels": [], "z": [0, 0]},
    "splits": {split: {"people": 0, "images": 0, "cases": []} for split in dataset.SPLITS},
}


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


@pytest.mark.parametrize("left", [120.0, 270.0, 3600.0])
@pytest.mark.parametrize("speed", [Speed(8.0, 0.05, 0.002), Speed(25.0, 0.9, 0.02)], ids=["fast", "slow"])
def test_what_is_planned_takes_the_time_that_there_is(left, speed):
    epochs, steps = plan(left, speed, epochs=20, at_end=500, afterwards=1000)
    end = planning.SAVING + 500 * speed.row
    took = speed.compilation + epochs * (steps * speed.step + end) + 1000 * speed.row
    assert took <= left and took > left - epochs * speed.step - 1e-6
    assert epochs == 1 or epochs * end <= planning.VALIDATION * left
    assert epochs <= 20


def test_twice_the_time_is_more_than_twice_the_steps():
    speed = Speed(20.0, 0.1, 0.001)
    few, many = (plan(left, speed, epochs=10, at_end=100) for left in (300.0, 600.0))
    assert many[0] * many[1] > 2 * few[0] * few[1]


def test_too_little_time_is_refused_with_what_is_needed():
    with pytest.raises(runs.RunError, match="leaves 0.5 minutes .* needs 1.0 on this machine.*give 3 minutes more"):
        plan(30.0, Speed(50.0, 1.0, 0.01), epochs=5, at_end=500)


def test_minutes_that_are_over_are_refused_before_anything_is_timed(tmp_path):
    """The reading of a large archive counts. Latents go on, with one view, so that no first stage was in vain."""
    settings = resolved("--run", tmp_path / "run")
    with pytest.raises(runs.RunError, match="over before the autoencoder stage began, by 1.5 minutes: give more"):
        plans.planned("autoencoder", tmp_path / "run", settings, None, None, Budget(-1.5, ["autoencoder"]))


def test_the_stages_share_the_minutes_that_are_left():
    clock, stages = Clock(), runs.STAGES[:3]
    budget = Budget(10, stages, clock=clock)
    assert [budget.left(stage) for stage in stages] == pytest.approx([240.0, 50.0, 600.0])
    clock.now += 200.0  # the first stage took less than its 240 seconds
    assert budget.left("diffusion") == pytest.approx(400.0)
    clock.now += 100.0  # it took longer: the next one has less, not nothing
    assert budget.left("latents") == pytest.approx(300.0 * 0.05 / 0.6)
    assert Budget(10, ("diffusion",), clock=clock).left("diffusion") == pytest.approx(600.0)
    # gone on with: the first stage's share is spent, whenever that was; what passed since the command began counts
    later = Budget(10, stages, finished=("autoencoder",), began=clock.now - 5.0, clock=clock)
    assert later.left("diffusion") == pytest.approx(600.0 - 240.0 - 5.0)


def test_what_the_latents_need_is_kept_for_them():
    """Of a large archive each slice is encoded once at least, however few steps there is time for."""
    budget = Budget(10, runs.STAGES[:3], clock=Clock())
    budget.needs["latents"] = 20.0  # less than its share
    assert budget.left("autoencoder") == pytest.approx(240.0)
    budget.needs["latents"] = 220.0
    assert budget.left("autoencoder") == pytest.approx((600.0 - 220.0) * 0.4 / 0.95)
    assert budget.left("latents") == pytest.approx(220.0) and budget.left("diffusion") == 600.0
    late = Budget(1, runs.STAGES[:3], clock=Clock())
    late.needs["latents"] = 220.0
    assert late.left("latents") == pytest.approx(60.0), "more than there is cannot be had"


def test_a_first_stage_says_what_the_latents_need(monkeypatch, tmp_path):
    monkeypatch.setattr(plans, "subject", lambda *_: (None, None, None))
    monkeypatch.setattr(plans.stages, "compile_for_training", lambda *_: None)
    monkeypatch.setattr(planning, "measure", lambda *_: Speed(10.0, 0.5, row))
    source = SimpleNamespace(select=lambda split: range({"train": 18_000, "validate": 2_000}[split]))
    budget = Budget(20, runs.STAGES[:3], clock=Clock())
    given = ("autoencoder", None, resolved("--run", tmp_path / "run"), source, None, budget)
    row = 0.02  # seconds of a validated slice; encoding takes half of that
    epochs, steps = plans.trained(*given)
    assert budget.needs == {"latents": pytest.approx(0.5 * row * 20_000)}
    assert epochs * steps * 0.5 < (1200 - 200) * 0.4 / 0.95
    row, clock = 1e-6, iter([1000.0, 1060.0])  # timing took a minute, which is this stage's
    monkeypatch.setattr(plans.time, "time", lambda: next(clock))
    budget.needs.clear()
    epochs, steps = plans.trained(*given)
    assert 1200 * 0.4 - 60 - 10 - 3 * epochs < epochs * steps * 0.5 < 1200 * 0.4 - 60 - 10


def test_the_stopwatch_leaves_the_first_batch_of_each_out_and_stops_when_it_has_seen_enough():
    clock = Clock()
    watch = Stopwatch(seconds=2.0, clock=clock)
    watch.set_model(SimpleNamespace(stop_training=False, stop_evaluating=False))
    watch.on_train_begin()
    for seconds in (30.0, 0.5, 0.5, 0.5):
        clock.now += seconds
        watch.on_train_batch_end(0)
        assert not watch.model.stop_training
    clock.now += 0.5
    watch.on_train_batch_end(0)
    assert watch.model.stop_training and not watch.model.stop_evaluating
    clock.now += 7.0  # between training and validation
    watch.on_test_begin()
    for seconds in (10.0, 0.4):  # all the batches that there are
        clock.now += seconds
        watch.on_test_batch_end(0)
    assert watch.speed(batch_size=8) == pytest.approx((30.0 - 0.5 + 10.0 - 0.4, 0.5, 0.05))


# ---- the command -----------------------------------------------------------------------------------------------------


def resolved(*argv):
    return train.resolve(train.parser().parse_args([str(word) for word in argv]))[2]


def test_a_run_is_planned_where_minutes_are_given(tmp_path):
    run = ["--run", tmp_path / "run"]
    for said in (["--epochs", 3], ["--steps-per-epoch", 3], ["--views", 2], ["--preset", "oasis-256"]):
        assert resolved(*run, *said)["minutes"] is None
    assert resolved(*run)["minutes"] == 9.5, "phantoms, where nobody says anything"
    settings = schema.merged(resolved(*run), {"minutes": 7.0})
    records.write(tmp_path / "run", "autoencoder", settings, NOBODY, finished=False)
    assert resolved(*run)["minutes"] == 7
    assert resolved(*run, "--epochs", 3)["minutes"] is None, "who says what it plans does without"
    assert resolved(*run, "--data", "x.zip", "--minutes", 7)["minutes"] == 7
    with pytest.raises(runs.RunError, match="--minutes plans --epochs: leave one of them out"):
        resolved(*run, "--epochs", 3, "--minutes", 2)


def test_a_plan_is_kept_by_whoever_goes_on_with_the_run(tmp_path):
    plan = {"epochs": 7, "steps_per_epoch": 31, "planned": True}
    for said in ([], ["--preset", "phantom"], ["--minutes", 10]):
        settings = schema.merged(
            resolved("--run", tmp_path / "run"), {"autoencoder": plan, "latents": {"views": 1, "planned": True}}
        )
        for stage in ("autoencoder", "latents"):
            records.write(tmp_path / "run", stage, settings, NOBODY, finished=stage == "autoencoder", epochs=7)
        again = resolved("--run", tmp_path / "run", *said)
        assert {key: again["autoencoder"][key] for key in plan} == plan
        assert again["latents"]["views"] == 1 and not again["diffusion"]["planned"]
        assert records.is_finished(tmp_path / "run", "autoencoder", again)
    longer = resolved("autoencoder", "--run", tmp_path / "run", "--preset", "phantom", "--epochs", 9)["autoencoder"]
    assert longer["epochs"] == 9 and longer["steps_per_epoch"] == 31, "more epochs of as many steps"
    said = ["diffusion", "--run", tmp_path / "run", "--preset", "phantom", "--epochs", 3, "--steps-per-epoch", 5]
    second = resolved(*said)  # says nothing of the first stage, which a plan has trained
    assert {key: second["autoencoder"][key] for key in plan} == plan
    assert (second["diffusion"]["epochs"], second["diffusion"]["steps_per_epoch"]) == (3, 5)
