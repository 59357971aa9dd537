"""From noise to pictures: the one place where a trained diffusion model draws.

    generator = Generator(run)
    x_T = generator.noise(seed=0, count=4)
    conditions = {"z": np.int32([3, 9, 15, 21]), "label": np.int32([0, 0, 1, 1])}
    images = generator.decode(generator.draw(x_T, conditions), conditions)  # (4, H, W, 1) in [-1, 1]

Slices are drawn some at a time. What a slice becomes depends on its own noise, number and conditions, not on the slices
that are drawn beside it, so the size of a batch does not matter. Pictures of an epoch, samples of an evaluation and
everything that `predict.py` draws come through here.
"""

import numpy as np
import tensorflow as tf
from tqdm import tqdm

import modules  # noqa: F401  (registers the classes that a .keras file names)
from ldm import batches
from ldm.data import masks
from ldm.diffusion import guidance, samplers
from ldm.training import runs


class Generator:
    """A diffusion model, and the first stage in whose latents it works, each compiled once.

    Conditions are arrays with a row per slice: "z" (N,) int32, "label" (N,) int32, -1 = unknown; and, where the model
    has learned them, "covariates" (N, K) float32 and "mask" (N, h, w, 4) float32, as `DiffusionModel.denoise` takes
    them.

    Args:
        run: folder of the run.

    Attributes:
        record: what the run wrote down of its diffusion stage; None if made `of` models.
        model: the `DiffusionModel`.
        autoencoder: the first stage; None in pixels.

    Raises:
        RunError: if a model is not there yet.
    """

    def __init__(self, run):
        model, record = runs.load_model(run / "diffusion.keras"), runs.load_json(run / "diffusion.json")
        in_pixels = record["settings"]["first_stage"] == "none"
        self._set(model, None if in_pixels else runs.load_first_stage(run), record)

    @classmethod
    def of(cls, model, autoencoder=None):
        """A generator of models that are in memory; whoever changes their weights changes what it draws."""
        made = cls.__new__(cls)
        made._set(model, autoencoder, None)
        return made

    def _set(self, model, autoencoder, record):
        self.model, self.autoencoder, self.record = model, autoencoder, record
        self.denoise = tf.function(model.denoise, reduce_retracing=True)
        for name in ("encode", "decode", "decode_tissue"):
            method = getattr(autoencoder, name, None)
            setattr(self, f"_{name}", method and tf.function(method, reduce_retracing=True))

    @property
    def data_shape(self):
        """(h, w, C) of what is denoised: latents, or pixels."""
        return self.model.data_shape

    # ---- between pictures and what is denoised -----------------------------------------------------------------------

    def encode(self, images, conditions):
        """Images (N, H, W, 1) in [-1, 1] -> what the model denoises, (N, h, w, C)."""
        return self._through(self._encode, images, conditions) if self.autoencoder else images

    def decode(self, x, conditions):
        """What the model denoises (N, h, w, C) -> images (N, H, W, 1) in [-1, 1]."""
        return self._through(self._decode, x, conditions) if self.autoencoder else np.clip(x, -1.0, 1.0)

    def decode_tissue(self, latents, conditions):
        """As `decode`, for a first stage that names tissues -> classes (N, H, W) int32."""
        return self._through(self._decode_tissue, latents, conditions)

    def tissue_fractions(self, tissue):
        """Tissue masks (N, H, W), classes -> the condition "mask", (N, h, w, 4)."""
        crop_box = self.autoencoder.crop_box if self.autoencoder else None
        return np.asarray(masks.tissue_fractions(tissue, self.data_shape[:2], crop_box))

    @staticmethod
    def _through(function, x, conditions):
        return batches.in_batches(function, x, conditions["z"], conditions["label"])

    # ---- noise -------------------------------------------------------------------------------------------------------

    def noise(self, seed, count, first=0, shared=False):
        """x_T of `count` slices, (count, h, w, C): standard normal, a function of the seed and a slice's number.

        Args:
            seed: an integer.
            count: number of slices.
            first: number of the first slice; the others follow.
            shared: all have the noise of the first, so that they become slices of one head.
        """
        numbers = [first] * count if shared else range(first, first + count)
        return np.stack([samplers.initial_noise(seed, number, self.data_shape) for number in numbers])

    def noised(self, x_0, t, eps):
        """Clean data and noise, (N, h, w, C) each -> x_t at the time t in [0, 1]."""
        alpha, sigma = (float(value) for value in self.model.schedule(t))
        return np.asarray(alpha * x_0 + sigma * eps, "float32")

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def draw(self, x_T, conditions, sampler="dpm_solver_pp", steps=None, **options):
        """The end of a `trajectory` with the same arguments: samples (N, h, w, C), to be decoded."""
        return self.trajectory(x_T, conditions, sampler, steps, **options)[-1][0]

    def trajectory(
        self,
        x_T,
        conditions,
        sampler="dpm_solver_pp",
        steps=None,
        *,
        moments=1,
        seed=0,
        first=0,
        shared=False,
        guidance_scale=1.0,
        guidance_rescale=0.0,
        negative=None,
        title=None,
        **options,
    ):
        """What a sampler goes through from x_T to samples.

        Args:
            x_T: noise, or, with `start`, noised pictures, (N, h, w, C).
            conditions: see the class.
            sampler: a name in `samplers.SAMPLERS`, or "inpaint".
            steps: network calls per slice; None takes the sampler's usual number.
            moments: of how many steps, evenly spread, the states are kept; the last is always one of them.
            seed, first, shared: of the noise that a sampler adds on the way, as in `noise`.
            guidance_scale, guidance_rescale: see `guidance.guided`.
            negative: conditions to guide away from; None is the unconditional case.
            title: of a progress bar on the terminal; None shows none.
            options: what else the sampler takes ("eta", "spacing", "start", ...). Arrays have a row per slice.

        Returns:
            List of (x_t, x_0), two arrays (N, h, w, C) each, in the order of the steps; the last x_t are the samples.

        Raises:
            ValueError: for an option that this sampler does not take.
        """
        method = samplers.INPAINT if sampler == "inpaint" else samplers.SAMPLERS[sampler]
        if unknown := options.keys() - method.takes:
            raise ValueError(f"{sampler} does not take {', '.join(sorted(unknown))}")
        steps = steps or method.calls
        kept = {steps - 1} if moments == 1 else set(batches.evenly(steps, moments).tolist())
        limit = 1.0 if self.model.clip_x_0 else None
        parts, found = batches.parts(len(x_T)), []
        with tqdm(total=steps * len(parts), desc=title, unit="call", disable=None if title else True) as bar:
            for part in parts:
                known, away, own = (
                    {name: value[part] if isinstance(value, np.ndarray) else value for name, value in rows.items()}
                    for rows in (conditions, negative or {}, options)
                )
                known, away = (
                    {name: tf.convert_to_tensor(value) for name, value in rows.items()} for rows in (known, away)
                )
                if "seed" in method.takes:  # a stream of its own: that of x_T is [seed, number]
                    own["seed"] = [(seed, first if shared else first + i, 1) for i in range(part.start, part.stop)]
                steered = guidance.guided(self.denoise, known, guidance_scale, guidance_rescale, away or None, limit)
                states = []
                walk = method(steered, x_T=x_T[part], schedule=self.model.schedule, steps=steps, **own)
                for step, pair in enumerate(walk):
                    bar.update()
                    if step in kept:
                        states.append([np.asarray(x) for x in pair])
                found.append(states)
        return [tuple(np.concatenate(x) for x in zip(*moment, strict=True)) for moment in zip(*found, strict=True)]
