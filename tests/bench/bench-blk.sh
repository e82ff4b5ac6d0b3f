#!/usr/bin/env bash
# Runs a list of vhost-user-blk cases against two back-ends, interleaved, and prints A/B.
#
#   bench-blk.sh [-r RUNS] [-s SECONDS] [-c CASES] [-i IMAGES] [-o OUT.jsonl] [-w poll|block|hybrid] [-k]
#                [-a 'COMMAND'] [-b 'COMMAND'] [-n NAME_A] [-m NAME_B] [-d WORKDIR]
#
#   -a/-b  shell command that serves a vhost-user-blk socket until killed. These are set for it:
#            $SOCK     socket path to serve          $IMG   image file ("" for null)
#            $FMT      null or the image's format    $DIRECT  on|off  (O_DIRECT wanted)
#            $AIO      io_uring|native|threads       $NQ    number of virtqueues
#            $SIZE     virtual size in bytes
#          Default: -a outboard-blkd ($BLKD), -b qemu-storage-daemon ($QSD), same command line.
#          Use 'exec' so that the back-end has the shell's pid (CPU accounting).
#   -c     cases, comma separated, as RW:BS:QD:QUEUES
#   -i     images, comma separated (default: null,shm-raw,ext4-raw,shm-qcow2):
#            null shm-raw ext4-raw shm-qcow2 ext4-qcow2 shm-qcow2-chain shm-qcow2-empty
#            ext4-qcow2-empty (empty = recreated before every run: cold allocation, at most EMPTY_OPS=8192 requests)
#            shm-qcow2-1t (1 TiB sparse, 16384 populated spots: L2 working set of 128 MiB)
#            shm-qcow2-luks (encrypted, LUKS with AES-256-XTS, fully allocated)
#            shm-FORMAT, ext4-FORMAT (parallels, qcow, qed, vdi, vhdx, vmdk, vpc, luks: fully allocated, made by QEMU's tools)
#            shm-qcow2-asraw (the file of shm-qcow2, its data read as a raw image: against shm-qcow2 the same pages of memory;
#            so for the other formats)
#            shm-* lies on tmpfs, ext4-* in WORKDIR, opened with O_DIRECT
#   -d     where images on disk go (default: a new directory in $TMPDIR or /tmp)
#   -w     how the front-end waits for completions (poll = busy poll, block = eventfd)
#   -k     keep CPUs awake with SCHED_IDLE spinners (an idle virtual CPU takes 30-80 us to wake)
#
# Environment:
#   PIN_FE / PIN_BE (default 0 / 1): CPUs; empty = no pinning. FE_THREADS (default 1): front-end threads.
#   IOTHREADS (default 1): iothreads of A, over which its queues are spread (B has one).
#   WARM="--rw read --bs 1M --iodepth 8 --ops 512": front-end options run once before each measurement
#          (pre-faults a RAM disk, fills the page cache); BENCH_EXTRA: more options for the measurement.
#   BENCH_EXTRA_A, BENCH_EXTRA_B: more front-end options of one side (BENCH_EXTRA_A=--packed QSD=$BLKD: packed against split rings).
#   RT=1: front-end and back-end under SCHED_FIFO (for -w block on a busy machine; never with -w poll).
#   GROUP_NICE=-10: autogroup nice of this run. With sched_autogroup_enabled=1 plain 'nice' does not
#          order processes of different login groups.
#
# Every case: for each run, A then B (order alternates); prints the median of each and the median of the
# per-run ratios A/B, with min..max of the ratio, for IOPS and for back-end CPU ns per request.
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
TARGET=${CARGO_TARGET_DIR:-$HERE/../../target}/release
BENCH=${BENCH:-$TARGET/vublk-bench}
BLKD=${BLKD:-$TARGET/outboard-blkd}
QSD=${QSD:-qemu-storage-daemon}
QIMG=${QIMG:-qemu-img}
QIO=${QIO:-qemu-io}
FAILED=0 RUNS=3 SECS=1 OUT= WAIT=poll KEEP= NAME_A=outboard NAME_B=qsd DIR=${TMPDIR:-/tmp}/bench-blk.$$
CASES=randread:4k:1:1,randread:4k:32:1,randwrite:4k:32:1,randread:64k:32:1,read:1M:8:1
IMAGES=null,shm-raw,ext4-raw,shm-qcow2
SIZE_MB=${SIZE_MB:-1024}
SERVE='case $FMT in
 null) set -- --blockdev driver=null-co,node-name=n,size=$SIZE,read-zeroes=${NULL_ZEROES:-off};;
 *) set -- --blockdev driver=file,filename=$IMG,node-name=f,cache.direct=$DIRECT,aio=$AIO,discard=unmap,cache.no-flush=${NOFLUSH:-off} --blockdev driver=$FMT,file=f,node-name=n,discard=unmap${FMT_OPTS:+,$FMT_OPTS};;
