"""command.py: however a command line ends, it says one sentence, and its status says which kind of end it was."""

import errno
import gc
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import app
import command
import dataset
import evaluate
import predict
import train

ROOT = Path(__file__).resolve().parents[1]
OLD = ROOT / "tests" / "old_runs" / "vqvae"
posix = pytest.mark.skipif(os.name != "posix", reason="elsewhere a process cannot send itself such a signal")


@pytest.fixture(autouse=True)
def heard_signals():
    """Signals are heard, also where whatever started these tests ignores them, as a shell does in the background."""
    before = [signal.signal(number, signal.default_int_handler) for number in command.SIGNALS]
    yield
    for number, handler in zip(command.SIGNALS, before, strict=True):
        signal.signal(number, handler)


class Mistake(ValueError):
    pass


def ended(work, capsys, **options):
    """(status, what was said) of some work; every end leaves the handlers of signals as they were."""
    before = [signal.getsignal(number) for number in command.SIGNALS]
    status = command.run("x.py", work, (Mistake,), **options)
    assert [signal.getsignal(number) for number in command.SIGNALS] == before
    said = capsys.readouterr().err
    assert said.count("\n") == (1 if said else 0)
    return status, said.strip()


def raising(error):
    def work():
        raise error

    return work


def test_the_status_of_the_work_is_that_of_the_command(capsys):
    assert ended(lambda: 3, capsys) == (3, "")


def test_a_mistake_is_its_own_sentence(capsys):
    assert ended(raising(Mistake("--z: too many")), capsys) == (2, "x.py: --z: too many")


def test_a_fault_of_the_program_stays_a_traceback():
    with pytest.raises(ZeroDivisionError):
        command.run("x.py", lambda: 1 / 0, (Mistake,))


