"""app.py, page.py, jobs.py: the page draws what predict.py draws, says mistakes in sentences, and has limits."""

import gzip
import importlib.util
import shutil
import socket
import threading
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

import app
import dataset
import jobs
import predict
from generator import Generator
from ldm.data import phantom, single, volumes
from ldm.drawing import figures
from ldm.training import runs

RUN = Path(__file__).parent / "old_runs" / "vqvae"
HOW = "--sampler ddim --steps 4 --seed 5".split()


@pytest.fixture(scope="module")
def generator():
    return Generator(RUN)


@pytest.fixture
def predicted(generator, tmp_path, monkeypatch):
    """What predict.py writes for some words, with the networks that are compiled already."""
    monkeypatch.setattr(predict, "Generator", lambda run: generator)

    def write(*words):
        more = ["--run", str(RUN), "--out", str(tmp_path / "cli"), "--precision", "float32"]
        assert predict.main([*words, *more]) == 0
        return tmp_path / "cli"

    return write


def nothing(share, frame=None):
    """A page that does not look."""


@pytest.fixture(scope="module")
def real():
    """Two slices that somebody brings."""
    found = [piece for piece in phantom.slices(1, 32) if piece["z"] in (12, 18)]
    images = np.stack([piece["image"] for piece in found])[..., None].astype("float32") / np.float32(127.5) - 1
    return jobs.Brought(images, np.int32([piece["z"] for piece in found]))


# ---- out of noise ----------------------------------------------------------------------------------------------------


def test_slices_are_those_of_predict_byte_for_byte(generator, predicted, tmp_path):
    words = ["--z", "9", "--count", "3", *HOW, "--label", "AD", "--guidance", "2"]
    reports = []
    made = jobs.slices(generator, words, tmp_path, lambda *report: reports.append(report))
    assert made.files == [tmp_path / "ddim.png", tmp_path / "ddim.gif"]
    assert made.files[0].read_bytes() == (predicted(*words) / "ddim.png").read_bytes()
    np.testing.assert_array_equal(made.picture, np.asarray(Image.open(made.files[0])))
    shares, frames = zip(*reports, strict=True)
    assert shares == (0.25, 0.5, 0.75, 1.0)
    # x_t on the left, x_0 on the right: at the end both are the picture
    end, width = frames[-1], made.picture.shape[1]
    np.testing.assert_array_equal(end[:, :width], made.picture)
    np.testing.assert_array_equal(end[:, -width:], made.picture)
    assert (frames[0][:, :width] != frames[0][:, -width:]).mean() > 0.1


def test_a_head_is_that_of_predict_and_can_be_cut_in_three_planes(generator, predicted, tmp_path):
    words = ["--count", "5", *HOW, "--label", "NC", "--voxel", "1", "1", "2"]
    made = jobs.person(generator, words, 2, tmp_path, nothing)
    other, names = predicted("person", *words), ["person_ddim.png", "person_ddim_stack.gif", "person_ddim.nii.gz"]
    assert [path.name for path in made.files] == names
    assert made.files[0].read_bytes() == (other / names[0]).read_bytes()
    stored, other = nibabel.load(made.files[2]), nibabel.load(other / names[2])
    np.testing.assert_array_equal(stored.dataobj, other.dataobj)
    np.testing.assert_array_equal(stored.affine, other.affine)
    assert b"synthetic" in stored.header["descrip"].item()
    sagittal, coronal, axial = jobs.cuts(made.images, 2, (1.0, 1.0, 6.4))
    np.testing.assert_array_equal(axial, figures.to_uint8(made.images))
    assert sagittal.shape == coronal.shape == (32, 32, 32)  # 5 slices, 6.4 pixels apart
    sagittal, coronal, axial = jobs.cuts(made.images, 2, (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(
        coronal[3][::-1], axial[:, 31 - 3]
    )  # the third row from behind, the lowest slice last


def test_two_labels_have_the_same_noise_and_it_is_that_of_slices(generator, tmp_path, monkeypatch):
    asked, trajectory = [], generator.trajectory

    def spy(x_T, known, *args, **options):
        asked.append(known)
        return trajectory(x_T, known, *args, **options)

    monkeypatch.setattr(generator, "trajectory", spy)
    words = ["--z", "9", "--count", "2", "--sampler", "ddpm", "--steps", "3", "--seed", "4"]
    made = jobs.two_labels(generator, words, ("NC", "AD"), tmp_path, nothing)
    for label, images in (("NC", made.images[:2]), ("AD", made.images[2:])):
        alone = jobs.slices(generator, [*words, "--label", label], tmp_path, nothing)
        np.testing.assert_allclose(images, alone.images, atol=1e-3)
    assert asked[0]["label"].tolist() == [1, 1, 0, 0] and len(set(asked[0]["z"].tolist())) == 1
    assert made.picture == tmp_path / "NC_AD.png" and Image.open(made.picture).width > 64
    with pytest.raises(runs.RunError, match="MCI"):
        jobs.two_labels(generator, words, ("NC", "MCI"), tmp_path, nothing)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--count 17", "--count 17: a page draws 16 at most"),
        ("--steps None", "--steps: must be a whole number"),
        ("--seed -1", "--seed"),
        ("--z 40", "--z must lie between"),
        ("--conditions height=3", "--conditions height"),
    ],
)
def test_mistakes_are_the_sentences_of_predict(words, said, generator, tmp_path):
    with pytest.raises(runs.RunError, match=said):
        jobs.slices(generator, [*HOW, *words.split()], tmp_path, nothing)
    assert not any(tmp_path.iterdir())


