"""A benchmark's worker process: does one named piece of work each time its standard input says so.

The parent starts one worker per side, waits for `ready`, and then asks them in turn, so that a noisy machine disturbs
both sides alike. Imports nothing beyond the standard library: the peers run it in a virtual environment of their own.
"""

import json
import resource
import subprocess
import sys
import time


def serve(tasks, **about):
    """Answer requests until standard input ends: a task's name per line -> {"seconds", "peak_mib"} per line.

    Args:
        tasks: {name: callable doing one unit of work}; a dict that it returns joins the answer.
        about: facts that the first line tells (parameters, versions).
    """
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not break the protocol
    print(json.dumps({"ready": True, **about}), file=out, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        extra = tasks[line.strip()]()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            json.dumps({"seconds": seconds, "peak_mib": peak, **(extra if isinstance(extra, dict) else {})}),
            file=out,
            flush=True,
        )


class Worker:
    """One side of a comparison.

    Args:
        command: what starts it.

    Attributes:
        startup: seconds from process start until it is ready.
        about: what it says of itself.
    """

    def __init__(self, command, environment=None):
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.about = self._answer()
        self.startup = time.perf_counter() - start

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with status {self.process.wait()}: {' '.join(self.process.args)}")
        return json.loads(line)

    def run(self, task):
        """Do `task` once; returns {"seconds", "peak_mib", ...}."""
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()
