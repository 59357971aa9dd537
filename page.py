"""The page of `app.py`: what stands on it, and which job of `jobs` a button starts. It alone imports gradio.

On the left, how is drawn, for all tabs; on the right a tab for each kind of job. A job runs by itself, the others wait
in a queue; whatever a job refuses is shown as its sentence. Nothing is fetched from the internet: fonts are those of
the machine, and a header forbids the browser to ask anybody else.
"""

import functools
import html
import os
import re
import shlex
import tempfile
import threading
import time
import traceback
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image

import jobs
from dataset import DataError
from ldm.data import single
from ldm.diffusion import samplers
from ldm.drawing import figures
from ldm.training import runs

PLANES = ("sagittal", "coronal", "axial")  # by the axis of a volume that they are cut across
ANY = "any"  # label
WAITING = 8  # jobs in the queue
OURS = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-src 'none'"
)
LOOKS = """
.gradio-container {max-width: 1500px !important}
[role=alert] {color: #b91c1c}
.bar progress {appearance: none; width: 40%; height: 0.8em; margin-right: 1em; vertical-align: middle; border: 0}
.bar progress, .bar progress::-webkit-progress-bar {background: #d8d8dc; border-radius: 0.4em}
.bar progress::-webkit-progress-value {background: #ea580c; border-radius: 0.4em}
.bar progress::-moz-progress-bar {background: #ea580c; border-radius: 0.4em}
"""


def launch(generator, run, folder, host, port):
    """Open the page of a run, and return at once; whoever opens it closes it: `.close()`.

    Args:
        generator: of the run.
        run: its folder.
        folder: for uploads and what is drawn; whoever made it removes it.
        host, port: where the page is.
    """

    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    made = Page(generator, run, folder).blocks
    made.queue(max_size=WAITING).launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        max_file_size=single.MOST_BYTES,
        footer_links=[],
        css=LOOKS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        app_kwargs={"middleware": [_only_ours()]},
    )
    return made


def _only_ours():
    """A layer of the server that tells the browser to load nothing from elsewhere."""
    from starlette.middleware import Middleware

    class OnlyOurs:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            async def with_header(message):
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"content-security-policy", OURS.encode())]
                await send(message)

            await self.app(scope, receive, with_header)

    return Middleware(OnlyOurs)


def bar(share, said="", began=None):
    """A progress bar, as HTML: how much is done, what is said of it, how long the rest may take."""
    if began is not None and 0 < share < 1:
        left = (time.monotonic() - began) * (1 - share) / share
        said = f"{said} {share:.0%}, {left:.0f} s left" if left >= 1 else f"{said} {share:.0%}"
    return f"<progress max='1' value='{share:.3f}'></progress> {html.escape(said)}"


