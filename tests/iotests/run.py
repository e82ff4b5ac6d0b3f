"""Runs QEMU's iotests with given programs: chooses tests, spreads them over workers, prints how they ended.

QEMU's harness is used for what a test sees (`testenv.py`: formats, options, secrets) and for finding tests; running them is
done here (`worker.py`), so that a test has a time limit, a folder of its own, and leaves no process behind.
"""

import argparse
import csv
import os
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import programs
import worker

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "target/iotests/qemu/tests/qemu-iotests"
DIFF_LINES = 80


def arguments():
    """The command line; `scripts/iotests` has its description."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("format", nargs="?", default="raw")
    parser.add_argument("tests", nargs="*")
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--must-pass", action="store_true")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--diff", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=180.0)
    return parser.parse_args()


def recorded():
    """Format -> test -> what the reference programs did."""
    with open(HERE / "reference.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = [label for label in rows[0] if label != "test"]
    return {label: {row["test"]: row[label] for row in rows if row[label]} for label in labels}


def listed(label):
    """The tests that must pass."""
    path = HERE / "must-pass" / label.replace(":", "-")
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def short(test):
    """The name of a test that may lie in the folder `tests`."""
    return test.removeprefix("tests/")


def test_environment(label):
    """QEMU's description of the environment of tests for a format."""
    from testenv import TestEnv

    image_format, _, protocol = label.partition(":")
    return TestEnv(imgfmt=image_format, imgproto=protocol or "file", aiomode="threads")


def expected_output(test, environment):
    """The file with the output that a test should have."""
    candidates = [f"{test}.out.nocache"] if environment.cachemode == "none" else []
    candidates += [f"{test}.out.{environment.imgfmt}", f"{test}.{environment.qemu_default_machine}.out", f"{test}.out"]
    return next((name for name in candidates if os.path.isfile(name)), None)


def jobs_for(label, names, options, scratch):
    """The tests to run for a format."""
    from findtests import TestFinder

    environment = test_environment(label)
    finder = TestFinder(test_dir=str(SOURCE))
    jobs = []
    for test in dict.fromkeys(map(finder.parse_test_name, names)):
        program = str((SOURCE / test).resolve())
        variables = environment.prepare_subprocess([program])
        reference = expected_output(test, environment)
        if reference is None:
            raise programs.Missing(f"test {test} has no reference for {label}")
        folder = scratch / label.replace(":", "-")
        jobs.append(worker.Job(short(test), program, str(SOURCE / reference), variables, folder, options.limit))
    return jobs


def selection(options, reference):
    """Format -> names of the tests to run."""
    if options.must_pass:
        files = sorted(path.name.replace("-", ":") for path in (HERE / "must-pass").iterdir())
        return {label: listed(label) for label in files}
    if options.tests and options.tests != ["all"]:
        return {options.format: options.tests}
    known = reference.get(options.format)
    if known is None:
        raise programs.Missing(f"no reference for {options.format}: name the tests")
    passed = [test for test, verdict in known.items() if verdict == "pass"]
    return {options.format: list(known) if options.tests else passed}


def prepare(chosen, scratch):
    """Sets the variables that QEMU's harness reads, and makes its modules known."""
    folder = scratch / "bin"
    folder.mkdir()
    os.environ.update(programs.install(folder, chosen))
    os.environ.update(TEST_DIR=str(scratch / "unused"), SOCK_DIR=str(scratch / "unused"))
    # Images name others by NBD here, which outboard does not follow unless told to.
    os.environ.update(OUTBOARD_ALLOW_DRIVERS="nbd")
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", LANG="C", LC_ALL="C.UTF-8")
    for name in ("PYTHONPATH", "QEMU_OPTIONS", "GDB_OPTIONS", "VALGRIND_QEMU", "IMGOPTS"):
        os.environ.pop(name, None)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(SOURCE))
    # The harness finds QEMU's Python library from where its own program would be.
    sys.argv[0] = str(SOURCE / "check")
    os.chdir(SOURCE)


def run_all(label, jobs, options, known):
    """Runs tests of one format and prints each as it ends; returns the counts by verdict."""
    counts = {"pass": 0, "fail": 0, "skip": 0}
    pool = ProcessPoolExecutor(max_workers=options.jobs, initializer=worker.begin)
    with pool:
        futures = [pool.submit(worker.run, job) for job in jobs]
        try:
            for future in as_completed(futures):
                result = future.result()
                counts[result.verdict] += 1
                show(label, result, known.get(result.name, "unknown"), options)
        except KeyboardInterrupt:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return counts


def show(label, result, reference, options):
    """Prints how a test ended."""
    verdict = result.verdict.upper() if result.verdict == "fail" else result.verdict
    notes = "; ".join(result.notes)
    line = f"{label:8} {result.name:30} {verdict:5} reference {reference:8} {result.seconds:6.1f} s  {notes}"
    print(line.rstrip(), flush=True)
    if options.diff:
        for line in result.diff[:DIFF_LINES]:
            print(f"    {line}")


def main():
    options = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    scratch = Path(tempfile.mkdtemp(prefix="iotests-", dir="/tmp"))
    if options.keep:
        scratch = options.keep.resolve()
        scratch.mkdir(parents=True)
    total = {"pass": 0, "fail": 0, "skip": 0}
    try:
        chosen = programs.commands(options.reference, options.build.resolve())
        prepare(chosen, scratch)
        reference = recorded()
        print("programs:", " ".join(f"{name}={command}" for name, command in chosen.items()))
        for label, names in selection(options, reference).items():
            jobs = jobs_for(label, names, options, scratch)
            for verdict, count in run_all(label, jobs, options, reference.get(label, {})).items():
                total[verdict] += count
    except (programs.Missing, ValueError) as error:
        print(f"iotests: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    finally:
        if options.keep:
            print(f"outputs: {scratch}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    print(f"{total['pass']} passed, {total['fail']} failed, {total['skip']} skipped")
    # What must pass must not be skipped either.
    return 1 if total["fail"] or (options.must_pass and total["skip"]) else 0


if __name__ == "__main__":
    sys.exit(main())