esac
[ -n "$SECRET" ] && set -- --object secret,id=key,data=$SECRET "$@"
threads=iothread=io0
set -- "$@" --object iothread,id=io0${IOTHREAD_OPTS:+,$IOTHREAD_OPTS}
[ "$N" -gt 1 ] && { threads=iothread.0=io0; for t in $(seq 1 $((N - 1))); do
  set -- "$@" --object iothread,id=io$t${IOTHREAD_OPTS:+,$IOTHREAD_OPTS}; threads=$threads,iothread.$t=io$t; done; }
exec $DAEMON "$@" --export type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=$SOCK,writable=on,$threads,num-queues=$NQ'
CMD_A="export RUST_LOG=warn; DAEMON=\$BLKD; N=\${IOTHREADS:-1}; $SERVE" CMD_B="DAEMON=\$QSD; N=1; $SERVE"
while getopts r:s:c:i:o:w:ka:b:n:m:d:h x; do case $x in
 r) RUNS=$OPTARG;; s) SECS=$OPTARG;; c) CASES=$OPTARG;; i) IMAGES=$OPTARG;; o) OUT=$OPTARG;;
 w) WAIT=$OPTARG;; k) KEEP=1;; a) CMD_A=$OPTARG;; b) CMD_B=$OPTARG;; n) NAME_A=$OPTARG;; m) NAME_B=$OPTARG;;
 d) DIR=$OPTARG;; h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0;;
 *) echo "try $0 -h" >&2; exit 2;; esac; done
SHM=/dev/shm/bench-blk.$$
[ -n "${GROUP_NICE:-}" ] && echo "$GROUP_NICE" > /proc/self/autogroup 2>/dev/null
mkdir -p "$DIR" "$SHM"
OUT=${OUT:-$DIR/results.jsonl}
BURN=()
cleanup() { for p in "${BURN[@]}"; do kill "$p" 2>/dev/null; done; [ -n "${BE:-}" ] && kill "$BE" 2>/dev/null; rm -rf "$SHM"; case $DIR in */bench-blk.$$) rm -rf "$DIR";; esac; }
trap cleanup EXIT
trap 'exit 1' INT TERM
export QSD QIMG BLKD
for tool in "$BENCH" $QIMG $QIO python3 taskset; do
  command -v "$tool" >/dev/null || { echo "$tool is missing: run scripts/setup and cargo build --release" >&2; exit 1; }
done
if [ -n "$KEEP" ]; then
  for c in $(seq 0 $(($(nproc) - 1))); do
    # own process group and autogroup at nice 19, or group scheduling would give the spinner a full share
    setsid taskset -c "$c" chrt --idle 0 sh -c 'echo 19 > /proc/self/autogroup; while :; do :; done' 2>/dev/null & BURN+=($!)
  done
