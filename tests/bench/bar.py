#!/usr/bin/env python3
"""The project's bar, measured: runs every case and prints one table with bar, measured and verdict.

usage: bar.py [-r RUNS] [-s SECONDS] [-k CASE,...] [--formats] [--keep DIR]

Each line names the bench-blk.sh run behind it. "raw against qcow2" and "two queues" compare outboard
with itself; the others compare with qemu-storage-daemon, and on raw files with fio, in the same turns.
With --formats the cases are the image formats other than qcow2, fully allocated, against their own data read as
a raw image (writes of qcow, qed and vpc: against a raw image) and against qemu-storage-daemon; `-k` chooses formats.
Two idle CPUs are needed. Takes about ten minutes with 3 runs of a second.
"""
import argparse, json, os, pathlib, statistics, subprocess, sys, tempfile

HERE = pathlib.Path(__file__).resolve().parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE / "../../target")) / "release"
BLKD = os.environ.get("BLKD", str(TARGET / "outboard-blkd"))


class Runs:
    """What bench-blk.sh wrote: one object per side and run."""

    def __init__(self, path):
        self.rows = [json.loads(line) for line in open(path)]

    def value(self, image, case, key, side="a"):
        return statistics.median(self.by_run(image, case, side, key).values())

    def by_run(self, image, case, side, key):
        rows = [r for r in self.rows if (r["image"], r["case"], r["side"]) == (image, case, side)]
        if not rows or any(r.get("errors") for r in rows):
            raise ValueError(f"{image} {case}: no result of side {side}, or requests failed")
        return {r["run"]: r.get(key, 0) for r in rows}

    def ratio(self, image, case, side="b", key="iops"):
        ours, theirs = (self.by_run(image, case, s, key) for s in ("a", side))
        return statistics.median(ours[run] / theirs[run] for run in ours if theirs.get(run))


def kilo(number):
    return f"{number / 1000:,.1f} k" if number < 100_000 else f"{number / 1000:,.0f} k"


def at_least(text, measured, bar):
    return text, measured >= bar


def times_peer(image, case, bar):
    def judge(runs):
        ratio = runs.ratio(image, case)
        ours, theirs = runs.value(image, case, "iops"), runs.value(image, case, "iops", "b")
        return at_least(f"{ratio:.2f} x ({kilo(ours)} : {kilo(theirs)})", ratio, bar)
    return f">= {bar} x qsd", judge


def iops(image, case, bar):
    def judge(runs):
        ours = runs.value(image, case, "iops")
        return at_least(f"{kilo(ours)} (qsd {kilo(runs.value(image, case, 'iops', 'b'))})", ours, bar)
    return f">= {kilo(bar)}", judge


def bandwidth(image, case, bar):
    def judge(runs):
        ours, theirs = (runs.value(image, case, "mibs", side) / 1024 for side in "ab")
        return at_least(f"{ours:.1f} GiB/s (qsd {theirs:.1f})", ours, bar)
    return f">= {bar} GiB/s", judge


def times_fio(image, case, bar, spdk):
    def judge(runs):
        ratio, ours = runs.ratio(image, case, "fio-io_uring"), runs.value(image, case, "iops")
        fio = runs.value(image, case, "iops", "fio-io_uring")
        return f"{ratio:.2f} x, {kilo(ours)} (fio {kilo(fio)})", ratio >= bar and ours >= spdk
    return f">= {bar} x fio, >= {kilo(spdk)}", judge


def cpu(image, case, bar):
    def judge(runs):
        ours, qsd, fio = (runs.value(image, case, "be_ns_per_io", s) for s in ("a", "b", "fio-io_uring"))
        return f"{ours:,.0f} ns (qsd {qsd:,.0f}, fio {fio:,.0f})", ours <= bar
    return f"<= {bar:,} ns", judge


def within(image, case, per_cent):
    def judge(runs):
        slower = 100 * (runs.ratio(image, case) - 1)
        ours, theirs = (runs.value(image, case, "iops", side) for side in "ab")
        return f"{slower:+.1f} % ({kilo(ours)} : {kilo(theirs)})", slower <= per_cent
    return f"within {per_cent} %", judge


def no_slower(image, case, per_cent):
    """The first side against the second."""
    def judge(runs):
        slower = 100 * (1 / runs.ratio(image, case) - 1)
        ours, theirs = (runs.value(image, case, "iops", side) for side in "ab")
        return f"{slower:+.1f} % ({kilo(ours)} : {kilo(theirs)})", slower <= per_cent
    return f"within {per_cent} %", judge