def test_too_little_memory_is_one_sentence(capsys):
    said = "x.py: there is not enough memory: close other programs, or ask for less at a time (a smaller --batch-size"
    works = (
        raising(MemoryError()),
        lambda: np.empty(2**57),
        raising(tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")),
    )
    for work in works:
        status, found = ended(work, capsys)
        assert status == 2 and found.startswith(said)


KINDS = "ENOSPC EDQUOT EACCES EPERM EROFS EEXIST ENOTDIR EISDIR ENOENT ENAMETOOLONG ELOOP"


@pytest.mark.parametrize("name", KINDS.split())
def test_an_error_of_the_system_names_the_path_and_the_way_out(name, capsys):
    number = getattr(errno, name)
    status, said = ended(raising(OSError(number, os.strerror(number), "some/file")), capsys)
    assert status == 2
    assert said == f"x.py: some/file: {os.strerror(number).lower()}: {command.MEND[number]}"


def test_an_error_of_the_system_may_know_two_paths_or_none(capsys):
    said = ended(raising(OSError(errno.EXDEV, os.strerror(errno.EXDEV), "a", None, "b")), capsys)[1]
    assert said.startswith("x.py: a -> b: invalid cross-device link: ")
    said = ended(raising(OSError(errno.ENOSPC, "Can't write\ndata, buf = 0x5")), capsys)[1]  # as HDF5 says it
    assert said.startswith("x.py: a file: no space left on device: make room")
    assert ended(raising(OSError("half a header")), capsys)[1].startswith("x.py: a file: half a header: ")


@posix
@pytest.mark.parametrize(
    "number, status, word", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_lets_the_work_clean_up_and_has_a_status_of_its_own(number, status, word, capsys):
    cleaned = []

    def work():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            cleaned.append(True)

    assert ended(work, capsys, hint="go on") == (status, f"x.py: {word}; go on")
    assert cleaned


@posix
def test_a_second_signal_during_the_clean_up_is_no_traceback(capsys):
    def work():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    assert ended(work, capsys) == (143, "x.py: terminated")


@posix
def test_a_signal_that_the_process_was_started_to_ignore_stays_so(capsys):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert ended(lambda: os.kill(os.getpid(), signal.SIGINT) or 0, capsys) == (0, "")
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_beside_the_main_one_does_its_work_as_well():
    found = []
    thread = threading.Thread(target=lambda: found.append(command.run("x.py", lambda: 0, ())))
    thread.start()
    thread.join()
    assert found == [0]


def process(*words):
    """A process of Python whose signals are not ignored, whatever started these tests."""

    def heard():
        for number in command.SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, preexec_fn=heard, **pipes)


@posix
@pytest.mark.parametrize("script", ["train.py", "predict.py", "evaluate.py"])
def test_an_interruption_during_the_imports_is_one_line(script, tmp_path):
    """The script as it is, with a `keras` that takes its time, and flags that are right."""
    for case in range(3):
        Image.new("L", (16, 16), 99).save(tmp_path / f"{case}_0.png")
    words = ["--data", str(tmp_path)] if script == "train.py" else ["--out", str(tmp_path), "--run", str(OLD)]
    (tmp_path / "keras.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "tensorflow.py").write_text((tmp_path / "keras.py").read_text())
    start = (
        f"import runpy, sys; sys.path[:0] = [{str(tmp_path)!r}, '.']; sys.argv = {[script, *words]}; "
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    started = process("-c", start)
    assert started.stdout.readline() == "importing\n"
    started.send_signal(signal.SIGINT)
    assert started.communicate(timeout=30)[1] == f"{script}: interrupted\n"
    assert started.returncode == 130


@posix
def test_a_signal_on_the_way_out_is_no_traceback_and_leaves_the_status():
    late = "import atexit, os, signal, command; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT)); "
    started = process("-c", late + "command.leave(3)")
    assert started.communicate(timeout=30)[1] == ""
    assert started.returncode == 3


WORKS = {  # that print, and the status with which they end where nobody reads
    "command.leave(command.run('x.py', lambda: [print(i) for i in range(10**6)] and 0, ()))": 141,
    "command.leave(command.run('x.py', lambda: print('few') or time.sleep(0.5) or print('more') or 0, ()))": 141,
    "command.from_the_start('x.py'); print('few'); time.sleep(0.5); raise SystemExit(0)": 0,  # as argparse's help
}


@posix
@pytest.mark.parametrize("work, status", WORKS.items(), ids=["much", "little", "help"])
def test_a_reader_who_goes_away_is_no_error(work, status):
    started = process("-c", f"import command, sys, time; sys.stdout = open(1, 'w', closefd=False); {work}")
    started.stdout.close()
    assert (started.stderr.read(), started.wait(timeout=30)) == ("", status)
    started.stderr.close()


@posix
@pytest.mark.parametrize("script", ["train.py", "predict.py", "evaluate.py"])
def test_a_folder_that_takes_no_files_is_one_sentence_before_the_imports(script):
    words = [f"--{'run' if script == 'train.py' else 'out'}", "/proc/x"]
    given = ["--run", OLD, *words] if script != "train.py" else words
    code = (
        "import runpy, sys; sys.path.insert(0, '.'); sys.modules['tensorflow'] = sys.modules['keras'] = None; "
        f"sys.argv = {[script, *map(str, given)]}; runpy.run_path({script!r}, run_name='__main__')"
    )
    started = process("-c", code)
    out, said = started.communicate(timeout=60)
    assert (out, started.returncode) == ("", 2)
    assert said.startswith(f"{script}: /proc: ") and said.count("\n") == 1


@pytest.mark.parametrize("main", [train.main, predict.main, evaluate.main])
@pytest.mark.parametrize("named", ["file", "file/run", "file/deep/run"])
def test_every_command_says_in_one_sentence_that_a_file_is_no_run(main, named, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["--run", str(tmp_path / named)]
    assert main(words if main is train.main else [*words, "--out", str(tmp_path / named)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].split(":")[0] in ("train.py", "predict.py", "evaluate.py")
    assert f"{tmp_path / 'file'}: not a directory: a file stands where a folder is needed" in said[0]


def test_tensorflows_chatter_is_kept_back_and_nothing_else(capfd):
    said = (
        "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
        "I0000 00:00:17.051 2747 port.cc:153] oneDNN custom operations are on.\n"
        "W0000 00:00:17.051 2747 gpu.cc:1] Cannot dlopen some GPU libraries.\n"
        "E0000 00:00:17.051 2747 cuda_platform.cc:52] failed call to cuInit: UNKNOWN ERROR (303)\n"
        "Traceback (most recent call last):\n"
    )
    with pytest.raises(ImportError), command._without_chatter():
        os.write(2, said.encode())
        os.write(command._stderr, b"ours\n")  # as a signal's line
        raise ImportError
    kept = capfd.readouterr().err
    assert kept.startswith("ours\nW0000") and kept.endswith("\nTraceback (most recent call last):\n")
    assert kept.count("\n") == 3


def test_the_garbage_collector_rests_while_modules_are_imported_and_no_longer():
    with pytest.raises(ImportError), command._without_garbage_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


@pytest.mark.parametrize("main", [train.main, predict.main, evaluate.main, app.main])
@pytest.mark.parametrize("name", ["..", ".", "x" * 300, "\udcff", "a\nb"])
def test_every_command_refuses_a_run_without_a_folder_of_its_own(main, name, capsys):
    assert main(["--run", name]) == 2
    said = capsys.readouterr().err
    assert "--run" in said and said.count("\n") == 1


@pytest.mark.parametrize("said", ["[]", "{"])
def test_train_refuses_a_damaged_tf_config(said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TF_CONFIG", said)
    assert train.main(["--run", str(tmp_path / "run"), "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith(f"train.py: TF_CONFIG={said!r} does not say")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's convolutions are for x86")
@pytest.mark.parametrize(("before", "after"), [({}, "1"), ({"TF_ENABLE_ONEDNN_OPTS": "0"}, "0")])
def test_convolutions_are_one_dnn_s_unless_the_user_says_otherwise(before, after):
    environment = {key: value for key, value in os.environ.items() if key != "TF_ENABLE_ONEDNN_OPTS"} | before
    ask = "import command, os; print(os.environ['TF_ENABLE_ONEDNN_OPTS'])"
    said = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert said.stdout.strip() == after


def test_keras_does_not_import_what_is_not_used():
    """Scikit-learn and matplotlib would be a third of the seconds before any work; both can be imported afterwards."""
    ask = (
        "import sys, command; command.load('x', 'tensorflow');"
        "print(*sorted({'matplotlib', 'sklearn', 'keras'} & set(sys.modules)));"
        "import matplotlib.pyplot, sklearn.linear_model"
    )
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, cwd=ROOT)
    assert (said.returncode, said.stdout.split()) == (0, ["keras"]), said.stderr


@pytest.mark.parametrize(
    ("main", "flags", "said"),
    [
        (train.main, "--image-size 1e3", "train.py: --image-size: invalid int value: '1e3'"),
        (train.main, "--replicas x", "train.py: --replicas: invalid int value: 'x'"),
        (evaluate.main, "--count nan", "evaluate.py: --count: invalid int value: 'nan'"),
        (evaluate.main, "score", "evaluate.py score: the following arguments are required: answers"),
        (train.main, "--run=", "train.py: a value after --run is empty"),
        (train.main, "--init-from ''", "train.py: a value after --init-from is empty"),
        (app.main, "--run ''", "app.py: a value after --run is empty"),
        (evaluate.main, "--out ' '", "evaluate.py: a value after --out is empty"),
        (dataset.main, "people --data a.zip --missing -4 ''", "dataset.py: a value after --missing is empty"),
        (dataset.main, "describe a.zip --axis 3", "dataset.py describe: --axis: invalid choice: 3"),
    ],
)
def test_a_flag_of_the_wrong_kind_is_one_line(main, flags, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(shlex.split(flags))
    shown = capsys.readouterr().err
    assert end.value.code == 2 and shown.startswith(said) and shown.count("\n") == 1 and "--help" in shown


@pytest.mark.skipif(os.name != "posix", reason="a shell closes them")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_traceback(closed, tmp_path):
    script = Path(dataset.__file__)
    line = f"{sys.executable} {script} describe nowhere.zip {closed}"
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == ("" if "2>&-" in closed else done.stderr.splitlines()[0] + "\n")
    line = f"{sys.executable} -c 'import command, sys; print(1); sys.exit(command.run(\"x\", lambda: 0, ()))' {closed}"
    done = subprocess.run(["sh", "-c", line], cwd=script.parent, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("backend", ["torch", "abacus"])
def test_another_backend_of_keras_is_not_asked_for(backend):
    """Training is TensorFlow's; who has another one for other work need not take it back."""
    line = "import command; command.load('x', 'keras'); import keras; print(keras.backend.backend())"
    environment = os.environ | {"KERAS_BACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", line], cwd=Path(dataset.__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "tensorflow\n", done.stderr
