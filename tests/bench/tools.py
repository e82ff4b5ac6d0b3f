#!/usr/bin/env python3
"""outboard-img against qemu-img: convert, compressed convert, compare, with time and CPU time.

usage: scripts/bench tools [-r RUNS] [-m MIB] [-k CASE,...] [-d DIR,...] [--pin CPUS] [-o OUT.jsonl]

The contestants of a case take turns on the same images: A B A B. A ratio above 1 means that outboard-img needs less; it is the median
of the ratios of all rounds. Time decides about the bar; CPU time (user and system, of the process and its threads) is told beside it,
as is all that holds on a machine that does something else, too. Images of MIB bytes are made by qemu-img in each DIR and deleted at
the end; new files are deleted between the runs, outside of what is measured. Cases are NAME-CONTENT: NAME one of raw-raw, raw-qcow2,
qcow2-raw, qcow2-qcow2 (convert), raw-FORMAT and FORMAT-raw for luks, parallels, qcow, qed, vdi, vhdx, vmdk and vpc (`-k formats` is
all of these with full), raw-compressed, compressed-raw, offload (convert -C), compare, compare-qcow2; CONTENT full (all
data), zeroes (a third of all data is zero bytes that were written) or sparse (an eighth is data).
"""
import argparse, json, os, pathlib, random, statistics, subprocess, sys, tempfile, time

