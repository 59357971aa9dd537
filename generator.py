"""From noise to pictures: the one place where a trained diffusion model draws.

    generator = Generator(run)
    x_T = generator.noise(seed=0, count=4)
    conditions = {"z": np.int32([3, 9, 15, 21]), "label": np.int32([0, 0, 1, 1])}
    images = generator.decode(generator.draw(x_T, conditions), conditions)  # (4, H, W, 1) in [-1, 1]

Slices are drawn some at a time. What a slice becomes depends on its own noise, number and conditions, not on the slices
that are drawn beside it, so the size of a batch does not matter. Pictures of a diffusion model's epochs, samples of an
evaluation and everything that `predict.py` draws come through here.
"""

import numpy as np
from tqdm import tqdm

from ldm import batches
from ldm.data import latents as stored_latents
from ldm.data import masks
from ldm.diffusion import guidance, samplers, schedules
from ldm.later import tensorflow as tf
from ldm.training import records, runs

PRIORS = ("transformer", "histogram", "normal")  # where latents may come from, beside the diffusion model


class FirstStage:
    """A first stage, compiled once: pictures to latents and back, as many slices as there are.

    Conditions are arrays with a row per slice, of which a first stage sees "z" (N,) int32 and "label" (N,) int32, -1 =
    unknown.

    Args:
        autoencoder: a `VQVAE` or `VAE`. Only a `Generator` in pixels has None: pictures are its latents, and its model
            knows their shape.
    """

    def __init__(self, autoencoder):
        self.autoencoder = autoencoder
        for name in ("encode", "decode", "decode_tissue"):
            method = getattr(autoencoder, name, None)
            setattr(self, f"_{name}", method and tf.function(method, reduce_retracing=True, autograph=False))

    @property
    def data_shape(self):
        """(h, w, C) of one slice's latents."""
        return self.autoencoder.latent_shape

    @property
    def names_tissues(self):
        """Whether it tells tissues in what it decodes: `decode_tissue`."""
        return bool(self.autoencoder and self.autoencoder.tissues)

    def encode(self, images, conditions):
        """Images (N, H, W, 1) in [-1, 1] -> what the model denoises, (N, h, w, C)."""
        return self._through(self._encode, images, conditions) if self.autoencoder else images

    def decode(self, x, conditions):
        """What the model denoises (N, h, w, C) -> images (N, H, W, 1) in [-1, 1]."""
        return self._through(self._decode, x, conditions) if self.autoencoder else np.clip(x, -1.0, 1.0)

    def decode_tissue(self, latents, conditions):
        """As `decode`, for a first stage that names tissues -> classes (N, H, W) int32."""
        return self._through(self._decode_tissue, latents, conditions)

    @staticmethod
    def _through(function, x, conditions):
        return batches.in_batches(function, x, conditions["z"], conditions["label"])

    def cropped(self, images):
        """Images (N, H, W, 1) -> the part of them that the networks see."""
        return np.asarray(self.autoencoder.crop(images)) if self.autoencoder else images

    def noise(self, seed, count, first=0, shared=0.0):
        """x_T of `count` slices, (count, h, w, C): standard normal, a function of the seed and a slice's number.

        Args:
            seed: an integer.
            count: number of slices.
            first: number of the first slice, and the others follow; with `shared`, of the head. Or (count, 2) int: for
                each slice the number of its head and its place in it, so that there may be several heads.
            shared: in [0, 1], how the noises of neighbours correlate, which makes them slices of one head, whose number
                is `first`; see `samplers.NoiseOfSlice`.
        """
        if shared:
            rows = [samplers.NoiseOfSlice((seed, head), place, shared) for head, place in self.places(count, first)]
            return np.stack([row.standard_normal(self.data_shape, "float32") for row in rows])
        numbers = range(first, first + count)
        return np.stack([samplers.initial_noise(seed, number, self.data_shape) for number in numbers])

    @staticmethod
    def places(count, first):
        """[(head, place in it)] of slices whose noise is shared; `count` and `first` as of `noise`."""
        return first.tolist() if np.ndim(first) else [(first, place) for place in range(count)]


