"""Runs one test, in a process that adopts and ends whatever the test leaves behind."""

import ctypes
import glob
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
# How long processes that a test left behind have to end by themselves.
GRACE_SECONDS = 0.5


@dataclass
class Job:
    """A test and where it runs."""

    name: str
    program: str
    reference: str
    environment: dict
    scratch: Path
    limit_seconds: float


@dataclass
class Result:
    """How a test ended: pass, fail or skip."""

    name: str
    verdict: str
    seconds: float = 0.0
    notes: list = field(default_factory=list)
    diff: list = field(default_factory=list)


def begin():
    """Makes this process one that runs tests."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(job):
    """Runs a test and compares its output with the reference."""
    folder = job.scratch / job.name
    folder.mkdir(parents=True)
    # The names of sockets must be short.
    sockets = Path(tempfile.mkdtemp(prefix="iot-", dir="/tmp"))
    log = job.scratch / f"{job.name}.out.bad"
    environment = dict(job.environment, TEST_DIR=str(folder), SOCK_DIR=str(sockets), TMPDIR=str(folder))
    began = time.monotonic()
    try:
        status = execute(job, environment, log)
    finally:
        left = reap(GRACE_SECONDS)
        unmount_below(folder, sockets)
        shutil.rmtree(sockets, ignore_errors=True)
    result = judge(job, status, log, folder)
    result.seconds = time.monotonic() - began
    if left and status is not None:
        result.notes.append(f"{left} stray processes ended")
    shutil.rmtree(folder, ignore_errors=True)
    return result


def execute(job, environment, log):
    """The exit status of the test; None when it took too long."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [job.program], cwd=os.path.dirname(job.program), env=environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )
        try:
            return process.wait(job.limit_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def judge(job, status, log, folder):
    """What a test's exit status and output say."""
    not_run, cases = folder / f"{job.name}.notrun", folder / f"{job.name}.casenotrun"
    if status == 0 and not_run.exists():
        return Result(job.name, "skip", notes=[not_run.read_text(errors="replace").strip()])
    # QEMU's own comparison, which does not see blanks at the ends of lines.
    from testrunner import file_diff

    result = Result(job.name, "pass", diff=file_diff(job.reference, str(log)))
    changed = sum(1 for line in result.diff[2:] if line[:1] in "+-")
    if status is None:
        result.notes.append(f"no end after {job.limit_seconds:.0f} s")
    elif status:
        result.notes.append(f"exit status {status}")
    if changed:
        result.notes.append(f"{changed} lines differ")
    if status != 0 or result.diff:
        result.verdict = "fail"
    if cases.exists():
        result.notes.append("cases not run: " + "; ".join(cases.read_text(errors="replace").splitlines()[:3]))
    return result


def children():
    """The children of this process that have not ended, adopted ones too."""
    found = []
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            text = Path(path).read_text()
        except OSError:
            continue
        state, parent = text[text.rindex(")") + 2:].split()[:2]
        if int(parent) == os.getpid() and state != "Z":
            found.append(int(text.split()[0]))
    return found


def reap(grace_seconds):
    """Waits for all children, then kills those that stay; returns how many had to be killed."""
    deadline, killed = time.monotonic() + grace_seconds, set()
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return len(killed)
        if time.monotonic() >= deadline:
            for child in children():
                killed.add(child)
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


def unmount_below(*folders):
    """Takes away the file systems that a test left mounted."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        point = line.split()[1].encode().decode("unicode_escape")
        if any(point.startswith(f"{folder}/") for folder in folders):
            subprocess.run(["umount", "-l", point], stderr=subprocess.DEVNULL, check=False)