# ---- of slices that somebody brings ----------------------------------------------------------------------------------


def test_a_picture_and_a_volume_are_read_as_those_of_an_archive(generator, real, tmp_path):
    grey = figures.to_uint8(real.images)
    Image.fromarray(grey[0]).save(tmp_path / "one.png")
    found = jobs.opened(generator, tmp_path / "one.png", 2)
    np.testing.assert_allclose(found.images, real.images[:1], atol=1e-6)
    assert found.z.tolist() == [16]  # the middle of 0 .. 31
    stack = np.repeat(grey, 4, axis=0)
    stack[:, 16, 16] = 255  # white of the volume
    for axis in range(3):
        volumes.save_volume(tmp_path / "stack.nii.gz", stack, (1, 1, 1), axis)
        found = jobs.opened(generator, tmp_path / "stack.nii.gz", axis)
        np.testing.assert_allclose(found.images[..., 0], stack / 127.5 - 1, atol=0.02)
        assert found.z.tolist() == np.round(np.linspace(0, 31, 8)).tolist()
    known = found.known(generator, HOW)
    assert set(known["label"]) == {-1} and known["z"].dtype == known["label"].dtype == np.int32
    assert set(found.known(generator, [*HOW, "--label", "NC"])["label"]) == {1}
    np.testing.assert_array_equal(found.one(3, 7).z, [7])


