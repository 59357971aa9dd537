"""How a command line begins and ends: what TensorFlow reads from the environment; the status of its work, or one
sentence on stderr, never a traceback.

    0 done    2 a mistake that the user can mend    130 interrupted (Ctrl-C)    143 terminated (as batch systems do)
    141 nobody reads any more what is printed, as in `| head`: nothing is said then

`train.py`, `predict.py` and `evaluate.py` call `from_the_start` first, `run` for their work, `load` for slow imports.
"""

import argparse
import atexit
import contextlib
import errno
import gc
import importlib
import os
import platform
import re
import signal
import sys
import tempfile
import threading

# What Keras and TensorFlow read when they are imported, which is later.
os.environ["KERAS_BACKEND"] = "tensorflow"  # our training is, whatever stands in ~/.keras
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if platform.machine() in ("x86_64", "AMD64"):
    # By itself it takes oneDNN's convolutions only where the processor has instructions for neural networks
    # (AVX512-VNNI, AMX, ...). With AVX2 alone they are more than twice as fast as its own, too: docs/speed.md.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

# Where a stream is closed, as by `>&-`, nobody reads what is said, and no other file may take its number.
for _number, _name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, _name) is None:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_RDWR), _number)
        setattr(sys, _name, open(os.devnull, "w" if _number else "r"))

SIGNALS = (signal.SIGINT, signal.SIGTERM)
MEND = {  # what to do about an error of the system; otherwise: try again
    errno.ENOSPC: "make room on it, and run the same command again",
    errno.EDQUOT: "make room in your quota, and run the same command again",
    errno.EACCES: "allow it to be used, or name another place",
    errno.EPERM: "allow it to be used, or name another place",
    errno.EROFS: "name a place that can be written to",
    errno.EEXIST: "move it away, or name another place",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away, or name another place",
    errno.EISDIR: "a folder stands where a file is needed: move it away, or name another place",
    errno.ENOENT: "put it back, or name another place, and run the same command again",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links lead in a circle: mend them, or name another place",
}


OUT_OF_MEMORY = ("MemoryError", "_ArrayMemoryError", "ResourceExhaustedError")  # Python's, NumPy's, TensorFlow's
NO_MEMORY = (
    "there is not enough memory: close other programs, or ask for less at a time (a smaller --batch-size in training, "
    "a smaller --count in drawing)"
)

# What TensorFlow's C++ says on its way up, whatever level of its log is asked for: that it is there, and that there is
# no GPU. Warnings and errors stay, but that of a driver that is not installed.
CHATTER = re.compile(
    rb"I0000 .*|WARNING: All log messages before absl.*|To enable the following instructions:.*"
    rb"|E0000 .*cuInit.*"
)
_stderr = 2  # where a sentence of ours goes, also while TensorFlow is not listened to


class Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong with a flag, and does not list all the others."""

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does; and an empty value, as a shell makes it of an unset variable, is a mistake for any flag."""
        args, place = sys.argv[1:] if args is None else list(args), "at the beginning"
        for text in args:
            place = f"after {text.partition('=')[0]}" if re.match(r"--?[A-Za-z]", text) else place
            if not text.strip() or re.fullmatch(r"--[\w-]+=\s*", text):
                self.error(f"a value {place} is empty: give one, or leave it out")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.exit(
            2, f"{self.prog}: {message.removeprefix('argument ')} (`python {self.prog} --help` lists the flags)\n"
        )


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, with a status of its own."""


def run(name, work, mistakes, hint=""):
    """Do the work of a command line.

    Args:
        name: of the command, with which its sentence begins.
        work: callable () -> exit status.
        mistakes: classes of exceptions that are one sentence for the user.
        hint: what is said after "interrupted".

    Returns:
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end the work
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _signals_raise():
            status = work()
            sys.stdout.flush()  # here, not on the way out: there nothing could be done about it
            return status
    except mistakes as mistake:
        said, status = str(mistake), 2
    except BrokenPipeError:
        _print_nowhere()
        return 141
    except OSError as error:
        said, status = sentence(error), 2
    except KeyboardInterrupt as stop:
        said, status = _stopped(stop, hint)
    except Exception as error:
        if type(error).__name__ not in OUT_OF_MEMORY:
            raise
        said, status = NO_MEMORY, 2
    print(f"{name}: {said}", file=sys.stderr)
    return status


def sentence(error):
    """What an error of the system means to the user: which path, what is wrong with it, and the way out."""
    where = " -> ".join(os.fsdecode(path) for path in (error.filename, error.filename2) if path is not None)
    said = os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
    what = " ".join(said.lower().split())  # libraries say more than one line
    return f"{where or 'a file'}: {what}: {MEND.get(error.errno, 'mend that, and run the same command again')}"


def from_the_start(name):
    """Let a signal end the process with one line from now on: during imports an exception may be lost, or be shown.

    And what is left to print on the way out, as after `--help`, may find that nobody reads any more.

    Returns:
        What the signals did before, as `load` puts it back.
    """

    def end(number, frame):
        os.write(_stderr, f"{name}: interrupted\n".encode())
        os._exit(128 + number)

    atexit.register(_print_what_is_left)
    return _handle(end)


def _print_what_is_left():
    try:
        sys.stdout.flush()
    except OSError:
        _print_nowhere()


def _print_nowhere():
    """What is still to be printed would end in an error of its own when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load(name, module):
    """Import what takes seconds, once the flags are right; a signal meanwhile is as `from_the_start` has it."""
    main = threading.current_thread() is threading.main_thread()
    before = from_the_start(name) if main else {}
    try:
        if "tensorflow" not in sys.modules:
            with _without_chatter(), _as_if_absent("matplotlib", "sklearn"), _without_garbage_collection():
                import keras  # noqa: F401  (TensorFlow imports it by itself, or later)
                import tensorflow as tf

                tf.config.list_physical_devices()  # looks for GPUs, and says so
        importlib.import_module(module)
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def _as_if_absent(*names):
    """Nobody can import these modules: Keras does where it can, for what is not used here, a third of its seconds."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # to import None is an ImportError
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextlib.contextmanager
def _without_garbage_collection():
    """Without the garbage collector: what is imported stays, and to look through it takes a quarter of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _without_chatter():
    """Keep back what is written to stderr meanwhile, and then write it there, but for CHATTER.

    C++ writes past Python, so it is the file descriptor that is turned aside.
    """
    global _stderr
    _stderr = os.dup(2)
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(_stderr, 2)
            os.close(_stderr)
            _stderr = 2
            heard.seek(0)
            for line in heard:
                if line.strip() and not CHATTER.match(line):
                    os.write(2, line)


def leave(status):
    """End the process; a signal on the way out finds nothing to interrupt, and cannot change the status."""
    _handle(lambda number, frame: os._exit(status))
    sys.exit(status)


def _stopped(stop, hint):
    word, status = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
    return word + (f"; {hint}" if hint else ""), status


def _handle(handler):
    """Set the handler of both signals, but of those that this process was started to ignore; returns those before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, old in before.items():
        if old is not signal.SIG_IGN:
            signal.signal(number, handler)
    return before


@contextlib.contextmanager
def _signals_raise():
    """Signals raise KeyboardInterrupt, SIGTERM its kind `Terminated`; only the main thread of a process has them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before = _handle(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
