#!/usr/bin/env python3
"""outboard-netd against DPDK and QEMU: packets a second of 64 bytes, TCP through a tap, CPU of an idle port.

usage: scripts/bench net [-r RUNS] [-s SECONDS] [-k CASE,...] [-o OUT.jsonl]

The contestants of a case take turns. Packets: the front-end is DPDK's virtio-user driver in dpdk-testpmd, polling on CPU 1; the
back-end, on CPU 0, is outboard-netd or testpmd with its net_vhost driver. TCP: iperf3 between a QEMU guest and a network
namespace of its own, through outboard-netd's tap, QEMU's own tap, and testpmd's net_vhost and net_tap, which have no offloads.
Cases: sink, echo, switch, packed, tap, idle. Two idle CPUs are needed, and root for tap. A median is of all runs of a case.
"""
import argparse, json, os, pathlib, re, shutil, statistics, subprocess, sys, tempfile, threading, time

HERE = pathlib.Path(__file__).resolve().parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE / "../../target")).resolve() / "release"
NETD = os.environ.get("OUTBOARD_NETD", str(TARGET / "outboard-netd"))
GUEST = str(TARGET / "net-guest")
PATIENCE = 30
HOST, GUEST_ADDRESS = "10.77.0.1", "10.77.0.2/24"
# What testpmd's tap lacks: the guest has to do without as well.
NO_OFFLOADS = ",".join(f"{f}=off" for f in ("csum gso guest_csum guest_tso4 guest_tso6 guest_ecn guest_ufo host_tso4 host_tso6 "
                                            "host_ecn host_ufo").split())
SCRIPT = """set -e
i=0; until ping -c 1 -W 1 10.77.0.1 >/dev/null; do i=$((i + 1)); [ $i -lt 20 ]; done
iperf3 -c 10.77.0.1 -t SECONDS -J > /up; echo report up; cat /up; echo done
iperf3 -c 10.77.0.1 -t SECONDS -R -J > /down; echo report down; cat /down; echo done
"""