def test_uploads_have_limits(generator, tmp_path, monkeypatch):
    def refused(path, data):
        (tmp_path / path).write_bytes(data)
        with pytest.raises(dataset.DataError) as refusal:
            jobs.opened(generator, tmp_path / path, 2)
        assert str(tmp_path) not in str(refusal.value)  # a name, as its owner knows it
        return str(refusal.value)

    assert "a.exe is none of .png" in refused("a.exe", b"")
    assert "a.png is empty" in refused("a.png", b"")
    assert "a.jpg is neither a PNG nor a JPEG" in refused("a.jpg", b"hello")
    assert "a.nii.gz cannot be read as a volume" in refused("a.nii.gz", b"hello")
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (100_000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0" + bytes(4)
    assert "declares 100000 x 100000 pixels" in refused("huge.png", huge)
    with monkeypatch.context() as patched:
        patched.setattr(single, "MOST_BYTES", 3)
        assert "a.png has 4 bytes, and 3 are the limit" in refused("a.png", b"1234")
    monkeypatch.setattr(single, "MOST_VOXELS", 100)
    brain = np.pad(np.ones((3, 3, 5), np.uint8), ((1, 1), (1, 1), (0, 0)))
    nibabel.save(nibabel.Nifti1Image(brain, np.eye(4)), tmp_path / "v.nii")
    assert "at most 100 voxels" in refused("v.nii", (tmp_path / "v.nii").read_bytes())
    assert "b.nii.gz unpacks to more than 100 voxels" in refused("b.nii.gz", gzip.compress(bytes(2**25)))
    monkeypatch.setitem(jobs.MOST, "brought", 1)
    monkeypatch.setattr(single, "MOST_VOXELS", 1000)
    assert "v.nii has 5 slices with brain, and 1 are the limit" in refused("v.nii", (tmp_path / "v.nii").read_bytes())


def test_what_is_made_of_brought_slices_is_what_the_generator_makes(generator, real, tmp_path):
    known = real.known(generator, HOW)
    options = {"sampler": "ddim", "steps": 4, "seed": 5}
    made = jobs.vary(generator, real, HOW, 0.5, tmp_path, nothing)
    expected = generator.renoised(real.images, known, 0.5, **options)[-1][0]
    np.testing.assert_array_equal(made.images, generator.decode(expected, known))
    shares = []
    made = jobs.differences(generator, real, HOW, 0.5, tmp_path, lambda share, frame: shares.append(share))
    expected, _ = generator.pseudo_healthy(real.images, known, 0.5, **options)
    np.testing.assert_array_equal(made.images, expected)
    np.testing.assert_allclose(shares, np.arange(1, 9) / 8)  # four noises, two calls each
    stored = np.asarray(nibabel.load(tmp_path / "differences.nii.gz").dataobj)
    expected = np.abs(made.images - real.images)[..., 0] / 2 * 255
    np.testing.assert_allclose(volumes.cut(stored, 2), expected, atol=0.51)
    made = jobs.reconstruct(generator, real, HOW, tmp_path, nothing)
    np.testing.assert_array_equal(made.images, generator.decode(generator.encode(real.images, known), known))
    assert {path.name for path in made.files} == {"reconstruct.png", "reconstruct.nii.gz"}


def test_what_is_painted_over_is_drawn_anew_and_nothing_else(generator, real, tmp_path):
    layer = np.zeros((64, 64, 4), np.uint8)
    layer[20:40, 24:44, 3] = 255
    area = jobs.painted([layer, np.zeros_like(layer)], 32)
    assert area.sum() == 100 and area[10:20, 12:22].all()
    one = real.one(0)
    made = jobs.inpaint(generator, one, HOW, area, tmp_path, nothing)
    np.testing.assert_array_equal(made.images[0, ~area], one.images[0, ~area])
    assert (made.images[0, area] != one.images[0, area]).mean() > 0.9
    with pytest.raises(runs.RunError, match="nothing is marked"):
        jobs.inpaint(generator, one, HOW, np.zeros_like(area), tmp_path, nothing)


# ---- one at a time ---------------------------------------------------------------------------------------------------

DONE = jobs.Result(np.zeros((2, 2), np.uint8), [], "", np.zeros((1, 2, 2, 1)), np.zeros(1))


def test_a_job_reports_and_ends_with_its_result_or_its_error():
    def job(show):
        show(0.5, None)
        return DONE

    assert list(jobs.streamed(job, threading.Event())) == [(0.5, None), DONE]
    with pytest.raises(ZeroDivisionError):
        list(jobs.streamed(lambda show: 1 / 0, threading.Event()))
    assert list(jobs.streamed(job, threading.Event()))[-1] is DONE  # the next one is not in its way


def test_jobs_run_one_at_a_time_and_end_when_they_are_stopped_or_nobody_listens():
    running, most = [0], [0]

    def job(show):
        running[0] += 1
        most[0] = max(most[0], running[0])
        try:
            for _ in range(10_000):
                time.sleep(0.001)
                show(0.1)
        finally:
            running[0] -= 1

    stops = [threading.Event() for _ in range(3)]
    reports = [jobs.streamed(job, stop) for stop in stops]
    assert next(reports[0]) == (0.1, None)
    threads = [threading.Thread(target=lambda r=r: pytest.raises(jobs.Stopped, list, r)) for r in reports[1:]]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert most == running == [1]
    reports[0].close()  # nobody listens
    for stop in stops[1:]:
        stop.set()
    for thread in threads:
        thread.join(timeout=10)
    assert most == [1] and running == [0]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def free():
    with socket.socket() as asked:
        asked.bind((app.HOST, 0))
        return asked.getsockname()[1]


def test_without_gradio_it_says_how_to_install_it(monkeypatch, capsys, free):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name != "gradio" and found(name, *more))
    assert app.main(["--run", str(RUN), "--port", str(free)]) == 2
    said = capsys.readouterr().err
    assert said == "app.py: the page needs gradio: run `pip install -r requirements-app.txt`\n"


