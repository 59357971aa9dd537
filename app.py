"""Command line: a page in the browser, on this machine alone, that draws with a trained run.

python app.py                      the run that was trained last, at http://127.0.0.1:7860
python app.py --run oasis-256      another run
python app.py --port 8000          another port

Slices out of noise, one label against another, a head in three planes, and what is made of slices that you bring. What
it needs beyond the rest: `pip install -r requirements-app.txt`.
"""

import argparse
import importlib.util
import os
import socket
import sys
import tempfile
import threading
from pathlib import Path

import command

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: it is to ask nothing of the internet
if __name__ == "__main__":
    command.from_the_start("app.py")

import dataset
from ldm.later import Later
from ldm.training import distribution, records, runs

page, generators = Later("page"), Later("generator")

HOST = "127.0.0.1"


def parser():
    p = command.Parser(prog="app.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", help="name of the run (default: the one that was trained last)")
    p.add_argument("--port", type=int, default=7860, help="of the page (default: 7860)")
    return p


def main(argv=None):
    """Run the command line; returns the exit status: 0 done, 2 a user's mistake, 130 or 143 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return command.run("app.py", lambda: do(argv), (dataset.DataError, runs.RunError))


def do(argv):
    """Open the page, until it is interrupted."""
    flags = parser().parse_args(argv)
    run = runs.folder(flags.run) if flags.run is not None else runs.newest("diffusion")
    runs.refuse_no_run(run)
    runs.refuse_missing(run / "diffusion.keras")
    records.refuse_damaged(run, "autoencoder", "diffusion")
    refuse_taken(flags.port)
    if not importlib.util.find_spec("gradio"):
        raise runs.RunError("the page needs gradio: run `pip install -r requirements-app.txt`")
    command.load("app.py", "modules")
    print(f"{run}: {distribution.set_precision()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="app-") as folder:
        opened = page.launch(generators.Generator(run), run, Path(folder), HOST, flags.port)
        print(f"http://{HOST}:{flags.port} (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        finally:
            opened.close(verbose=False)
    return 0


def refuse_taken(port):
    """Refuse a port on which the page cannot be.

    Raises:
        RunError: if it is none, or another program has it.
    """
    if not 0 < port < 2**16:
        raise runs.RunError(f"--port {port}: must lie between 1 and {2**16 - 1}")
    try:
        with socket.socket() as asked:
            asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            asked.bind((HOST, port))
    except OSError as error:
        raise runs.RunError(f"--port {port} cannot be had ({error.strerror.lower()}): name another one") from error


if __name__ == "__main__":
    command.leave(main())
