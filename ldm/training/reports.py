"""How our models report on an epoch: which numbers, averaged over what, in training and in validation."""

from keras import ops


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
        super().compile(optimizer=optimizer, **options)
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