def test_a_port_that_is_taken_is_one_sentence(capsys):
    with socket.socket() as taken:
        taken.bind((app.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert app.main(["--run", str(RUN), "--port", str(port)]) == 2
    assert f"--port {port} cannot be had" in capsys.readouterr().err


def test_the_page_is_built_and_says_the_words_of_predict(generator, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-app.txt")
    import page

    built = page.Page(generator, RUN, tmp_path)
    found = built.words("AD", 70, page.ANY, "ddim", 7, 1.5, 3)
    assert found == "--label AD --conditions age=70 --sampler ddim --steps 7 --seed 3 --guidance 1.5".split()
    assert built.words(page.ANY, None, page.ANY, "heun", 7, 1, 3) == "--sampler heun --steps 7 --seed 3".split()
    drawing = built._do(("bar", "picture", "files"), lambda folder, show: DONE)
    *_, last = drawing
    assert "value='1.000'" in last["bar"] and last["picture"] is DONE.picture
    *_, last = built._do(("bar", "picture", "files"), lambda folder, show: jobs.opened(generator, "a<b>.exe", 2))
    assert last == {
        "bar": page.mistake(
            dataset.DataError(
                f"a<b>.exe is none of {', '.join(single.SUFFIXES)}: give a picture, or a volume in one file."
            )
        )
    }
    assert "a&lt;b&gt;.exe" in last["bar"]
    assert (
        page.mistake(runs.RunError("--steps must be 1 -- or t-2"))
        == "<span role='alert'>steps must be 1 -- or t-2</span>"
    )


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-app.txt")
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("there is no chromium with its chromedriver: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1500,1600"):
        options.add_argument(f"--{flag}")
    options.add_argument("--enable-unsafe-swiftshader")  # the brush paints by WebGL
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    opened = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield opened
    opened.quit()


class Hand:
    """What somebody does who sits before the page."""

    def __init__(self, browser):
        self.browser = browser

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def until(self, selector, good=lambda element: True, seconds=600):
        """The first element that is there and good; fails where there is none in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for element in self.all(selector):
                if element.is_displayed() and good(element):
                    return element
            time.sleep(0.2)
        raise AssertionError(f"{selector}: {[element.text for element in self.all(selector)]}")

    def tab(self, name):
        self.until("button[role=tab]", lambda tab: tab.text == name).click()

    def said(self, words):
        return self.until(".bar", lambda bar: words in bar.text)

    def type(self, where, text):
        field = self.until(f"#{where} input")
        self.browser.execute_script("arguments[0].select()", field)
        field.send_keys(text)

    def files(self):
        return [link.get_attribute("href") for link in self.all("a[download]") if link.is_displayed()]


@pytest.mark.slow
def test_somebody_clicks_through_the_page(browser, generator, real, tmp_path, free):
    import json
    import urllib.request

    from selenium.webdriver.common.action_chains import ActionChains

    import page

    (tmp_path / "page").mkdir()
    opened = page.launch(generator, RUN, tmp_path / "page", app.HOST, free)
    hand = Hand(browser)
    try:
        browser.get(f"http://{app.HOST}:{free}/")
        hand.until("#draw")
        hand.type("steps", "4")
        hand.type("seed", "5")
        # slices: those of the command that the page shows
        hand.until("#draw").click()
        hand.said("4 slices;")
        shown = hand.until("#command textarea, #command input").get_attribute("value").split()
        assert shown[:4] == ["python", "predict.py", "--run", str(RUN)] and "--seed 5" in " ".join(shown)
        expected = jobs.slices(generator, shown[4:], tmp_path, nothing).files[0].read_bytes()
        taken = {url.split("/")[-1]: urllib.request.urlopen(url).read() for url in hand.files()}
        assert taken["dpm_solver_pp.png"] == expected and taken["dpm_solver_pp.gif"][:4] == b"GIF8"
        # a mistake is a sentence
        hand.type("steps", "0")
        hand.until("#draw").click()
        hand.said("steps: must be a whole number at least 1")
        hand.type("steps", "4")
        hand.tab("AD against NC")
        hand.until("#draw_labels").click()
        hand.said("NC above, AD below, from the same noise")
        # a head: another cut is another picture
        hand.tab("A person")
        hand.until("#draw_person").click()
        hand.said("slices of one head")
        before = hand.until("#view_coronal img").get_attribute("src")
        hand.type("cut_coronal", "9\n")
        hand.until("#view_coronal img", lambda image: image.get_attribute("src") != before)
        assert any(url.endswith(".nii.gz") for url in hand.files())
        # one's own slice
        Image.fromarray(figures.to_uint8(real.images)[0]).save(tmp_path / "own.png")
        (tmp_path / "bad.png").write_bytes(b"no picture")
        hand.tab("Your own slice")
        hand.until("#do")
        hand.all("#upload input[type=file]")[0].send_keys(str(tmp_path / "bad.png"))
        hand.said("bad.png is neither a PNG nor a JPEG")
        browser.refresh()
        hand.tab("Your own slice")
        hand.type("steps", "4")
        hand.until("#do")
        hand.all("#upload input[type=file]")[0].send_keys(str(tmp_path / "own.png"))
        hand.said("read")
        for number, said in enumerate(("foreground SSIM", "noised to t", "the mean of 4 denoisings")):
            hand.all("#task label")[number].click()
            hand.until("#do").click()
            hand.said(said)
        hand.all("#task label")[3].click()
        hand.until("#do").click()
        hand.said("nothing is marked")
        time.sleep(1)
        stroke = ActionChains(browser)
        stroke.move_to_element_with_offset(hand.until("#editor canvas"), -20, -20).click_and_hold()
        for _ in range(8):
            stroke.move_by_offset(6, 3)
        stroke.release().perform()
        time.sleep(1)
        hand.until("#do").click()
        hand.said("of the slice drawn anew")
        # nothing came from elsewhere
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
        ours = (f"http://{app.HOST}:{free}/", "data:", "blob:")
        assert asked and not {url for url in asked if not url.startswith(ours)}
    finally:
        opened.close(verbose=False)