def memory(image, case, bar):
    def judge(runs):
        ours, theirs = (runs.value(image, case, "be_anon_kib", side) / 1024 for side in "ab")
        return f"{ours:.1f} MiB (qsd {theirs:.1f})", ours <= bar
    return f"<= {bar} MiB anonymous", judge


def latency(image, case, bar):
    def judge(runs):
        ours, theirs = (runs.value(image, case, "lat_p50_us", side) for side in "ab")
        return f"{ours:.1f} us (qsd {theirs:.1f})", ours <= bar
    return f"<= {bar} us", judge


# Key; bench-blk.sh's images, cases, further options and environment; the lines it gives.
CASES = [
    ("null", "null", "randread:4k:1:1,randread:4k:32:1", [], {}, [
        ("null, depth 1", times_peer("null", "randread:4k:1:1", 2.5)),
        ("null, depth 32", times_peer("null", "randread:4k:32:1", 2.0)),
    ]),
    ("shm-raw", "shm-raw", "randread:4k:1:1,randread:4k:32:1,read:1M:8:1", [], {}, [
        ("raw on tmpfs, depth 1", iops("shm-raw", "randread:4k:1:1", 400_000)),
        ("raw on tmpfs, depth 32", iops("shm-raw", "randread:4k:32:1", 800_000)),
        ("raw on tmpfs, 1 MiB, depth 8", bandwidth("shm-raw", "read:1M:8:1", 7)),
    ]),
    ("ext4-raw", "ext4-raw", "randread:4k:1:1,randread:4k:32:1,randread:4k:128:1", [], {}, [
        ("raw on ext4, O_DIRECT, depth 1", times_fio("ext4-raw", "randread:4k:1:1", 0.97, 19_500)),
        ("raw on ext4, O_DIRECT, depth 32", times_fio("ext4-raw", "randread:4k:32:1", 0.97, 84_000)),
        ("raw on ext4, O_DIRECT, depth 128", times_fio("ext4-raw", "randread:4k:128:1", 0.97, 100_000)),
        ("raw on ext4, CPU per request, depth 32", cpu("ext4-raw", "randread:4k:32:1", 2500)),
    ]),
    ("shm-qcow2", "shm-qcow2-asraw+shm-qcow2", "randread:4k:1:1,randread:4k:32:1", [], {}, [
        ("qcow2 on tmpfs against raw, depth 1", within("shm-qcow2-asraw+shm-qcow2", "randread:4k:1:1", 3)),
        ("qcow2 on tmpfs against raw, depth 32", within("shm-qcow2-asraw+shm-qcow2", "randread:4k:32:1", 3)),
    ]),
    ("1t", "shm-qcow2-1t", "randread:4k:32:1", [], {}, [
        ("qcow2, 1 TiB sparse, depth 32", iops("shm-qcow2-1t", "randread:4k:32:1", 200_000)),
        ("qcow2, 1 TiB sparse, the whole daemon's memory", memory("shm-qcow2-1t", "randread:4k:32:1", 64)),
    ]),
    ("chain", "shm-qcow2-chain", "randread:4k:32:1", [], {}, [
        ("qcow2, chain of four, depth 32", times_peer("shm-qcow2-chain", "randread:4k:32:1", 2.5)),
    ]),
    ("empty", "shm-qcow2-empty", "randwrite:4k:32:1,write:64k:32:1", [], {}, [
        ("cold allocation, 4 KiB random writes", times_peer("shm-qcow2-empty", "randwrite:4k:32:1", 3.0)),
        ("cold allocation, 64 KiB sequential writes", times_peer("shm-qcow2-empty", "write:64k:32:1", 1.5)),
    ]),
    ("luks", "shm-qcow2-luks", "randread:4k:32:1,randwrite:4k:32:1,read:1M:8:1,write:1M:8:1", [], {}, [
        ("LUKS, 4 KiB random reads, depth 32", times_peer("shm-qcow2-luks", "randread:4k:32:1", 1.0)),
        ("LUKS, 4 KiB random writes, depth 32", times_peer("shm-qcow2-luks", "randwrite:4k:32:1", 1.0)),
        ("LUKS, 1 MiB reads, depth 8", times_peer("shm-qcow2-luks", "read:1M:8:1", 1.0)),
        ("LUKS, 1 MiB writes, depth 8", times_peer("shm-qcow2-luks", "write:1M:8:1", 1.0)),
    ]),
    ("queues", "shm-raw", "read:64k:32:2", ["-w", "block", "-m", "one-iothread"],
     {"IOTHREADS": "2", "QSD": BLKD, "FE_THREADS": "2", "PIN_FE": "", "PIN_BE": "", "FIO": "off", "RUST_LOG": "warn"}, [
        ("two queues, two iothreads against one, 64 KiB", (
            "scales (> 1.2 x on two CPUs)",
            lambda runs: at_least(f"{runs.ratio('shm-raw', 'read:64k:32:2'):.2f} x", runs.ratio("shm-raw", "read:64k:32:2"), 1.2))),
    ]),
    ("packed", "null,shm-raw", "randread:4k:32:1", ["-n", "packed", "-m", "split"],
     {"QSD": BLKD, "BENCH_EXTRA_A": "--packed", "FIO": "off", "RUST_LOG": "warn"}, [
        ("packed rings against split ones, null, depth 32", no_slower("null", "randread:4k:32:1", 5)),
        ("packed rings against split ones, tmpfs, depth 32", no_slower("shm-raw", "randread:4k:32:1", 5)),
    ]),
    ("blocking", "null", "randread:4k:1:1", ["-w", "block"], {}, [
        ("front-end that sleeps, depth 1, p50", latency("null", "randread:4k:1:1", 35)),
    ]),
]


