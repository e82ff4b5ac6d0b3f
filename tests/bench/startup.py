#!/usr/bin/env python3
"""Start-up time and idle memory of outboard-blkd and qemu-storage-daemon, interleaved.

usage: startup.py [-r ROUNDS] [--json]

A round starts each daemon with a raw file, an iothread and a vhost-user-blk export, and measures from
before exec until the export's socket accepts a connection. Idle memory is read a moment after the
front-end has gone again. Prints medians (20 rounds unless said otherwise).
"""
import argparse, json, os, pathlib, socket, statistics, subprocess, tempfile, time

HERE = pathlib.Path(__file__).resolve().parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE / "../../target")) / "release"
DAEMONS = {
    "outboard": os.environ.get("BLKD", str(TARGET / "outboard-blkd")),
    "qsd": os.environ.get("QSD", "qemu-storage-daemon"),
}
# Between two attempts to connect; both daemons are looked at with the same grain.
GRAIN_S = 0.0001
SETTLE_S = 0.1
GIVE_UP_S = 10


def start(binary, image, path):
    command = [
        binary,
        "--blockdev", f"driver=file,filename={image},node-name=f,cache.direct=on,aio=io_uring",
        "--blockdev", "driver=raw,file=f,node-name=n",
        "--object", "iothread,id=io0",
        "--export", f"type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={path},writable=on,iothread=io0",
    ]
    before = time.perf_counter()
    daemon = subprocess.Popen(command, env=dict(os.environ, RUST_LOG="warn"))
    while True:
        with socket.socket(socket.AF_UNIX) as front_end:
            try:
                front_end.connect(str(path))
                return daemon, time.perf_counter() - before
            except OSError:
                if time.perf_counter() - before > GIVE_UP_S or daemon.poll() is not None:
                    daemon.kill()
                    raise SystemExit(f"{binary} does not serve {path}")
        time.sleep(GRAIN_S)


def memory(pid):
    """KiB resident, and of these what no other process shares with it."""
    status = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status"))
    return int(status["VmRSS"].split()[0]), int(status["RssAnon"].split()[0])


def measure(rounds):
    found = {name: [] for name in DAEMONS}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as directory:
        image = pathlib.Path(directory) / "raw"
        with open(image, "wb") as file:
            file.truncate(64 << 20)
        for number in range(rounds):
            names = list(DAEMONS) if number % 2 else list(DAEMONS)[::-1]
            for name in names:
                path = pathlib.Path(directory) / f"{name}.{number}"
                daemon, seconds = start(DAEMONS[name], image, path)
                time.sleep(SETTLE_S)
                resident, own = memory(daemon.pid)
                daemon.terminate()
                daemon.wait()
                found[name].append((seconds * 1000, resident, own))
    return {
        name: dict(zip(("ms", "rss_kib", "anon_kib"), map(statistics.median, zip(*values))))
        for name, values in found.items()
    }


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("-r", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.r)
    if arguments.json:
        return print(json.dumps(result))
    for name, value in result.items():
        print("%-10s start-up %.1f ms, idle RSS %.1f MiB, of it anonymous %.1f MiB" % (
            name, value["ms"], value["rss_kib"] / 1024, value["anon_kib"] / 1024))


if __name__ == "__main__":
    main()
