"""How our models report on an epoch: which numbers, averaged over what, in training and in validation."""

import functools

import tensorflow as tf
from keras import ops

from ldm.training import distribution


def leaves_no_trace(train_step):
    """A training step that, where float16 overflows, leaves everything as it was: codebook, counts, metrics.

    `optimizers.FusedAdamW` skips the step of the weights and of their average by itself. Where there is a
    `discriminator_optimizer` as well, metrics count a step that neither has skipped. A scale below 1 says that smaller
    ones do not help: the gradient's norm then becomes NaN, which ends the training.
    """

    @functools.wraps(train_step)
    def step(self, batch):
        if not getattr(self.optimizer, "scaled", False):
            return train_step(self, batch)
        optimizers = [self.optimizer, getattr(self, "discriminator_optimizer", self.optimizer)]
        counted = [variable for metric in self.metrics for variable in metric.variables]
        known = {id(variable) for variable in counted}
        kept = [variable for variable in self.non_trainable_variables if id(variable) not in known]
        before = [tf.identity(variable.value) for variable in (*kept, *counted)]
        skipped = [tf.identity(optimizer.skipped.value) for optimizer in optimizers]
        train_step(self, batch)
        finite = [
            tf.equal(optimizer.skipped.value, count) for optimizer, count in zip(optimizers, skipped, strict=True)
        ]
        for place, (variable, old) in enumerate(zip((*kept, *counted), before, strict=True)):
            stays = finite[0] if place < len(kept) else tf.reduce_all(finite)
            variable.assign(tf.where(stays, variable.value, old))
        logs = self.report(training=True)
        hopeless = tf.convert_to_tensor(self.optimizer.loss_scale) < 1.0
        logs["gradient_norm"] = tf.where(hopeless, float("nan"), logs["gradient_norm"])
        return distribution.for_logs(logs)

    return step


class Reports:
    """A model with a `train_step` of its own, whose logs are means over the epoch's examples on all replicas.

    `record` feeds its `trackers`, {name: keras.metrics.Mean}; other metrics, such as those of a bottleneck, it feeds
    itself.
    """

    # `for_use` and `learned` are methods because Keras saves whatever it finds in a model's properties.
    only_training = ("gradient_norm",)  # names of metrics that validation has nothing to say about
    only_validation = ()

    def for_use(self):
        """The model that is kept when training is over."""
        return self

    def learned(self):
        """The variables that the optimizer moves."""
        return self.trainable_variables

    def compile(self, optimizer, **options):
        super().compile(optimizer=optimizer, auto_scale_loss=False, **options)  # float16: our optimizers have a scale
        optimizer.build(self.learned())

    def record(self, values, rows=1):
        """Feed {name: mean over a batch} to the trackers, weighted by the number of examples."""
        for name, value in values.items():
            self.trackers[name].update_state(value, sample_weight=ops.cast(rows, "float32"))

    def report(self, training):
        """What every metric of the phase says so far: {name: scalar}."""
        absent = self.only_validation if training else self.only_training
        return {metric.name: metric.result() for metric in self.metrics if metric.name not in absent}

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Our models are built before `fit`; Keras' attempt to build them fails with several workers (Keras 3.15)."""

    def get_metrics_result(self):
        """The metrics of the phase, added up over replicas; Keras uses them where the names are those of the step."""
        (norm,) = (metric for metric in self.metrics if metric.name == "gradient_norm")
        return self.report(training=float(ops.convert_to_numpy(norm.count)) > 0)