FORMAT_RUNS = {"randread:4k:32:1": "4 KiB random reads, depth 32", "randwrite:4k:32:1": "4 KiB random writes, depth 32",
               "read:1M:8:1": "1 MiB reads, depth 8", "write:1M:8:1": "1 MiB writes, depth 8"}


def format_cases():
    for name in ("luks", "parallels", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc"):
        image = f"shm-{name}"
        lines = [(f"{name}, {text}", times_peer(image, run, 1.5)) for run, text in FORMAT_RUNS.items()]
        yield name, image, ",".join(FORMAT_RUNS), [], {}, lines
        if name == "luks":   # encryption costs what it costs: raw is no measure of it
            continue
        same = f"{image}-asraw+{image}"
        # Tables that lie between the data must not be written over: writes are compared with a raw image of its own.
        for kind, pair in ("read", same), ("write", f"shm-raw+{image}" if name in ("qcow", "qed", "vpc") else same):
            runs = [run for run in FORMAT_RUNS if kind in run]
            lines = [(f"{name} against raw, {FORMAT_RUNS[run]}", within(pair, run, 5)) for run in runs]
            yield f"{name}:{kind}", pair, ",".join(runs), [], {}, lines


def bench(directory, key, images, cases, options, environment, arguments):
    out = directory / f"{key}.jsonl"
    command = [HERE / "bench-blk.sh", "-i", images, "-c", cases, "-r", str(arguments.r), "-s", str(arguments.s), "-o", out, *options]
    result = subprocess.run(command, env={**os.environ, **environment}, stdout=sys.stderr)
    return Runs(out), result.returncode


def startup(directory, arguments):
    command = [HERE / "startup.py", "--json", "-r", str(max(20, arguments.r))]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    (directory / "startup.json").write_text(json.dumps(found))
    ours, qsd = found["outboard"], found["qsd"]
    yield "start-up", "<= qsd", f"{ours['ms']:.1f} ms (qsd {qsd['ms']:.1f})", ours["ms"] <= qsd["ms"]
    yield ("idle RSS", "<= qsd", f"{ours['rss_kib'] / 1024:.1f} MiB (qsd {qsd['rss_kib'] / 1024:.1f})",
           ours["rss_kib"] <= qsd["rss_kib"])


def lines(directory, arguments):
    wanted = arguments.k.split(",") if arguments.k else None
    for key, images, cases, options, environment, bars in format_cases() if arguments.formats else CASES:
        if wanted and key.split(":")[0] not in wanted:
            continue
        runs, status = bench(directory, key, images, cases, options, environment, arguments)
        for name, (bar, judge) in bars:
            try:
                measured, met = judge(runs)
            except ValueError as error:
                measured, met = f"{error} (bench-blk.sh exit {status})", False
            yield name, bar, measured, met
    if not arguments.formats and (not wanted or "startup" in wanted):
        yield from startup(directory, arguments)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("-r", type=int, default=5)
    parser.add_argument("-s", type=float, default=1)
    parser.add_argument("-k", default="")
    parser.add_argument("--formats", action="store_true")
    parser.add_argument("--keep")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
        directory = pathlib.Path(arguments.keep or temporary).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        table = list(lines(directory, arguments))
    print("| case | bar | measured | verdict |\n|---|---|---|---|")
    for name, bar, measured, met in table:
        print(f"| {name} | {bar} | {measured} | {'met' if met else 'missed'} |")


if __name__ == "__main__":
    main()