fi
# image NAME -> sets IMG FMT DIRECT AIO SIZE; makes it when missing or when it must be fresh
image() {
  local n=$1 base
  FMT=raw DIRECT=off AIO=io_uring IMG= SIZE=$((SIZE_MB << 20)) FMT_OPTS= SECRET=
  case $n in shm-*) base=$SHM;; ext4-*) base=$DIR; DIRECT=on;; esac
  case $n in
    null) FMT=null; return;;
    *-raw) IMG=$base/raw; [ -e "$IMG" ] || { $QIMG create -q -f raw "$IMG" $SIZE; fillraw "$IMG"; };;
    *-asraw) image "${n%-asraw}"; FMT=raw FMT_OPTS=offset=$(first_data "$IMG"),size=$SIZE;;
    *-qcow2) FMT=qcow2 FMT_OPTS=${QCOW2_OPTS:-}; IMG=$base/full.qcow2; [ -e "$IMG" ] || { $QIMG create -q -f qcow2 -o preallocation=metadata "$IMG" $SIZE; fillq "$IMG"; };;
    *-qcow2-luks) FMT=qcow2 SECRET=benchmark FMT_OPTS=encrypt.format=luks,encrypt.key-secret=key; IMG=$base/luks.qcow2; [ -e "$IMG" ] || mkluks "$IMG";;
    *-qcow2-chain) FMT=qcow2 FMT_OPTS=${QCOW2_OPTS:-}; IMG=$base/c3.qcow2; [ -e "$IMG" ] || mkchain "$base";;
    *-qcow2-empty) FMT=qcow2 FMT_OPTS=${QCOW2_OPTS:-}; IMG=$base/empty.qcow2; rm -f "$IMG"; $QIMG create -q -f qcow2 "$IMG" $SIZE;;
    *-qcow2-1t) FMT=qcow2 FMT_OPTS=${QCOW2_OPTS:-}; IMG=$base/1t.qcow2; SIZE=$((1 << 40)); [ -e "$IMG" ] || mk1t "$IMG";;
    *-luks) FMT=luks SECRET=benchmark FMT_OPTS=key-secret=key; IMG=$base/full.luks; [ -e "$IMG" ] || mkluks "$IMG";;
    *-parallels | *-qcow | *-qed | *-vdi | *-vhdx | *-vmdk | *-vpc)
      FMT=${n#*-}; IMG=$base/full.$FMT; [ -e "$IMG" ] || mkfull "$IMG";;
    *) echo "unknown image $n" >&2; exit 2;;
  esac
  [ -n "${AIO_OVERRIDE:-}" ] && AIO=$AIO_OVERRIDE
}
fillraw() { dd if=/dev/zero bs=1M count=$SIZE_MB status=none | tr '\0' '\125' | dd of="$1" bs=1M conv=notrunc,fsync iflag=fullblock status=none; }
fillq() { for o in $(seq 0 64 $((SIZE_MB - 64))); do echo "write -P 0x55 ${o}M 64M"; done | $QIO -f qcow2 "$1" >/dev/null; }
# Not of every format does qemu-img tell where the data is.
first_data() { "$TARGET/outboard-img" map --output=json "$1" | python3 -c 'import json, sys; print(next(e["offset"] for e in json.load(sys.stdin) if "offset" in e))'; }
mkfull() { local options=()
  # Of a VHD's length only what its geometry can express, unless told otherwise.
  [ "$FMT" = vpc ] && options=(-o force_size=on)
  $QIMG create -q -f "$FMT" "${options[@]}" "$1" $SIZE
  for o in $(seq 0 64 $((SIZE_MB - 64))); do echo "write -P 0x55 ${o}M 64M"; done | $QIO -f "$FMT" "$1" >/dev/null; }
mkluks() { local secret=secret,id=key,data=$SECRET encrypt=
  local options=preallocation=off
  [ "$FMT" = qcow2 ] && encrypt=encrypt. options=preallocation=metadata,encrypt.format=luks
  # On a busy machine qemu-img sometimes cannot tell how many rounds take that long.
  for _ in 1 2 3 4 5; do
    $QIMG create -q --object $secret -f "$FMT" -o $options,${encrypt}key-secret=key,${encrypt}iter-time=100 "$1" $SIZE && break
  done
  for o in $(seq 0 64 $((SIZE_MB - 64))); do echo "write -P 0x55 ${o}M 64M"; done | $QIO --object $secret --image-opts driver=$FMT,file.filename="$1",$FMT_OPTS >/dev/null; }
