"""The denoising network: a U-Net with attention that knows the time and the conditions."""

import keras
from keras import layers, ops

from ldm.nets.layers import (
    AttentionBlock,
    AttentionGate,
    Covariate,
    DepthToSpace,
    Embedding,
    GroupNorm,
    NullableEmbedding,
    ResBlock,
    SpaceToDepth,
    Tokens,
    downsample,
    upsample,
)
from ldm.nets.saving import Recorded, register


@register
class UNet(Recorded, keras.Model):
    """Attention U-Net with time embedding (arXiv 2006.11239, appendix B; 2105.05233; 2112.10752).

    Time, slice index, label, covariates and augmentation are tokens. Their sum modulates each residual block (FiLM);
    attention blocks see them one by one, by cross-attention.

    Args:
        size: pixels a side of what is denoised (image or latents), or its (height, width).
        channels: of what is denoised.
        width: channels of the first level.
        multipliers: channels of each level, as multiples of `width`; each level halves the resolution.
        patch: side of the patches that the first and last layers trade for channels, so that no convolution runs at
            full resolution (arXiv 2301.11093, section 3.1); 1 for none.
        blocks: residual blocks per level on the way down (one more on the way up).
        attention: resolutions, in rows, at which attention blocks follow residual blocks.
        head_size: channels per attention head.
        num_labels: number of labels; 0 has no label token.
        dropout: rate in residual blocks.
        covariates: what else is known of a person, as one entry for each column of the table: how many values a
            category has, 0 for a number.
        mask: whether a tissue mask is among its conditions.
        tell_augmented: whether it is told which examples are augmented, so that what augmentation does to a head does
            not come out in samples (arXiv 2206.00364, appendix F.2).
        gates: additive attention gates on the skips (arXiv 1804.03999).
        recompute: gradient checkpointing, block by block; not with dropout.
        groups: of channels that are normalised together, at most; as many as there are channels normalise each by
            itself, and no block can tell how bright its input is.

    Call arguments: a dictionary -> (B, height, width, channels) float32. It holds "x" (B, height, width, channels); "t"
    (B,) in [0, 1]; "z" (B,) int32; "label" (B,) int32, -1 = unknown; "keep" (B,), 1 or 0, where 0 hides all conditions;
    with covariates also "covariates" (B, K), NaN = unknown; with a mask also "mask" (B, height, width, 4), the share of
    each tissue class in each pixel, all zeros = unknown; with `tell_augmented` also "augmented" (B,), 1 = yes, 0 = no.
    """

    def __init__(
        self,
        size,
        channels,
        width=64,
        multipliers=(1, 2, 4),
        blocks=2,
        attention=(16, 8),
        head_size=64,
        num_labels=0,
        dropout=0.0,
        covariates=(),
        mask=False,
        tell_augmented=False,
        gates=False,
        recompute=False,
        groups=32,
        patch=1,
        **kwargs,
    ):
        size = (size, size) if isinstance(size, int) else tuple(size)
        if any(length % (patch * 2 ** (len(multipliers) - 1)) for length in size):
            levels = f"{len(multipliers)} levels" + (f" of patches of {patch}" if patch > 1 else "")
            raise ValueError(f"{levels} do not fit {size} pixels: halving must stay whole")
        inputs = {
            "x": keras.Input((*size, channels), name="x"),
            "t": keras.Input((), name="t"),
            "z": keras.Input((), dtype="int32", name="z"),
            "label": keras.Input((), dtype="int32", name="label"),
            "keep": keras.Input((), name="keep"),
        }
        tokens = [Embedding(4 * width, scale=1000.0, autocast=False, name="time")(inputs["t"])]
        tokens += [NullableEmbedding(name="z_or_null")(Embedding(4 * width, name="slice")(inputs["z"]), inputs["keep"])]
        if num_labels:
            label = layers.Embedding(num_labels + 1, 4 * width, name="label_token")(inputs["label"] + 1)
            tokens += [NullableEmbedding(name="label_or_null")(label, inputs["keep"])]
        if covariates:
            inputs["covariates"] = keras.Input((len(covariates),), name="covariates")
        for k, values in enumerate(covariates):
            covariate = Covariate(4 * width, values, name=f"covariate_{k}")(inputs["covariates"][:, k])
            tokens += [NullableEmbedding(name=f"covariate_{k}_or_null")(covariate, inputs["keep"])]
        if tell_augmented:  # a token as well: from the sum alone it is not learned
            inputs["augmented"] = keras.Input((), name="augmented")
            augmented = layers.Dense(4 * width, use_bias=False, name="augmented_token")
            tokens += [augmented(ops.expand_dims(inputs["augmented"], -1))]
        film = layers.Add()(tokens)  # (B, 4 width)
        tokens = Tokens()(tokens)  # (B, M, 4 width)

        def level(x, channels):
            x = ResBlock(channels, dropout, recompute, groups)(x, film)
            return AttentionBlock(head_size, recompute, groups)(x, tokens) if x.shape[1] in attention else x

        x = inputs["x"]
        if mask:
            inputs["mask"] = keras.Input((*size, 4), name="mask")
            x = layers.Concatenate()([x, inputs["mask"] * ops.reshape(inputs["keep"], (-1, 1, 1, 1))])
        x = SpaceToDepth(patch)(x) if patch > 1 else x
        x = layers.Conv2D(width, 3, padding="same")(x)
        skips = [x]
        for depth, multiplier in enumerate(multipliers):  # down
            if depth:
                x = downsample(width * multiplier)(x)
                skips.append(x)
            for _ in range(blocks):
                x = level(x, width * multiplier)
                skips.append(x)

        x = ResBlock(width * multipliers[-1], dropout, recompute, groups)(x, film)  # middle
        x = AttentionBlock(head_size, recompute, groups)(x, tokens)
        x = ResBlock(width * multipliers[-1], dropout, recompute, groups)(x, film)

        for depth, multiplier in reversed(list(enumerate(multipliers))):  # up: each skip is used once
            for _ in range(blocks + 1):
                skip = skips.pop()
                skip = AttentionGate(width)(x, skip) if gates else skip
                x = level(layers.Concatenate()([x, skip]), width * multiplier)
            if depth:
                x = upsample(x, width * multiplier)

        x = GroupNorm(groups, activation="silu")(x)
        x = layers.Conv2D(channels * patch**2, 3, padding="same", kernel_initializer="zeros", dtype="float32")(x)
        x = DepthToSpace(patch, dtype="float32")(x) if patch > 1 else x
        super().__init__(inputs, x, **kwargs)
        self.remember(locals())