class Testpmd:
    """A dpdk-testpmd whose standard input stays open."""

    count = 0

    def __init__(self, cpu, devices, mode, queues=1, prefix=()):
        Testpmd.count += 1
        command = [*prefix, "stdbuf", "-oL", "dpdk-testpmd", "--lcores", f"0@{cpu},1@{cpu}", "--no-huge", "-m", "512", "--no-pci",
                   "--no-telemetry", "--file-prefix", f"bench{os.getpid()}-{Testpmd.count}"]
        for device in devices:
            command += ["--vdev", device]
        command += ["--", "-i", "--no-mlockall", "--total-num-mbufs=16384", f"--forward-mode={mode}", f"--rxq={queues}",
                    f"--txq={queues}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.text, self.grown = "", threading.Condition()
        threading.Thread(target=self.collect, daemon=True).start()
        self.answer(0)

    def collect(self):
        while chunk := self.process.stdout.read1(65536):
            with self.grown:
                self.text += chunk.decode(errors="replace")
                self.grown.notify_all()
        with self.grown:
            self.process.wait()
            self.grown.notify_all()

    def answer(self, start):
        with self.grown:
            there = self.grown.wait_for(lambda: "testpmd> " in self.text[start:] or self.process.poll() is not None, PATIENCE)
            if not there or self.process.poll() is not None:
                raise RuntimeError("dpdk-testpmd does not answer:\n" + self.text[-2000:])
            return self.text[start:]

    def command(self, line):
        start = len(self.text)
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        return self.answer(start)

    def counters(self, port):
        text = self.command(f"show port stats {port}")
        now = time.monotonic()
        return now, *(int(re.search(name + r"-packets:\s*(\d+)", text)[1]) for name in ("RX", "TX"))

    def close(self):
        self.process.kill()
        self.process.wait()


class Netd:
    """An outboard-netd that is ready when this returns."""

    def __init__(self, directory, netdev, ports, cpu=None, prefix=()):
        self.log = open(f"{directory}/netd.log", "wb")
        command = [*prefix, *(["taskset", "-c", str(cpu)] if cpu is not None else []), NETD, "--netdev", f"{netdev},id=n0"]
        for number, socket in enumerate(ports):
            command += ["--port", f"id=p{number},socket={socket},netdev=n0"]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        wait_for(ports, self.process, self.log.name)

    def cpu_seconds(self):
        total = 0
        for task in pathlib.Path(f"/proc/{self.process.pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def close(self):
        self.process.terminate()
        self.process.wait()
        self.log.close()


def wait_for(paths, process, log):
    """A socket's file is its only sign; it raises no event that the standard library knows."""
    end = time.monotonic() + PATIENCE
    while not all(os.path.exists(path) for path in paths):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the back-end did not start:\n{open(log, errors='replace').read()[-2000:]}")
        time.sleep(0.02)


class Packets:
    """A case that counts packets a second."""

    def __init__(self, mode, netdev, peer_mode, ports=1, arguments=""):
        self.mode, self.netdev, self.peer_mode, self.ports, self.arguments = mode, netdev, peer_mode, ports, arguments

    sides = ("outboard", "dpdk")

    def run(self, side, seconds, directory):
        sockets = [f"{directory}/{number}.sock" for number in range(self.ports)]
        if side == "outboard":
            back = Netd(directory, self.netdev, sockets, cpu=0)
        else:
            back = Testpmd(0, [f"net_vhost{n},iface={s},queues=1" for n, s in enumerate(sockets)], self.peer_mode)
        front = None
        try:
            more = "," + self.arguments if self.arguments else ""
            front = Testpmd(1, [f"net_virtio_user{n},path={s},queues=1{more}" for n, s in enumerate(sockets)], self.mode)
            if side == "dpdk":
                back.command("start")
            return {"mpps": self.measure(front, seconds)}
        finally:
            if front:
                front.close()
            back.close()

    def measure(self, front, seconds):
        # Frames that go in circles: fewer than a ring holds, so that none is lost; all are when a link is not up yet.
        circles = self.mode == "io"
        column = 1 if circles else 2
        for _ in range(10):
            front.command("start tx_first 4" if circles else "start")
            time.sleep(0.5)
            before = [front.counters(port) for port in range(self.ports)]
            time.sleep(seconds)
            after = [front.counters(port) for port in range(self.ports)]
            packets = sum(b[column] - a[column] for a, b in zip(before, after))
            if packets:
                return packets / (after[0][0] - before[0][0]) / 1e6
            front.command("stop")
        raise RuntimeError("no packet came through:\n" + front.text[-1000:])


class Tap:
    """TCP between a guest and a namespace."""

    sides = ("outboard", "qemu", "dpdk")

    def run(self, side, seconds, directory):
        name = f"obbench{os.getpid()}"
        shell = lambda line: subprocess.run(line.split(), check=True, stdout=subprocess.DEVNULL)
        prefix, back, server = ["ip", "netns", "exec", name], None, None
        shell(f"ip netns add {name}")
        try:
            shell(f"ip -n {name} link set lo up")
            socket = f"{directory}/0.sock"
            card = f"socket,id=c,path={socket}"
            device = "virtio-net-pci,netdev=n,mac=52:54:00:12:34:56,vectors=0"
            netdev = ["-chardev", card, "-netdev", "vhost-user,id=n,chardev=c"]
            if side == "dpdk":
                back = Testpmd(0, [f"net_vhost0,iface={socket},queues=1", "net_tap0,iface=tap0"], "io", prefix=prefix)
                device += "," + NO_OFFLOADS
            else:
                shell(f"ip -n {name} tuntap add tap0 mode tap vnet_hdr")
            shell(f"ip -n {name} addr add {HOST}/24 dev tap0")
            shell(f"ip -n {name} link set tap0 up")
            if side == "dpdk":
                subprocess.run([*prefix, *"ethtool -K tap0 tx off tso off gso off gro off".split()], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
                back.command("start")
            elif side == "outboard":
                back = Netd(directory, "type=tap,ifname=tap0", [socket], prefix=prefix)
            else:
                netdev = ["-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no,vhost=off"]
            server = subprocess.Popen([*prefix, "iperf3", "-s", "--forceflush"], stdout=subprocess.PIPE)
            server.stdout.readline()
            return self.guest(prefix, netdev, device, seconds, directory)
        finally:
            for process in (server,):
                if process:
                    process.kill()
                    process.wait()
            if back:
                back.close()
            shell(f"ip netns del {name}")

    def guest(self, prefix, netdev, device, seconds, directory):
        script, initramfs = f"{directory}/script", f"{directory}/initramfs"
        pathlib.Path(script).write_text(SCRIPT.replace("SECONDS", str(max(1, round(seconds)))))
        subprocess.run([GUEST, script, initramfs], check=True)
        kernel = sorted(pathlib.Path("/boot").glob("vmlinuz-*-cloud-amd64"))[-1]
        command = [*prefix, "qemu-system-x86_64", *("-accel tcg,thread=multi -cpu max -smp 1 -m 256 -nodefaults -no-reboot -display none "
                   "-object memory-backend-memfd,id=m,size=256M,share=on -numa node,memdev=m").split(),
                   "-serial", f"file:{directory}/console", "-chardev", "stdio,id=s,signal=off", "-serial", "chardev:s",
                   "-kernel", str(kernel), "-initrd", initramfs, "-append",
                   f"console=ttyS0 quiet panic=-1 no_timer_check rdinit=/init address={GUEST_ADDRESS}", *netdev, "-device", device]
        output = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=90 + 4 * seconds).stdout
        text = output.decode(errors="replace").replace("\r", "")
        result = {}
        for direction in ("up", "down"):
            found = re.search(rf"report {direction}\n(.*?)\ndone", text, re.S)
            if not found:
                raise RuntimeError("the guest did not report:\n" + text[-1500:])
            result[direction] = json.loads(found[1])["end"]["sum_received"]["bits_per_second"] / 1e9
        return result


class Idle:
    """CPU of a port whose guest is there and does nothing."""

    sides = ("outboard",)

    def run(self, side, seconds, directory):
        socket = f"{directory}/0.sock"
        back = Netd(directory, "type=echo", [socket])
        front = Testpmd(1, [f"net_virtio_user0,path={socket},queues=1"], "io")
        try:
            front.command("start tx_first 1")
            time.sleep(0.5)
            front.command("stop")
            time.sleep(1)
            before = back.cpu_seconds()
            time.sleep(seconds)
            return {"percent": (back.cpu_seconds() - before) / seconds * 100}
        finally:
            front.close()
            back.close()


CASES = {
    "sink": Packets("txonly", "type=null", "rxonly"),
    "echo": Packets("io", "type=echo", "io"),
    "switch": Packets("io", "type=switch", "io", ports=2),
    "packed": Packets("txonly", "type=null", "rxonly", arguments="packed_vq=1"),
    "tap": Tap(),
    "idle": Idle(),
}

# Case, value, bar as text, what is compared with, how many times that, least value.
BARS = [
    ("sink", "mpps", ">= 0.5 x DPDK", "dpdk", 0.5, 0),
    ("echo", "mpps", ">= 0.5 x DPDK", "dpdk", 0.5, 0),
    ("switch", "mpps", ">= 3 Mpps", "dpdk", 0, 3),
    ("packed", "mpps", ">= 0.5 x DPDK", "dpdk", 0.5, 0),
    ("tap", "up", ">= 1.5 x DPDK's tap", "dpdk", 1.5, 0),
    ("tap", "down", ">= 1.5 x DPDK's tap", "dpdk", 1.5, 0),
    ("tap", "up", ">= QEMU's tap", "qemu", 1, 0),
    ("tap", "down", ">= QEMU's tap", "qemu", 1, 0),
]


def spread(values, unit):
    return f"{statistics.median(values):.2f} {unit} ({min(values):.2f}-{max(values):.2f})"


def table(rows):
    values = lambda case, side, key: [r[key] for r in rows if r["case"] == case and r["side"] == side and key in r]
    lines = ["| case | bar | outboard-netd | peer | ratio | verdict |", "|---|---|---|---|---|---|"]
    missed = 0
    for case, key, bar, side, factor, least in BARS:
        ours, theirs = values(case, "outboard", key), values(case, side, key)
        if not ours:
            continue
        unit = "Mpps" if key == "mpps" else "Gbit/s"
        name = f"{case}, 64 B" if key == "mpps" else f"TCP, guest to host" if key == "up" else "TCP, host to guest"
        median = statistics.median(ours)
        ratio = median / statistics.median(theirs) if theirs else float("nan")
        met = median >= least and (not factor or ratio >= factor)
        missed += not met
        lines.append(f"| {name} | {bar} | {spread(ours, unit)} | {side} {spread(theirs, unit) if theirs else '-'} | {ratio:.2f} | "
                     f"{'met' if met else 'missed'} |")
    if idle := values("idle", "outboard", "percent"):
        met = statistics.median(idle) < 0.1
        missed += not met
        lines.append(f"| idle port, CPU | 0 % | {spread(idle, '%')} | - | - | {'met' if met else 'missed'} |")
    return "\n".join(lines), missed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", "--runs", type=int, default=5)
    parser.add_argument("-s", "--seconds", type=float, default=3)
    parser.add_argument("-k", "--cases", default=",".join(CASES))
    parser.add_argument("-o", "--output", help="every single result, one JSON object per line")
    options = parser.parse_args()
    cases = options.cases.split(",")
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"no case {unknown[0]} (there are {', '.join(CASES)})")
    missing = [p for p in ("dpdk-testpmd", "iperf3", "qemu-system-x86_64") if not shutil.which(p)]
    if missing:
        parser.error(f"{missing[0]} is not installed: run scripts/setup")
    rows, failed = [], 0
    for case in cases:
        for run in range(options.runs):
            for side in CASES[case].sides:
                with tempfile.TemporaryDirectory(prefix="outboard-bench.") as directory:
                    try:
                        result = CASES[case].run(side, options.seconds, directory)
                    except Exception as error:   # the other contestants go on
                        print(f"{case} {side}: {error}", file=sys.stderr)
                        failed += 1
                        continue
                row = {"case": case, "side": side, "run": run, **result, "load": os.getloadavg()[0]}
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    if options.output:
        pathlib.Path(options.output).write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, missed = table(rows)
    print(text)
    loads = [row["load"] for row in rows] or [0]
    print(f"\n{options.runs} runs of {options.seconds:g} s, in turns; median (lowest-highest); load average {min(loads):.1f}-{max(loads):.1f}.")
    sys.exit(1 if failed else 0)


main()
