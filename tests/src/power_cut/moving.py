"""A program in a container of which snapshots are taken: writes numbered records to files that stay open, and creates,
links, renames, replaces and removes the names of other files, of which some stay open.

DIR SEED SYNC: SYNC is 0 for a program that only claims to sync. After a line on the standard input it begins, and after
another one it ends. Prints a JSON object for each synced record ("record") and for each change of the names of a file
("file", "names", "synced": whether the names are durable).
"""
import json, os, random, select, sys, time

RECORD = 5000
FILES = ["plain", "dir/one", "dir/two", "dir/linked"]
DIRS = ["dir", "names", "names/deep"]
# The maximum number of files whose names change.
MOST = 6


def say(**event):
    print(json.dumps(event), flush=True)


def record(number):
    text = b"%019d " % number
    return (text * (RECORD // len(text) + 1))[:RECORD]


class Named:
    """A file whose names change. Its content begins with its number."""

    def __init__(self, number, path):
        self.number, self.names, self.dirty = number, [], set()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(self.fd, b"file %06d\n" % number * 300)
        if sync:
            os.fsync(self.fd)
        self.add(path)

    def add(self, path):
        self.names.append(path)
        self.dirty.add(os.path.dirname(path))

    def remove(self, path):
        self.names.remove(path)
        self.dirty.add(os.path.dirname(path))

    def report(self, is_synced):
        if is_synced:
            for path in self.dirty if sync else ():
                directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                os.fsync(directory)
                os.close(directory)
            self.dirty.clear()
        say(file=self.number, names=self.names, synced=is_synced)

    def close(self):
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def change(files, number):
    """Changes names; NUMBER is not used by another file or name."""
    path = f"{random.choice(DIRS)}/n{number}"
    if len(files) < MOST and random.random() < 0.5 or not files:
        files.append(Named(number, path))
        return files[-1].report(random.random() < 0.6)
    file = random.choice(files)
    old = random.choice(file.names)
    kind = random.randrange(5)
    if kind == 0:
        os.link(old, path)
        file.add(path)
    elif kind == 1:
        os.unlink(old)
        file.remove(old)
    elif kind == 2 and len(files) > 1:
        other = random.choice([other for other in files if other is not file])
        path = random.choice(other.names)
        os.rename(old, path)
        file.remove(old)
        file.add(path)
        other.remove(path)
        other.report(False)
        if not other.names:
            other.close()
            files.remove(other)
    else:
        os.rename(old, path)
        file.remove(old)
        file.add(path)
    if file.fd is not None and random.random() < 0.1:
        file.close()
    file.report(random.random() < 0.5)
    if not file.names:
        file.close()
        files.remove(file)


os.chdir(sys.argv[1])
random.seed(int(sys.argv[2]))
sync = sys.argv[3] == "1"
for path in DIRS:
    os.makedirs(path, exist_ok=True)
descriptors = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644) for path in FILES]
os.link("dir/linked", "other-name")
say(ready=True)
sys.stdin.readline()
files = []
number = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    descriptor = descriptors[number % len(FILES)]
    assert os.pwrite(descriptor, record(number), number // len(FILES) * RECORD) == RECORD
    if random.random() < 0.3:
        if sync:
            os.fdatasync(descriptor)
        say(record=number)
    if random.random() < 0.2:
        change(files, number)
    number += 1
    time.sleep(random.random() * 0.003)