class Generator(FirstStage):
    """A diffusion model, and the first stage in whose latents it works, each compiled once.

    Conditions are as those of `FirstStage`, and, where the model has learned them, "covariates" (N, K) float32 and
    "mask" (N, h, w, 4) float32, as `DiffusionModel.denoise` takes them.

    Args:
        run: folder of the run.

    Attributes:
        record: what the run wrote down of its diffusion stage; None if made `of` models.
        model: the `DiffusionModel`.
        autoencoder: the first stage; None in pixels.

    Raises:
        RunError: if a model or the record is not there, or the first stage is still in training.
    """

    def __init__(self, run):
        import modules  # noqa: F401  (registers the classes that a .keras file names)

        model, record = records.load(run, "diffusion")
        autoencoder = None
        if record["settings"]["first_stage"] != "none":
            autoencoder = records.load_first_stage(run)
            records.refuse_strangers(run, {"autoencoder": records.of(run, "autoencoder"), "diffusion": record})
        self._set(model, autoencoder, record)

    @classmethod
    def of(cls, model, autoencoder=None):
        """A generator of models that are in memory; whoever changes their weights changes what it draws."""
        made = cls.__new__(cls)
        made._set(model, autoencoder, None)
        return made

    def _set(self, model, autoencoder, record):
        super().__init__(autoencoder)
        self.model, self.record = model, record
        self.denoise = tf.function(model.denoise, reduce_retracing=True, autograph=False)

    @property
    def data_shape(self):
        """(h, w, C) of what is denoised: latents, or pixels."""
        return self.model.data_shape

    def tissue_fractions(self, tissue):
        """Tissue masks (N, H, W), classes -> the condition "mask", (N, h, w, 4)."""
        crop_box = self.autoencoder.crop_box if self.autoencoder else None
        return np.asarray(masks.tissue_fractions(tissue, self.data_shape[:2], crop_box))

    def noised(self, x_0, t, eps):
        """Clean data and noise, (N, h, w, C) each -> x_t at the time t in [0, 1]."""
        alpha, sigma = (float(value) for value in self.model.schedule(t))
        return np.asarray(schedules.add_noise(x_0, eps, alpha, sigma), "float32")

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
        shared=0.0,
        guidance_scale=1.0,
        guidance_rescale=0.0,
        negative=None,
        title=None,
        watch=None,
        **options,
    ):
        """What a sampler goes through from x_T to samples.

        Args:
            x_T: noise, or, with `start`, noised pictures, (N, h, w, C).
            conditions: see the class.
            sampler: a name in `samplers.SAMPLERS`, or "inpaint".
            steps: calls of `denoise`, each of which, guided, is two of the network; None takes the sampler's usual
                number. "inpaint" rounds down to a multiple of `resample`.
            moments: of how many steps, evenly spread, the states are kept; the last is always one of them.
            seed, first, shared: of the noise that a sampler adds on the way, as in `noise`.
            guidance_scale, guidance_rescale: see `guidance.guided`.
            negative: conditions to guide away from; None is the unconditional case.
            title: of a progress bar on the terminal; None shows none.
            watch: called after each call of `denoise`, with the share of all calls that is made, in (0, 1], and with
                (x_t, x_0) of the batch at work where they are kept, else None. What it raises ends the drawing.
            options: what else the sampler takes ("eta", "spacing", "start", ...). Arrays have a row per slice.

        Returns:
            List of (x_t, x_0), two arrays (N, h, w, C) each, in the order of the steps; the last x_t are the samples.

        Raises:
            ValueError: for an option that this sampler does not take, or a value that it refuses.
        """
        method = samplers.named(sampler)
        if unknown := options.keys() - method.takes:
            raise ValueError(f"{sampler} does not take {', '.join(sorted(unknown))}")
        steps = steps or method.calls
        calls = steps
        if sampler == "inpaint":
            calls = samplers.inpainting_calls(steps, options.get("resample", samplers.RESAMPLE))
        kept = {calls - 1} if moments == 1 else set(batches.evenly(calls, moments).tolist())
        parts, found = batches.parts(len(x_T)), []
        places = self.places(len(x_T), first) if shared else None
        with tqdm(total=calls * len(parts), desc=title, unit="call", disable=None if title else True) as bar:
            for part in parts:
                known, away, own = (_rows(given, part) for given in (conditions, negative or {}, options))
                known, away = (
                    {name: tf.convert_to_tensor(value) for name, value in rows.items()} for rows in (known, away)
                )
                if "seed" in method.takes:  # a stream of its own: that of x_T is [seed, number]
                    if shared:
                        own["seed"] = [samplers.NoiseOfSlice((seed, h, 1), k, shared) for h, k in places[part]]
                    else:
                        own["seed"] = [(seed, first + i, 1) for i in range(part.start, part.stop)]
                steered = guidance.guided(
                    self.denoise, known, guidance_scale, guidance_rescale, away or None, self.model.threshold
                )
                states = []
                walk = method(steered, x_T=x_T[part], schedule=self.model.schedule, steps=steps, **own)
                for step, pair in enumerate(walk):
                    bar.update()
                    if step in kept:
                        states.append([np.asarray(x) for x in pair])
                    if watch:
                        done = (len(found) * calls + step + 1) / (calls * len(parts))
                        watch(done, states[-1] if step in kept else None)
                found.append(states)
        return [tuple(np.concatenate(x) for x in zip(*moment, strict=True)) for moment in zip(*found, strict=True)]

    # ---- from pictures -----------------------------------------------------------------------------------------------

    def renoised(self, images, conditions, start, sampler="dpm_solver_pp", steps=None, seed=0, first=0, **options):
        """The `trajectory` of pictures that are noised to a time and denoised (SDEdit, arXiv 2108.01073).

        Args:
            images: (N, H, W, 1) in [-1, 1].
            start: the time, in (0, 1]: 1 leaves next to nothing of the pictures (alpha(1) is 0.0064 in the schedule
                "linear", 4.9e-5 in "cosine" and "sigmoid"), and nothing with "flow" or `zero_snr`.
            steps: calls of `denoise` that the whole way from t = 1 would take; this part takes its share of them.
            options: of `trajectory`.
        """
        x_t = self.noised(self.encode(images, conditions), start, self.noise(seed, len(images), first))
        steps = self.share_of_steps(sampler, steps, start)
        return self.trajectory(x_t, conditions, sampler, steps, seed=seed, first=first, start=start, **options)

    @staticmethod
    def share_of_steps(sampler, steps, start):
        """Calls of `denoise` from the time `start` on, of those that the whole way takes; at least one."""
        return max(1, round((steps or samplers.named(sampler).calls) * start))

    def pseudo_healthy(self, images, conditions, start, draws=4, moments=1, seed=0, **options):
        """Noise the pictures and denoise them: the model redraws what it knows; what it never saw, a lesion, is lost.

        Args:
            images, conditions, start, options: as of `renoised`.
            draws: noises of which the mean is taken.
            moments: of the trajectory of the first.

        Returns:
            (N, H, W, 1) in [-1, 1], the mean over the noises; and the trajectory of the first noise.
        """
        trajectory = self.renoised(images, conditions, start, moments=moments, seed=seed, **options)
        ends = [trajectory[-1][0]]
        for draw in range(1, draws):
            first = draw * len(images)
            ends.append(self.renoised(images, conditions, start, seed=seed, first=first, **options)[-1][0])
        return np.mean([self.decode(x, conditions) for x in ends], axis=0), trajectory

    def inpainted(self, images, conditions, mask, steps=None, resample=samplers.RESAMPLE, seed=0, **options):
        """The `trajectory` of pictures of which a part is drawn anew, to fit the rest.

        Args:
            images: (N, H, W, 1) in [-1, 1].
            mask: (1, h, w, 1) of latents, 1 where to draw anew: see `touched`.
            steps: calls of `denoise`, rounded down to a multiple of `resample`; None takes the usual number.
            resample: times that each step is made; at most `steps`, and cut to it where it is more.
            options: of `trajectory`.
        """
        steps = steps or samplers.INPAINT.calls
        resample = min(resample, steps)
        known, x_T = self.encode(images, conditions), self.noise(seed, len(images))
        own = {"known": known, "mask": np.repeat(mask, len(images), axis=0), "resample": resample}
        return self.trajectory(x_T, conditions, "inpaint", steps, seed=seed, **own, **options)

    def touched(self, area):
        """Pixels (1, H, W, 1), 1 in an area and 0 elsewhere -> the latents that it touches, (1, h, w, 1) likewise."""
        return (tf.image.resize(self.cropped(area), self.data_shape[:2], "area").numpy() > 0).astype("float32")


