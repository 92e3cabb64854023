"""Code in a process that has imported torch and computed nothing.

It is forked from one that imported torch once: seconds less each time than in an interpreter of its own.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

SERVER = """
import json, os, sys, traceback
import torch

def run(code, arguments, out):
    for number, name in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(out + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else end.code is not None
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    if not (child := os.fork()):
        status = run(*json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.kill)
    return server


def python(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As ``python -c code *arguments``; what it says goes through files in ``folder``."""
    if not hasattr(os, "fork"):
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)
    server, out = _server(), folder / "said"
    print(json.dumps([code, arguments, str(out)]), file=server.stdin, flush=True)
    status = int(server.stdout.readline())
    said = [Path(f"{out}.{name}").read_text() for name in ("out", "err")]
    return subprocess.CompletedProcess(code, status, *said)
