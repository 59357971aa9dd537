"""AdamW as one fused operation per variable: a training step that is traced sooner, and runs faster in less memory.

Keras writes each variable's update out in some hundred nodes of the graph, among them the schedule of the learning
rate and the powers of both betas, which are the same for all. Here these are computed once, and the update of a
variable, of its two moments and of its average are an operation each. The numbers, the names and the checkpoints are
those of `keras.optimizers.AdamW`.

Under the policy mixed_float16, whose smallest numbers are soon reached by gradients, losses are multiplied by a scale
that is found as training goes (arXiv 1710.03740, section 3.2): see `scaled`.
"""

import functools

import keras
import tensorflow as tf

FIRST_SCALE, MOST_SCALE = 2.0**15, 2.0**24
CALM = 2000  # steps without an overflow, after which the scale is doubled


class FusedAdamW(keras.optimizers.AdamW):
    """AdamW (arXiv 1711.05101), the same steps as Keras' own; of its options, none that clips, scales or accumulates.

    Attributes:
        scaled: whether it was made under mixed_float16. Then `loss_scale` is what losses are to be multiplied by, and
            `step_if` leaves everything as it is where gradients overflow, but for the scale, which is halved, and the
            count of `skipped` steps. These three are in its checkpoints.

    Raises:
        ValueError: for one of those options.
    """

    def __init__(self, learning_rate, **options):
        super().__init__(learning_rate, **options)
        unknown = ("amsgrad", "clipnorm", "clipvalue", "global_clipnorm", "gradient_accumulation_steps")
        for name in (*unknown, "ema_overwrite_frequency", "loss_scale_factor"):
            if getattr(self, name):
                raise ValueError(f"FusedAdamW has no {name}: take keras.optimizers.AdamW")
        self.scaled = keras.mixed_precision.dtype_policy().name == "mixed_float16"
        self._finite = None  # whether the gradients of the step that is being traced are, a boolean

    def build(self, variables):
        super().build(variables)
        if self.scaled and not hasattr(self, "loss_scale"):
            for name, first in {"loss_scale": FIRST_SCALE, "calm": 0.0, "skipped": 0.0}.items():
                options = {"dtype": "float32", "trainable": False, "name": name, "aggregation": "only_first_replica"}
                setattr(self, name, keras.Variable(first, **options))

    def load_own_variables(self, store):
        """Also those of a checkpoint with or without the scale of float16, which comes last: see `scaled`."""
        for i, variable in enumerate(self.variables[: len(store.keys())]):
            variable.assign(store[str(i)])

    def step_if(self, finite, gradients, variables):
        """Step with these gradients where they are finite (a boolean, the same on all replicas), or skip the step."""
        self._finite = finite
        self.apply([tf.where(finite, gradient, 0.0) for gradient in gradients], variables)
        self._finite = None
        kept = tf.cast(finite, tf.float32)
        self.iterations.assign_sub(tf.cast(1.0 - kept, self.iterations.dtype))
        self.skipped.assign_add(1.0 - kept)
        calm = kept * (self.calm + 1.0)
        change = tf.where(finite, tf.where(calm < CALM, 1.0, 2.0), 0.5)
        self.loss_scale.assign(tf.minimum(self.loss_scale * change, MOST_SCALE))
        self.calm.assign(tf.where(calm < CALM, calm, 0.0))

    def _backend_apply_gradients(self, grads, trainable_variables):
        """Sum the gradients over replicas and step everywhere: what `apply` does between two counts of the steps."""
        variables = [variable.value for variable in trainable_variables]
        pairs = self._all_reduce_sum_gradients(zip(grads, variables, strict=True))
        tf.__internal__.distribute.interim.maybe_merge_call(
            self._step_everywhere, self._distribution_strategy, pairs, self._scalars()
        )

    def _scalars(self):
        """What is the same for all variables at this step, float32 scalars."""
        done = tf.cast(self.iterations, tf.float32)
        rate = tf.cast(self.learning_rate, tf.float32)
        found = {name: tf.constant(getattr(self, name)) for name in ("beta_1", "beta_2", "epsilon")}
        found |= {
            "rate": rate,
            "decay": rate * (self.weight_decay or 0.0),
            "beta_1_power": tf.pow(found["beta_1"], done + 1.0),
            "beta_2_power": tf.pow(found["beta_2"], done + 1.0),
        }
        if self.use_ema:  # the average begins as the weights after the first step
            found["renewal"] = 1.0 - tf.where(done > 0.0, tf.cast(self.ema_momentum, tf.float32), 0.0)
        if self._finite is not None:  # a skipped step moves nothing: 1 - beta, the rate and the renewal are 0
            kept = tf.cast(self._finite, tf.float32)
            found |= {name: tf.where(self._finite, found[name], 1.0) for name in ("beta_1", "beta_2")}
            found |= {name: kept * found[name] for name in ("rate", "decay", "renewal") if name in found}
        return found

    def _step_everywhere(self, strategy, pairs, scalars):
        """The step of each variable, on each device that has a copy of it."""
        for gradient, variable in pairs:
            i = self._get_variable_index(variable)
            decays = self.weight_decay is not None and self._use_weight_decay(variable)
            slots = {"moment_1": self._momentums[i].value, "moment_2": self._velocities[i].value}
            if self.use_ema:
                slots["average"] = self._model_variables_moving_average[i].value
            step = functools.partial(self._step, decays=decays)
            strategy.extended.update(variable, step, args=(gradient, scalars, slots), group=False)

    def _step(self, variable, gradient, scalars, slots, decays):
        """One step of one variable on one device (algorithm 2 of the paper), and of its moving average."""
        scalars = {name: tf.cast(value, variable.dtype) for name, value in scalars.items()}
        if decays:
            tf.raw_ops.ResourceApplyGradientDescent(var=variable.handle, alpha=scalars["decay"], delta=variable.value())
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=slots["moment_1"].handle,
            v=slots["moment_2"].handle,
            beta1_power=scalars["beta_1_power"],
            beta2_power=scalars["beta_2_power"],
            lr=scalars["rate"],
            beta1=scalars["beta_1"],
            beta2=scalars["beta_2"],
            epsilon=scalars["epsilon"],
            grad=tf.cast(tf.convert_to_tensor(gradient), variable.dtype),
        )
        if self.use_ema:
            average = slots["average"]
            tf.raw_ops.ResourceApplyGradientDescent(
                var=average.handle, alpha=scalars["renewal"], delta=average.value() - variable.value()
            )