def _rows(values, part):
    """{name: value} with every NumPy array cut to the rows `part`; all other values are passed on as they are."""
    return {name: value[part] if isinstance(value, np.ndarray) else value for name, value in values.items()}


# ---- latents without a diffusion model -------------------------------------------------------------------------------


def prior_latents(kind, run, first_stage, conditions, seed=0, prior=None, **options):
    """Latents that a simpler model than diffusion draws, (N, h, w, C), to be decoded by the first stage.

    Args:
        kind: in PRIORS. "transformer": codes, one by one, of a code prior; "histogram": see
            `histogram_latents`; "normal": N(0, I).
        run: folder of the run.
        first_stage: its `FirstStage`.
        conditions: {"z" (N,), "label" (N,)}; a label means what it meant to the model that is asked.
        seed: an integer.
        prior: the `CodePrior`, for "transformer".
        options: of its `sample`: "temperature", "top_k", "top_p".

    Raises:
        RunError: if the training latents are not there yet, the prior draws codes of another first stage, or `top_k`
            is more than there are of them.
    """
    if kind == "normal":
        return first_stage.noise(seed, len(conditions["z"]))
    if kind == "histogram":
        return histogram_latents(run, conditions["z"], seed)
    first = first_stage.autoencoder
    if (prior.num_codes, tuple(prior.code_shape)) != (first.num_codes, tuple(first.code_shape)):
        raise runs.RunError(
            f"{run}: prior.keras draws codes of another first stage: put the copy of the right one back, or run "
            f"`python train.py prior --run {run.name}` after removing prior.*"
        )
    if options.get("top_k", 0) > prior.num_codes:
        raise runs.RunError(f"--top-k {options['top_k']}: there are {prior.num_codes} codes; 0 takes all of them")
    codes = prior.sample(conditions["z"], conditions["label"], seed=seed, **options)
    return np.asarray(first.latents_of(codes))


def histogram_latents(run, z, seed):
    """Latents (N, h, w, C): each place drawn by itself from all training latents of the nearest slice index.

    Once a VQ-VAE decodes and so quantises them, they are draws from the histogram of codes per place and slice index.

    Raises:
        RunError: if the training latents are not there yet.
    """
    path = run / "latents" / "train.npz"
    if not path.exists():
        raise runs.RunError(f"--prior histogram needs {path}: run `python train.py latents --run {run.name}` first")
    stored, stored_z = stored_latents.read(path, "latents", "z")  # (views, slices, h, w, C), (slices,)
    result = []
    for i, index in enumerate(z):
        distance = np.abs(stored_z - index)
        rows = np.flatnonzero(distance == distance.min())
        random = np.random.default_rng([seed, i])
        height, width = np.indices(stored.shape[2:4])
        view = random.integers(len(stored), size=height.shape)
        result.append(stored[view, random.choice(rows, height.shape), height, width])
    return np.stack(result).astype("float32")
