"""Console scripts in children of one process that has imported torch and mergekit already.

Most of a small merge's time goes to its imports. A child of such a process has them, the start-up
file's work included, and is otherwise a process like any other. Where imports, environments or
start-up themselves are tested, a script is started anew.
"""

import multiprocessing
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
import weakref

#: Imported once, before the first script is run.
PRELOADED = [
    "mergekit.scripts.run_yaml",
    "mergekit.scripts.multimerge",
    "mergekit.scripts.merge_raw_pytorch",
    "mergekit.plan",
    "transformers",
    "optuna",
    "matplotlib.figure",
    "compiled",  # beside this file
]
#: Beginnings of the variables that imports read; one of them is set by an import.
READ = ("CUDA", "HF_", "HOME", "LD_", "MERGEKIT", "OMP", "PATH", "PYTHON", "TMPDIR", "XDG")
SET = "HF_XET_HIGH_PERFORMANCE"
#: Threads of torch in every script.
THREADS = {"OMP_NUM_THREADS": "2"}

_at_start = {}


def run(script, arguments, environment):
    """Run a script of this environment as ``subprocess.run`` would, with its output as text."""
    command = [str(script), *map(str, arguments)]
    whole = {**os.environ, **THREADS, **environment}
    # A process that has looked for GPUs has none to give to its children.
    on_gpu = {"--cuda", "--multi-gpu"} & set(command)
    if set(environment) - set(THREADS) or on_gpu or not _can_fork():
        return subprocess.run(command, capture_output=True, text=True, env=whole, check=False)
    script = Script(command, whole)
    said = script.communicate()
    return subprocess.CompletedProcess(command, script.returncode, *said)


def started(script, arguments):
    """Start a script as ``subprocess.Popen`` would, its errors in its output."""
    command = [str(script), *map(str, arguments)]
    whole = {**os.environ, **THREADS}
    if not _can_fork():
        pipe, both = subprocess.PIPE, subprocess.STDOUT
        return subprocess.Popen(
            command, stdout=pipe, stderr=both, text=True, env=whole, start_new_session=True
        )
    return Script(command, whole, apart=True)


def inside(monkeypatch, module):
    """Let the commands that a module runs by ``subprocess.run`` be scripts of :func:`run`."""
    lock = threading.Lock()  # multiprocessing's children are started and waited for by one thread

    def ran(command, **options):
        assert options == {"capture_output": True, "text": True, "check": False}
        with lock:
            return run(command[0], command[1:], {})

    monkeypatch.setattr(module, "subprocess", types.SimpleNamespace(run=ran))


class Script:
    """As much of ``subprocess.Popen`` as tests use.

    A process that is ``apart`` has a session of its own, and its errors are in its output.
    """

    def __init__(self, command, environment, *, apart=False):
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder)
        self._said = [pathlib.Path(folder, name) for name in ("out", "out" if apart else "err")]
        self._child = multiprocessing.get_context("forkserver").Process(
            target=_script,
            args=(command, pathlib.Path.cwd(), environment, self._said, apart),
            daemon=True,
        )
        self._child.start()
        self.pid = self._child.pid
        while apart and self.poll() is None and not self._is_apart():
            time.sleep(0.001)

    def _is_apart(self):
        try:
            return os.getpgid(self.pid) == self.pid
        except ProcessLookupError:
            return False

    def poll(self):
        return self._child.exitcode

    returncode = property(poll)

    def wait(self, timeout=None):
        self._child.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._child.name, timeout)

    def communicate(self, timeout=None):
        self.wait(timeout)
        return [file.read_text(encoding="utf-8") if file.exists() else "" for file in self._said]

    def terminate(self):
        self._child.terminate()


def _can_fork():
    """Whether the process that is forked was started in the environment of now."""
    if sys.platform != "linux":
        return False
    now = {n: v for n, v in os.environ.items() if n.startswith(READ) and n != SET}
    if not _at_start:
        _at_start.update(now)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        before = os.environ.copy()
        os.environ.update(THREADS, PYTHONPATH=str(pathlib.Path(__file__).parent))
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)
    return now == _at_start


def _script(command, folder, environment, said, apart):
    """In the child: become the script."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if apart:
        os.setsid()
    for number, file in zip((1, 2), said, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = command
    sys.path[0] = str(pathlib.Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")