class Page:
    """The parts of the page, and what its buttons do.

    Args:
        generator, run, folder: see `launch`.

    Attributes:
        blocks: the page.
    """

    def __init__(self, generator, run, folder):
        self.generator, self.run, self.folder = generator, run, folder
        self.data, self.stop = generator.record["data"], threading.Event()
        self.named = run.name if run.parent == runs.ROOT else str(run)
        self.first, self.last = self.data["z"]
        with gr.Blocks(title=f"{run.name}: brain-MRI slices", analytics_enabled=False) as self.blocks:
            gr.Markdown(
                f"# Brain-MRI slices, drawn by `{run.name}`\n"
                "Drawn slices are of nobody. For research and teaching, never for diagnosis."
            )
            with gr.Row():
                with gr.Column(scale=1, min_width=260):
                    self.how = self._how()
                with gr.Column(scale=4):
                    self._slices()
                    if len(self.data["labels"]) > 1:
                        self._two_labels()
                    self._person()
                    self._own()

    # ---- the parts ---------------------------------------------------------------------------------------------------

    def _how(self):
        """How is drawn, for all tabs; returns the components in the order of `words`."""
        labels = self.data["labels"]
        label = gr.Dropdown([ANY, *labels], value=ANY, label="label", visible=bool(labels), elem_id="label")
        covariates = []
        for name, about in self.data.get("columns", {}).items():
            if about["kind"] == "category":
                covariates.append(gr.Dropdown([ANY, *about["values"]], value=ANY, label=name))
            else:
                covariates.append(gr.Number(None, label=name, placeholder=f"{about['mean']:.0f} on average"))
        sampler = gr.Dropdown(list(samplers.SAMPLERS), value="dpm_solver_pp", label="sampler", elem_id="sampler")
        calls = samplers.SAMPLERS["dpm_solver_pp"].calls
        steps = gr.Number(calls, precision=0, label="steps", info="calls of the network", elem_id="steps")
        guidance = gr.Slider(0.0, 8.0, 1.0, step=0.25, label="guidance", info="above 1 exaggerates what was asked for")
        seed = gr.Number(0, precision=0, label="seed", info="same seed, same slices", elem_id="seed")
        sampler.change(
            lambda name: samplers.SAMPLERS[name].calls, sampler, steps, queue=False, api_visibility="private"
        )
        gr.Button("Stop", elem_id="stop").click(lambda: self.stop.set(), **AT_ONCE)
        return [label, *covariates, sampler, steps, guidance, seed]

    def words(self, label, *values):
        """What stands on the left, as words of `predict.py`."""
        *covariates, sampler, steps, guidance, seed = values
        said = zip(self.data.get("columns", {}), covariates, strict=True)
        said = [f"{name}={value}" for name, value in said if value not in (None, "", ANY)]
        found = [*(["--label", label] if label not in (None, ANY) else []), *(["--conditions", *said] if said else [])]
        found += ["--sampler", sampler, "--steps", str(steps), "--seed", str(seed)]
        return found + (["--guidance", f"{guidance:g}"] if guidance != 1 else [])

    def _result(self, said, between=lambda: None):
        """The components that show what a job makes: progress, picture, files.

        Args:
            said: of the picture.
            between: makes what stands between progress and picture.

        Returns:
            The components; what `between` has made.
        """
        progress, made = gr.HTML(bar(0, "nothing drawn yet"), elem_classes="bar", padding=True), between()
        gr.Markdown(said)
        picture = gr.Image(show_label=False, format="png", interactive=False, buttons=["fullscreen"])
        files = gr.File(label="to take away", file_count="multiple", interactive=False, visible=False)
        return (progress, picture, files), made

    def _slices(self):
        with gr.Tab("Slices", id="slices"):
            with gr.Row():
                z = self._index()
                spread = gr.Checkbox(False, label="all slice indices, evenly", elem_id="spread")
                count = gr.Slider(1, jobs.MOST["sample"], 4, step=1, label="slices", elem_id="count")
            button = gr.Button("Draw", variant="primary", elem_id="draw")
            shown, _ = self._result(
                "On the way, x_t is on the left, and the x_0 that the network sees in it on the right."
            )
            command = gr.Textbox(label="the same from the command line", buttons=["copy"], elem_id="command")

            def draw(z, spread, count, *how):
                words = [*([] if spread else ["--z", str(z)]), "--count", str(count), *self.words(*how)]
                said = f"python predict.py --run {shlex.join([self.named, *words])}"
                yield from self._do(
                    shown, functools.partial(jobs.slices, self.generator, words), lambda result: {command: said}
                )

            self._starts(button, draw, [z, spread, count, *self.how], [*shown, command])

    def _two_labels(self):
        labels = self.data["labels"]
        with gr.Tab(" against ".join(labels) if len(labels) == 2 else "Two labels", id="labels"):
            with gr.Row():
                z = self._index()
                count = gr.Slider(1, jobs.MOST["sample"] // 2, 3, step=1, label="heads")
                one = gr.Dropdown(labels, value=labels[-1], label="above", interactive=True)
                other = gr.Dropdown(labels, value=labels[0], label="below", interactive=True)
            button = gr.Button("Draw the same heads with both labels", variant="primary", elem_id="draw_labels")
            shown, _ = self._result("On the way, x_t is on the left, and x_0 on the right.")

            def draw(z, count, one, other, *how):
                words = ["--z", str(z), "--count", str(count), *self.words(None, *how[1:])]
                yield from self._do(shown, functools.partial(jobs.two_labels, self.generator, words, (one, other)))

            self._starts(button, draw, [z, count, one, other, *self.how], [*shown])

    def _person(self):
        indices = self.last - self.first + 1
        most = min(indices, jobs.MOST["person"])
        of_volumes = self.data.get("kind") == "volumes"
        with gr.Tab("A person", id="person"):
            with gr.Row():
                count = gr.Slider(2, max(most, 3), min(most, 32), step=1, label="slices of the head", elem_id="stack")
                gap = gr.Number(
                    1.0 if of_volumes else round(0.45 * self.generator.record["settings"]["image_size"] / indices, 1),
                    label="distance of neighbouring slices, in pixels",
                    info="" if of_volumes else "a guess: this archive does not say it",
                )
                plane = gr.Dropdown(
                    PLANES, value=PLANES[self.generator.record["settings"].get("axis", 2)], label="the slices are"
                )
            button = gr.Button("Draw a head", variant="primary", elem_id="draw_person")
            shown, (sliders, views) = self._result("All slices.", self._views)
            stacks = gr.State()

            def draw(count, gap, plane, *how):
                label, *rest = how
                words, axis = ["--count", str(count), *self.words(label, *rest)], PLANES.index(plane)
                voxel = [1.0, 1.0, 1.0]
                voxel[axis] = gap
                words += ["--voxel", *map(str, voxel)]

                def planes(result):
                    spread = jobs.volumes.voxel_of(result.z, voxel, axis)
                    cuts = jobs.cuts(result.images, axis, spread)[::-1]
                    update = {stacks: cuts}
                    for slider, view, stack in zip(sliders, views, cuts, strict=True):
                        update[slider] = gr.Slider(maximum=len(stack) - 1, value=len(stack) // 2)
                        update[view] = seen(stack, len(stack) // 2)
                    return update

                yield from self._do(shown, functools.partial(jobs.person, self.generator, words, axis), planes)

            self._starts(button, draw, [count, gap, plane, *self.how], [*shown, *sliders, *views, stacks])
            for k, (slider, view) in enumerate(zip(sliders, views, strict=True)):
                turn = functools.partial(lambda k, cuts, place: seen(cuts[k], place) if cuts else None, k)
                slider.input(turn, [stacks, slider], view, **AT_ONCE)

    def _views(self):
        """Three cuts through a head, and the sliders that choose them."""
        sliders, views = [], []
        with gr.Row():
            for name in reversed(PLANES):
                with gr.Column(min_width=200):
                    sliders.append(gr.Slider(0, 1, 0, step=1, label=name, elem_id=f"cut_{name}"))
                    views.append(
                        gr.Image(show_label=False, format="png", interactive=False, height=320, elem_id=f"view_{name}")
                    )
        return sliders, views

    def _own(self):
        tasks = {
            "reconstruct: through the first stage": jobs.reconstruct,
            "vary: noise and denoise": jobs.vary,
            "differences: what the model would have drawn instead": jobs.differences,
            "inpaint: draw anew what is painted over": jobs.inpaint,
        }
        if self.generator.autoencoder is None:
            del tasks["reconstruct: through the first stage"]
        size = self.generator.record["settings"]["image_size"]
        with gr.Tab("Your own slice", id="own"):
            with gr.Row():
                with gr.Column():
                    file = gr.File(label="PNG, JPEG, NIfTI, MGZ", file_types=list(single.SUFFIXES), elem_id="upload")
                    plane = gr.Dropdown(PLANES, value=PLANES[2], label="cut volumes into slices that are")
                    place = gr.Slider(0, 1, 0, step=1, label="slice of the volume", visible=False, elem_id="place")
                    z = self._index("slice index, to the model")
                    task = gr.Radio(list(tasks), value=next(iter(tasks)), label="what to do", elem_id="task")
                    start = gr.Slider(0.05, 1.0, 0.5, step=0.05, label="noise, t: 1 leaves nothing of the slice")
                    whole = gr.Checkbox(False, label="all slices of the volume", visible=False)
                    button = gr.Button("Do", variant="primary", elem_id="do")
                editor = gr.ImageEditor(
                    label="paint over what is to be drawn anew",
                    sources=(),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(default_size=24, colors=["#e69f00"], color_mode="fixed"),
                    image_mode="RGBA",
                    format="png",
                    canvas_size=(512, 512),
                    elem_id="editor",
                    height=620,
                )
            shown, _ = self._result("The slice, what was made of it, and the difference.")
            real = gr.State()

            def bring(path, plane):
                nothing = {real: None, editor: None, place: gr.Slider(visible=False), whole: gr.Checkbox(visible=False)}
                if path is None:
                    return nothing
                try:
                    brought = jobs.opened(self.generator, path, PLANES.index(plane))
                except Exception as error:
                    return nothing | {shown[0]: mistake(error)}
                k, several = len(brought.z) // 2, len(brought.z) > 1
                return {
                    real: brought,
                    shown[0]: bar(0, f"{len(brought.z)} slices read" if several else "read"),
                    place: gr.Slider(maximum=max(1, len(brought.z) - 1), value=k, visible=several),
                    whole: gr.Checkbox(value=False, visible=several),
                    z: int(brought.z[k]),
                    editor: on_canvas(brought.images[k]),
                }

            def turn(brought, k):
                return {z: int(brought.z[k]), editor: on_canvas(brought.images[k])} if brought else {z: gr.skip()}

            def do(brought, k, z, task, start, whole, editor, *how):
                if brought is None:
                    yield {shown[0]: mistake(DataError("Give a slice first: a PNG, a JPEG, or a volume."))}
                    return
                work, more = tasks[task], {}
                brought = brought if whole and work is not jobs.inpaint else brought.one(k, z)
                if work is jobs.inpaint:
                    more["area"] = jobs.painted((editor or {}).get("layers") or (), size)
                elif work is not jobs.reconstruct:
                    more["start"] = start
                job = functools.partial(work, self.generator, brought, self.words(*how), **more)
                yield from self._do(shown, lambda folder, show: job(folder=folder, show=show))

            opens = {"outputs": [shown[0], real, place, whole, z, editor], **AT_ONCE}
            file.change(bring, [file, plane], **opens)
            plane.input(bring, [file, plane], **opens)
            place.input(turn, [real, place], [z, editor], **AT_ONCE)
            self._starts(button, do, [real, place, z, task, start, whole, editor, *self.how], [*shown])

    def _index(self, label="slice index"):
        middle = (self.first + self.last) // 2
        return gr.Slider(self.first, max(self.last, self.first + 1), middle, step=1, label=label)

    # ---- what buttons do ---------------------------------------------------------------------------------------------

    def _starts(self, button, work, inputs, outputs):
        """Let a button start a job: one at a time, whoever asks and on whichever tab."""
        button.click(
            work,
            inputs,
            outputs,
            concurrency_id="job",
            concurrency_limit=1,
            show_progress_on=outputs[0],
            show_progress="minimal",
            api_visibility="private",
        )

    def _do(self, shown, job, more=lambda result: {}):
        """Do a job, and show what it reports.

        Args:
            shown: of `_result`.
            job: function of `jobs`, of which a folder and `show` are left to be given.
            more: Result -> {component: value} of what else shows it.

        Yields:
            {component: value}
        """
        progress, picture, files = shown
        self.stop, began = threading.Event(), time.monotonic()
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        yield {progress: bar(0, "begins"), files: gr.File(value=None, visible=False)}
        try:
            for report in jobs.streamed(lambda show: job(folder, show), self.stop):
                if isinstance(report, jobs.Result):
                    said = f"{report.said}; {time.monotonic() - began:.1f} s"
                    drawn = str(report.picture) if isinstance(report.picture, Path) else report.picture
                    taken = gr.File(value=[str(path) for path in report.files], visible=True)
                    yield {picture: drawn, files: taken, progress: bar(1, said)} | more(report)
                else:
                    share, frame = report
                    yield {progress: bar(share, began=began)} | ({} if frame is None else {picture: frame})
        except jobs.Stopped:
            yield {progress: bar(0, "stopped")}
        except Exception as error:
            yield {progress: mistake(error)}


AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def seen(stack, place):
    """One of the cuts (slices, H, W), enlarged."""
    chosen = Image.fromarray(stack[int(np.clip(place, 0, len(stack) - 1))])
    factor = max(1, -(-320 // max(chosen.size)))
    return chosen.resize((chosen.width * factor, chosen.height * factor), Image.Resampling.BICUBIC)


def on_canvas(image):
    """A slice (H, W, 1) in [-1, 1] -> what the editor shows, with nothing painted over it."""
    grey = figures.to_uint8(figures.enlarge(image[None], 512))[0]
    colour = np.repeat(grey[..., None], 3, axis=-1)
    return {"background": colour, "layers": [], "composite": colour}


def mistake(error):
    """What the page shows of an error: a mistake is its own sentence, without the dashes of flags, as a page has none;
    of other faults the terminal says more.
    """
    said = re.sub(r"(?<![\w-])--(?=[a-z])", "", str(error))
    if not isinstance(error, DataError | runs.RunError | OSError):
        traceback.print_exception(error)
        said = f"the program failed ({error}): the terminal in which it runs says where"
    return f"<span role='alert'>{html.escape(said)}</span>"