HERE = pathlib.Path(__file__).resolve().parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE / "../../target")).resolve() / "release"
OURS = os.environ.get("OUTBOARD_IMG", str(TARGET / "outboard-img"))
PEER = os.environ.get("QEMU_IMG", "qemu-img")
SIDES = {"outboard": OURS, "qemu": PEER}
CHUNK = 64 << 10
# What a name does: format of the source, arguments in front of the operands, whether it makes a file, bar.
NAMES = {
    "raw-raw": ("raw", ["convert", "-f", "raw", "-O", "raw"], True, 1.5),
    "raw-qcow2": ("raw", ["convert", "-f", "raw", "-O", "qcow2"], True, 1.5),
    "qcow2-raw": ("qcow2", ["convert", "-f", "qcow2", "-O", "raw"], True, 1.5),
    "qcow2-qcow2": ("qcow2", ["convert", "-f", "qcow2", "-O", "qcow2"], True, 1.5),
    "raw-compressed": ("raw", ["convert", "-c", "-f", "raw", "-O", "qcow2"], True, 2.0),
    "compressed-raw": ("compressed", ["convert", "-f", "qcow2", "-O", "raw"], True, 1.5),
    "offload": ("raw", ["convert", "-C", "-f", "raw", "-O", "raw"], True, 1.5),
    "compare": ("raw", ["compare", "-f", "raw", "-F", "raw"], False, 1.5),
    "compare-qcow2": ("qcow2", ["compare", "-f", "qcow2", "-F", "raw"], False, 1.5),
}
FORMATS = ("luks", "parallels", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc")
SECRET = ["--object", "secret,id=key,data=benchmark"]
# What making an image takes beside its format.
MAKING = {"luks": [*SECRET, "-o", "key-secret=key,iter-time=10"], "vpc": ["-o", "force_size=on"], "compressed": ["-c"]}
for name in FORMATS:
    NAMES[f"raw-{name}"] = ("raw", ["convert", *MAKING.get(name, []), "-f", "raw", "-O", name], True, 1.2)
    reading = [*SECRET, "--image-opts"] if name == "luks" else ["-f", name]
    NAMES[f"{name}-raw"] = (name, ["convert", *reading, "-O", "raw"], True, 1.2)
CONTENTS = ("full", "zeroes", "sparse")
DEFAULT = [f"{name}-{content}" for name in ("raw-raw", "raw-qcow2", "qcow2-raw", "qcow2-qcow2", "compare", "compare-qcow2")
           for content in ("full", "sparse")] + ["raw-raw-zeroes", "raw-qcow2-zeroes", "raw-compressed-full", "compressed-raw-full",
                                                 "offload-full"]


def data(chance):
    """Bytes that deflate to about a half, no two chunks alike: words of a small vocabulary among noise."""
    words = b" ".join(b"word%d" % chance.randrange(2000) for _ in range(CHUNK // 16))
    return (words + chance.randbytes(CHUNK))[:CHUNK]


def make(path, content, length):
    chance = random.Random(content)
    with open(path, "wb") as file:
        file.truncate(length)
        for number, at in enumerate(range(0, length, CHUNK)):
            if content == "sparse" and number // 4 % 8 != 0:
                continue
            file.seek(at)
            file.write(bytes(CHUNK) if content == "zeroes" and number % 3 == 0 else data(chance))


def run(command, pin):
    """Seconds of time and of CPU time."""
    def pinned():
        os.sched_setaffinity(0, pin)
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=pinned if pin else None)
    error = child.stderr.read()
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.monotonic() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {child.returncode}: {error.decode(errors='replace').strip()}")
    return {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime}


class Images:
    """The sources of a directory, made when they are first needed."""

    def __init__(self, directory, length):
        self.directory, self.length = pathlib.Path(directory), length

    def path(self, kind, content):
        path = self.directory / f"{content}.{kind}"
        if path.exists():
            return str(path)
        if kind == "raw":
            make(path, content, self.length)
        else:
            name = "qcow2" if kind == "compressed" else kind
            command = [PEER, "convert", *MAKING.get(kind, []), "-f", "raw", "-O", name, self.path("raw", content), str(path)]
            subprocess.run(command, check=True)
        # What is still to be written would be charged to whoever comes next.
        subprocess.run(["sync", str(path)], check=True)
        return str(path)


def measure(case, images, runs, pin):
    name, content = case.rsplit("-", 1)
    kind, arguments, makes, _ = NAMES[name]
    source = images.path(kind, content)
    if kind == "luks":
        source = f"driver=luks,key-secret=key,file.filename={source}"
    target = str(images.directory / "target") if makes else images.path("raw", content)
    if not makes and kind == "raw":
        target = str(images.directory / "copy.raw")
        subprocess.run([PEER, "convert", "-f", "raw", "-O", "raw", source, target], check=True)
    try:
        for turn in range(-1, runs):
            for side, program in SIDES.items():
                if makes:
                    pathlib.Path(target).unlink(missing_ok=True)
                result = run([program, *arguments, source, target], pin)
                # The first round warms caches.
                if turn >= 0:
                    yield {"case": case, "side": side, "run": turn, **result, "load": os.getloadavg()[0]}
    finally:
        if target != images.path("raw", content):
            pathlib.Path(target).unlink(missing_ok=True)


def line(place, case, rows, length):
    def values(side, key):
        return [row[key] for row in rows if row["side"] == side]
    ratios = {key: statistics.median(b / max(a, 1e-4) for a, b in zip(values("outboard", key), values("qemu", key)))
              for key in ("seconds", "cpu")}
    bar = NAMES[case.rsplit("-", 1)[0]][3]
    speed = [length / 2**20 / statistics.median(values(side, "seconds")) for side in SIDES]
    cpu = [statistics.median(values(side, "cpu")) * 1000 for side in SIDES]
    met = ratios["seconds"] >= bar
    return (f"| {case} | {place} | >= {bar} x | {ratios['seconds']:.2f} x ({speed[0]:,.0f} : {speed[1]:,.0f}) | "
            f"{ratios['cpu']:.2f} x ({cpu[0]:,.0f} : {cpu[1]:,.0f}) | {'met' if met else 'missed'} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", "--runs", type=int, default=5)
    parser.add_argument("-m", "--mib", type=int, default=512)
    parser.add_argument("-k", "--cases", default=",".join(DEFAULT))
    parser.add_argument("-d", "--directories", default=f"/dev/shm,{TARGET.parent}")
    parser.add_argument("--pin", help="CPUs for both sides, such as 0 or 0,1")
    parser.add_argument("-o", "--output", help="every single result, one JSON object per line")
    options = parser.parse_args()
    cases, length = options.cases.split(","), options.mib << 20
    if options.cases == "formats":
        cases = [f"{case}-full" for name in FORMATS for case in (f"raw-{name}", f"{name}-raw")]
    for case in cases:
        name, _, content = case.rpartition("-")
        if name not in NAMES or content not in CONTENTS:
            parser.error(f"no case {case}")
    pin = {int(number) for number in options.pin.split(",")} if options.pin else None
    everything, failed = [], 0
    print("| case | on | bar | speed, ours : qemu-img, MiB/s | CPU, ours : qemu-img, ms | verdict |\n|---|---|---|---|---|---|")
    for place in options.directories.split(","):
        kind = subprocess.run(["stat", "-f", "-c", "%T", place], capture_output=True, text=True).stdout.strip()
        with tempfile.TemporaryDirectory(prefix="outboard-bench.", dir=place) as directory:
            images = Images(directory, length)
            for case in cases:
                try:
                    rows = list(measure(case, images, options.runs, pin))
                except RuntimeError as error:   # the other cases go on
                    print(f"{case}: {error}", file=sys.stderr)
                    failed += 1
                    continue
                everything += [{"on": place, **row} for row in rows]
                print(line(kind.replace("ext2/ext3", "ext4"), case, rows, length), flush=True)
    if options.output:
        pathlib.Path(options.output).write_text("".join(json.dumps(row) + "\n" for row in everything))
    version = subprocess.run([PEER, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    loads = [row["load"] for row in everything] or [0]
    print(f"\n{version}; {options.mib} MiB, {options.runs} rounds; load average {min(loads):.1f}-{max(loads):.1f}.")
    sys.exit(1 if failed else 0)


main()
