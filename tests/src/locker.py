"""Holds files open and locks them for a test: reads a command per line, and prints a result per line.

Leases and locks of open file descriptions (OFD) have no safe call in Rust's crates.
"""

import errno
import fcntl
import os
import signal
import struct
import sys

FLOCK = "hhqqi4x"
KINDS = {"r": fcntl.F_RDLCK, "w": fcntl.F_WRLCK, "u": fcntl.F_UNLCK}
NAMES = {value: name for name, value in KINDS.items()}
FLOCKS = {"sh": fcntl.LOCK_SH, "ex": fcntl.LOCK_EX, "un": fcntl.LOCK_UN}
OFD_GETLK, OFD_SETLK, OFD_SETLKW = 36, 37, 38

files = {}


def record(file, command, kind, start, length):
    asked = struct.pack(FLOCK, KINDS[kind], os.SEEK_SET, int(start), int(length), 0)
    kind, _, start, length, _ = struct.unpack(FLOCK, fcntl.fcntl(files[file], command, asked))
    return f"{NAMES[kind]} {start} {length}" if NAMES[kind] != "u" else "u"


def do_open(file, flags, path):
    mode = 0
    for flag in flags.split("|"):
        mode |= getattr(os, "O_" + flag)
    files[file] = os.open(path, mode | os.O_CLOEXEC, 0o644)


def do_close(file):
    os.close(files.pop(file))


def do_flock(file, kind):
    fcntl.flock(files[file], FLOCKS[kind] | fcntl.LOCK_NB)


def do_flock_wait(file, kind):
    fcntl.flock(files[file], FLOCKS[kind])


def do_lock(file, kind, start, length):
    record(file, fcntl.F_SETLK, kind, start, length)


def do_lock_wait(file, kind, start, length):
    record(file, fcntl.F_SETLKW, kind, start, length)


def do_locked(file, kind, start, length):
    return record(file, fcntl.F_GETLK, kind, start, length)


def do_ofd(file, kind, start, length):
    record(file, OFD_SETLK, kind, start, length)


def do_ofd_wait(file, kind, start, length):
    record(file, OFD_SETLKW, kind, start, length)


def do_ofd_locked(file, kind, start, length):
    return record(file, OFD_GETLK, kind, start, length)


def do_lease(file, kind):
    fcntl.fcntl(files[file], fcntl.F_SETLEASE, KINDS[kind])


def do_leased(file):
    return NAMES[fcntl.fcntl(files[file], fcntl.F_GETLEASE)]


def do_broken():
    signal.sigwait([signal.SIGIO])


def do_write(file, text):
    return os.write(files[file], text.encode())


def do_read(file, offset):
    return os.pread(files[file], 1000, int(offset)).decode()


signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
for line in sys.stdin:
    verb, *words = line.split()
    try:
        result = globals()["do_" + verb](*words)
        print("ok" if result is None else result, flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
