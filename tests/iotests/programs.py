"""The programs that the tests run, under the names that the tests' references have in their messages."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

# QEMU's name -> (the environment variable that overrides it, ours). None: we have no such program, QEMU's is used.
PROGRAMS = {
    "qemu-img": ("IMG", "outboard-img"),
    "qemu-io": ("IO", "outboard-io"),
    "qemu-nbd": ("NBD", "outboard-nbd"),
    "qemu-storage-daemon": ("QSD", "outboard-blkd"),
}

# The variables by which QEMU's harness takes them.
VARIABLES = {
    "qemu-img": "QEMU_IMG_PROG",
    "qemu-io": "QEMU_IO_PROG",
    "qemu-nbd": "QEMU_NBD_PROG",
    "qemu-storage-daemon": "QSD_PROG",
    "qemu-system-x86_64": "QEMU_PROG",
}

# Many tests ask an emulator which formats and devices there are, and never start it.
EMULATOR = r"""#!/bin/bash
case "$*" in
  *-machine*help*) printf '%s\n' 'Supported machines are:' 'pc-i440fx-7.2        Standard PC (default)' ;;
  *-drive*format=help*) printf '%s\n' 'Supported formats: {formats}' 'Supported formats (read-only): ' ;;
  *-device*help*)
    for device in virtio-blk virtio-blk-pci virtio-scsi virtio-scsi-pci scsi-hd scsi-cd ide-hd ide-cd floppy nvme usb-storage; do
      echo "name \"$device\", bus PCI"
    done ;;
  *) echo "${0##*/}: there is no emulator here" >&2; exit 1 ;;
esac
"""


class Missing(Exception):
    """A program that is not there."""


def commands(reference, build):
    """QEMU's name -> the command to run: the reference's, or ours from the folder `build`."""
    chosen = {}
    for name, (variable, ours) in PROGRAMS.items():
        override = None if reference else os.environ.get(variable)
        own = build / ours if ours and not reference else name
        chosen[name] = override or str(own)
    return chosen


def install(folder, chosen):
    """Puts the programs into `folder` under QEMU's names, and returns the variables that name them."""
    variables = {}
    for name, command in chosen.items():
        place(folder / name, shlex.split(command))
        variables[VARIABLES[name]] = str(folder / name)
    emulator = folder / "qemu-system-x86_64"
    emulator.write_text(EMULATOR.replace("{formats}", formats(chosen["qemu-img"])))
    emulator.chmod(0o755)
    variables[VARIABLES[emulator.name]] = str(emulator)
    return variables


def place(path, words):
    """Makes `path` run a command; the program sees the name of `path` as its own."""
    program = shutil.which(words[0])
    if not program:
        raise Missing(f"no such program: {words[0]} (for {path.name})")
    program = os.path.abspath(program)
    if len(words) == 1:
        path.symlink_to(program)
        return
    arguments = " ".join(shlex.quote(word) for word in words[1:])
    path.write_text(f'#!/bin/bash\nexec -a {path.name} {shlex.quote(program)} {arguments} "$@"\n')
    path.chmod(0o755)


def formats(image_tool):
    """What the image tool says that it supports."""
    text = subprocess.run(shlex.split(image_tool) + ["--help"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"^Supported formats:(.*)$", text, re.M)
    return found.group(1).strip() if found else ""
