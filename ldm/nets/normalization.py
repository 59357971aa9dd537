"""Group normalisation, FiLM and SiLU as one function: `group_norm`, in few passes over memory.

The formula, in `keras.ops`, is `plain_group_norm`. Most backends compile it into few kernels by themselves. TensorFlow
on a CPU runs one op at a time, each a pass over memory, and keeps a float32 copy of x for the gradient: for it,
`fused_group_norm` states the same formula as compiled pieces with a gradient written by hand, which keeps x alone.
"""

import functools

import keras
import numpy as np
from keras import ops


def plain_group_norm(x, gamma, beta, groups, epsilon, silu):
    """act(gamma x^ + beta), with x^ = (x - mean) / std of each group of channels (arXiv 1803.08494, eq. 1 to 7).

    Args:
        x: (B, H, W, C) or (B, N, C).
        gamma, beta: (B, C) float32; a FiLM (arXiv 1709.07871) is multiplied in.
        groups: number of groups; divides C.
        epsilon: added to the variance.
        silu: whether SiLU follows.

    Returns:
        As x. Statistics and arithmetic are float32.
    """
    exact = ops.cast(x, "float32")
    mean = _per_group(_pixel_mean(exact), groups)
    variance = _per_group(_pixel_mean(ops.square(exact - _spread(mean, x))), groups)
    return ops.cast(affine(x, *_collapse(mean, ops.rsqrt(variance + epsilon), gamma, beta), silu), x.dtype)


def affine(x, a, b, silu):
    """act(x a + b): x (B, ..., C), a and b (B, C) float32 -> float32."""
    u = ops.cast(x, "float32") * _spread(a, x) + _spread(b, x)
    return ops.silu(u) if silu else u


def _collapse(mean, inverse, gamma, beta):
    """a, b (B, C) with gamma (x - mean) inverse + beta = x a + b."""
    a = gamma * inverse
    return a, beta - a * mean


def _per_group(values, groups):
    """(B, C) -> the mean over each group of neighbouring channels, told to each of them, (B, C)."""
    size = values.shape[-1] // groups
    # Few nodes of TensorFlow's graph; with `rearrange` and `repeat` a U-Net has 2,300 more, and begins later.
    mean = ops.mean(ops.reshape(values, (-1, groups, size)), -1, keepdims=True)
    return ops.reshape(mean * np.ones((1, 1, size), "float32"), (-1, groups * size))


def _pixel_mean(x):
    """(B, ..., C) float32 -> (B, C)."""
    return ops.mean(x, tuple(range(1, len(x.shape) - 1)))


def _spread(values, x):
    """(B, C) -> (B, 1, ..., C), to meet x (B, ..., C)."""
    return ops.reshape(values, (-1, *[1] * (len(x.shape) - 2), values.shape[-1]))


group_norm = plain_group_norm

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    def _bfloat16(exact):
        """float32 -> bfloat16, rounded half to even as a cast does, but by whole numbers.

        XLA does not vectorise its own cast where an exponential comes before it, as in SiLU.
        """
        bits, number = tf.bitcast(exact, tf.uint32), functools.partial(tf.constant, dtype=tf.uint32)
        odd = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, number(16)), number(1))
        is_nan = tf.bitwise.bitwise_and(bits, number(0x7FFFFFFF)) > number(0x7F800000)
        bits = tf.where(is_nan, number(0x7FC00000), bits + number(0x7FFF) + odd)
        return tf.bitcast(tf.cast(tf.bitwise.right_shift(bits, number(16)), tf.uint16), tf.bfloat16)

    def _rounded(exact, like):
        """float32 -> as `like`."""
        return _bfloat16(exact) if like.dtype == tf.bfloat16 else tf.cast(exact, like.dtype)

    @tf.function(jit_compile=True, autograph=False)
    def _affine(x, a, b, silu):
        """As `affine`, rounded to what x is."""
        return _rounded(affine(x, a, b, silu), x)

    def _row_mean(x):
        """(B, ..., C) -> (B, C) float32; of bfloat16, the means of rows are rounded before they are averaged.

        A float32 copy of x would cost more than it is worth: the rounding of a mean is as small as that of x itself.
        What is squared is centred first, so no small difference of large numbers is ever taken.
        """
        if x.dtype == tf.bfloat16 and len(x.shape) == 4:
            x = tf.reduce_mean(x, 2)
        return tf.reduce_mean(tf.cast(x, tf.float32), list(range(1, len(x.shape) - 1)))

    def _narrow(exact, like):
        """float32 -> bfloat16 if `like` has 16 bits: bfloat16, unlike float16, has the range of float32."""
        return exact if like.dtype == tf.float32 else _bfloat16(exact)

    @tf.function(jit_compile=True, autograph=False)
    def _centred_squares(x, mean):
        """(x - mean)^2."""
        return _narrow(tf.square(tf.cast(x, tf.float32) - _spread(mean, x)), x)

    @tf.function(jit_compile=True, autograph=False)
    def _affine_gradient(x, dy, a, b, mean, inverse, silu):
        """dL/dy of `affine` -> du = dL/du at u = x a + b, as x; and du x^."""
        exact, du = tf.cast(x, tf.float32), tf.cast(dy, tf.float32)
        if silu:  # (u s)' = s (1 + u (1 - s)) with s = sigmoid(u)
            u = exact * _spread(a, x) + _spread(b, x)
            s = tf.sigmoid(u)
            du *= s * (1.0 + u * (1.0 - s))
        normal = (exact - _spread(mean, x)) * _spread(inverse, x)
        return _rounded(du, x), _narrow(du * normal, x)

    @tf.function(jit_compile=True, autograph=False)
    def _combine(du, a, x, c, d):
        """du a + x c + d, as x."""
        total = tf.cast(du, tf.float32) * _spread(a, x) + tf.cast(x, tf.float32) * _spread(c, x) + _spread(d, x)
        return _rounded(total, x)

    def fused_group_norm(x, gamma, beta, groups, epsilon, silu):
        """As `plain_group_norm`, but for the rounding that `_row_mean` tells of.

        With u = gamma x^ + beta, and <.> the mean over a group's pixels and channels, its gradient is
        dL/dx = (gamma du - <gamma du> - x^ <gamma du x^>) / std.
        """

        @tf.custom_gradient
        def fused(x, gamma, beta):
            mean = _per_group(_row_mean(x), groups)
            inverse = tf.math.rsqrt(_per_group(_row_mean(_centred_squares(x, mean)), groups) + epsilon)
            a, b = _collapse(mean, inverse, gamma, beta)

            def gradient(dy):
                du, du_normal = _affine_gradient(x, dy, a, b, mean, inverse, silu)
                du_mean, du_normal = _row_mean(du), _row_mean(du_normal)
                c = -(inverse**2) * _per_group(gamma * du_normal, groups)
                d = -inverse * _per_group(gamma * du_mean, groups) - c * mean
                pixels = tf.cast(tf.reduce_prod(tf.shape(x)[1:-1]), tf.float32)
                return _combine(du, a, x, c, d), du_normal * pixels, du_mean * pixels

            return _affine(x, a, b, silu), gradient

        return fused(x, gamma, beta)

    group_norm = fused_group_norm