mkchain() { local i b=$1
  $QIMG create -q -f qcow2 "$b/c0.qcow2" $SIZE; fillq "$b/c0.qcow2"
  for i in 1 2 3; do
    # A plain file name: what an image names must lie beside it.
    $QIMG create -q -f qcow2 -b "c$((i - 1)).qcow2" -F qcow2 "$b/c$i.qcow2"
    # each layer owns every 4th 256k stripe, shifted
    for o in $(seq $((i * 256)) 1024 $((SIZE_MB * 1024 - 1024))); do echo "write -P 0x$i$i ${o}k 256k"; done | $QIO -f qcow2 "$b/c$i.qcow2" >/dev/null
  done; }
# 1 TiB virtual, 64k clusters: one 64k cluster written every 64 MiB -> 16384 clusters, each in its
# own 8 KiB of L2 entries; 2048 L2 tables (128 MiB of L2) against a default cache of at most 32 MiB
mk1t() { $QIMG create -q -f qcow2 "$1" 1T
  for o in $(seq 0 64 $((1024 * 1024 - 64))); do echo "write -P 0x77 ${o}M 64k"; done | $QIO -f qcow2 "$1" >/dev/null; }

one() { # one WHICH CASE IMAGE RUN -> appends json
  local which=$1 case=$2 img=$3 run=$4 rw bs qd nq cmd extra=()
  IFS=: read -r rw bs qd nq <<< "$case"
  NQ=$nq; SOCK=$DIR/s.$which; rm -f "$SOCK"
  local more=${BENCH_EXTRA:-}; case $which in a) more+=" ${BENCH_EXTRA_A:-}";; b) more+=" ${BENCH_EXTRA_B:-}";; esac
  local side_img=$img
  case $img in *+*) [ "$which" = a ] && side_img=${img%+*} || side_img=${img#*+};; esac
  image "$side_img"
  case $which in fio-*) one_fio "${which#fio-}" "$rw" "$bs" "$qd"; record; return;; esac
  [ "$which" = b ] && [ "$side_img" = "$img" ] && cmd=$CMD_B || cmd=$CMD_A
  export SOCK IMG FMT FMT_OPTS SECRET DIRECT AIO NQ SIZE
  local rt=(); [ -n "${RT:-}" ] && [ "$WAIT" = block ] && rt=(chrt -f 1)
  if [ -n "${PIN_BE-1}" ]; then "${rt[@]}" taskset -c "${PIN_BE-1}" bash -c "$cmd" & else "${rt[@]}" bash -c "$cmd" & fi
  BE=$!
  # fresh images: stop within the image; never rewrite allocated clusters
  case $side_img in *-empty) local b=$(numfmt --from=iec "${bs^^}"); local n=$((SIZE / b / nq)); [ "$n" -gt "${EMPTY_OPS:-8192}" ] && n=${EMPTY_OPS:-8192}; extra=(--ops "$n");;
   *-1t) extra=(--stride 64M --stride-len 64k);; esac
  local line
  [ -n "${WARM:-}" ] && timeout 60 "$BENCH" --socket "$SOCK" --pin 0 $WARM $more >/dev/null
  line=$("${rt[@]}" timeout 60 "$BENCH" --socket "$SOCK" --rw "$rw" --bs "$bs" --iodepth "$qd" --queues "$nq" --threads "${FE_THREADS:-1}" --wait "$WAIT" --seconds "$SECS" --ramp "${RAMP:-0.2}" \
     ${PIN_FE_ARGS[@]+"${PIN_FE_ARGS[@]}"} --backend-pid "$BE" --json "${extra[@]}" $more) || line='{"iops":0,"errors":1}'
  kill "$BE" 2>/dev/null
  for _ in $(seq 1 100); do kill -0 "$BE" 2>/dev/null || break; sleep 0.02; done
  kill -9 "$BE" 2>/dev/null; wait "$BE" 2>/dev/null; BE=
  record
}
record() { echo "{\"side\":\"$which\",\"image\":\"$img\",\"case\":\"$case\",\"run\":$run,${line#\{}" >> "$OUT"; }
# one_fio ENGINE RW BS QD -> sets line; the file itself, from the back-end's CPU
one_fio() {
  local pin=(); [ -n "${PIN_BE-1}" ] && pin=(taskset -c "${PIN_BE-1}")
  local direct=0; [ "$DIRECT" = on ] && direct=1
  line=$("${pin[@]}" timeout 60 fio --name=f --filename="$IMG" --thread=1 --ioengine="$1" --rw="$2" --bs="$3" --iodepth="$4" \
    --direct=$direct --time_based --runtime="$SECS" --ramp_time="${RAMP:-0.2}" --norandommap --randrepeat=0 --invalidate=0 \
    --output-format=json 2>/dev/null | python3 -c '
import json, sys
text = sys.stdin.read()
job = json.loads(text[text.index("{"):])["jobs"][0]
ran = max((job["read"], job["write"]), key=lambda side: side["total_ios"])
cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100
percentile = ran["clat_ns"].get("percentile", {})
us = lambda key: percentile.get(key, 0) / 1000
print(json.dumps({"iops": ran["iops"], "mibs": ran["bw_bytes"] / 2**20, "errors": job["error"],
  "be_ns_per_io": cpu * 1e9 / max(ran["iops"], 1), "lat_p50_us": us("50.000000"), "lat_p99_us": us("99.000000")}))') \
    || line='{"iops":0,"errors":1}'
}
# fio_sides IMAGE RW -> the engines that fit
fio_sides() {
  [ "${FIO:-on}" = on ] && command -v fio >/dev/null || return 0
  case $2 in randread|read|randwrite|write) ;; *) return 0;; esac
  case $1 in shm-raw) echo fio-psync fio-mmap;; ext4-raw) echo fio-io_uring;; esac
}
PIN_FE_ARGS=(); [ -n "${PIN_FE-0}" ] && PIN_FE_ARGS=(--pin "${PIN_FE-0}")
: > "$OUT"
for img in ${IMAGES//,/ }; do for c in ${CASES//,/ }; do
  for r in $(seq 1 "$RUNS"); do
    order="a b $(fio_sides "$img" "${c%%:*}")"
    [ $((r % 2)) = 1 ] || order=$(printf '%s\n' $order | tac)
    for side in $order; do one "$side" "$c" "$img" "$r"; done
  done
  python3 - "$OUT" "$img" "$c" "$NAME_A" "$NAME_B" <<'P'
import json, sys, statistics as st
f, img, case, na, nb = sys.argv[1:]
R = [json.loads(l) for l in open(f)]
R = [r for r in R if r["image"] == img and r["case"] == case]
if "+" in img: na, nb = img.split("+")
by = lambda s: {r["run"]: r for r in R if r["side"] == s}
A, B = by("a"), by("b")
def col(k, D): return [D[i].get(k, 0) for i in sorted(D)]
def ratio(k, B=B):
    v = [A[i].get(k, 0) / B[i][k] for i in sorted(A) if i in B and B[i].get(k)]
    return (st.median(v), min(v), max(v)) if v else (0, 0, 0)
i, n, p = ratio("iops"), ratio("be_ns_per_io"), ratio("lat_p50_us")
e = sum(r.get("errors", 1) for r in R)
print("%-16s %-22s IOPS %s %.0f %s %.0f ratio %.2f (%.2f..%.2f) | p50us %.1f %.1f (%.2f) p99us %.0f %.0f | be ns/io %.0f %.0f ratio %.2f%s" % (
  img, case, na, st.median(col("iops", A)), nb, st.median(col("iops", B)), *i, st.median(col("lat_p50_us", A)), st.median(col("lat_p50_us", B)), p[0],
  st.median(col("lat_p99_us", A)), st.median(col("lat_p99_us", B)), st.median(col("be_ns_per_io", A)), st.median(col("be_ns_per_io", B)), n[0], "  ERRORS %d" % e if e else ""), flush=True)
for side in sorted({r["side"] for r in R} - {"a", "b"}):
    F = by(side)
    print("%-16s %-22s IOPS %s %.0f ratio %.2f (%.2f..%.2f) | p50us %.1f | ns/io %.0f" % (
      "", "", side, st.median(col("iops", F)), *ratio("iops", F), st.median(col("lat_p50_us", F)), st.median(col("be_ns_per_io", F))), flush=True)
sys.exit(1 if e else 0)
P
  [ $? = 0 ] || FAILED=1
done; done
exit $FAILED
