//! The work that file systems are compared on. Each answers with the time that its measured part took;
//! what only finds out which files there are is not measured.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, statat, unlinkat};
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory};

use crate::run::{Failure, Result, failure};

const MIB: usize = 1 << 20;
const PAGE: u64 = 4096;

fn at<'a, E: std::fmt::Display>(path: &'a Path) -> impl Fn(E) -> Failure + 'a {
    move |error| Failure(format!("{}: {error}", path.display()))
}

/// The same numbers on every file system.
struct Random(u64);

impl Random {
    fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end.max(1)
    }
}

/// Makes `files` files of `size` bytes, a hundred a folder.
pub(super) fn tree(root: &Path, files: usize, size: usize) -> Result<Duration> {
    let content = vec![b'x'; size];
    let start = Instant::now();
    let mut folder = PathBuf::new();
    for number in 0..files {
        if number % 100 == 0 {
            folder = root.join(format!("d{:05}", number / 100));
            fs::create_dir(&folder).map_err(at(&folder))?;
        }
        let path = folder.join(format!("f{:02}", number % 100));
        let made = File::create_new(&path).and_then(|mut file| file.write_all(&content));
        made.map_err(at(&path))?;
    }
    Ok(start.elapsed())
}

/// Lists everything below `root` and looks at each object, as `find -ls` does.
pub(super) fn walk(root: &Path, threads: usize) -> Result<Duration> {
    let start = Instant::now();
    let mut below = Vec::new();
    let seen = look(CWD, root.as_os_str().as_encoded_bytes(), &mut |name, at| {
        if threads > 1 {
            below.push(name.to_vec());
            return Ok(0);
        }
        walk_below(at, name)
    })?;
    let mut more = 0;
    if threads > 1 {
        more = std::thread::scope(|scope| -> Result<usize> {
            let below = &below;
            let jobs = (0..threads).map(|first| {
                scope.spawn(move || -> Result<usize> {
                    let fd = open_dir(CWD, root.as_os_str().as_encoded_bytes())?;
                    let mine = below.iter().skip(first).step_by(threads);
                    mine.map(|name| walk_below(&fd, name)).sum()
                })
            });
            let jobs: Vec<_> = jobs.collect();
            let ended = jobs.into_iter().map(|job| match job.join() {
                Ok(seen) => seen,
                Err(_) => failure("a thread panicked"),
            });
            ended.sum()
        })?;
    }
    match seen + more {
        0 => failure(format!("{}: nothing is there", root.display())),
        _ => Ok(start.elapsed()),
    }
}

fn walk_below(at: impl rustix::fd::AsFd, name: &[u8]) -> Result<usize> {
    look(at, name, &mut |name, at| walk_below(at, name))
}

fn open_dir(at: impl rustix::fd::AsFd, name: &[u8]) -> Result<rustix::fd::OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(at, name, flags, Mode::empty())
        .map_err(|error| Failure(format!("{}: {error}", name.escape_ascii())))
}

type Below<'a> = dyn FnMut(&[u8], rustix::fd::BorrowedFd<'_>) -> Result<usize> + 'a;

/// Looks at each object of one folder; `below` is called for each folder in it.
fn look(at: impl rustix::fd::AsFd, name: &[u8], below: &mut Below<'_>) -> Result<usize> {
    use rustix::fd::AsFd;
    let fd = open_dir(at, name)?;
    let told = |error| Failure(format!("{}: {error}", name.escape_ascii()));
    let mut seen = 0;
    for entry in Dir::read_from(&fd).map_err(told)? {
        let entry = entry.map_err(told)?;
        let name = entry.file_name().to_bytes();
        if matches!(name, b"." | b"..") {
            continue;
        }
        let stat = statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| Failure(format!("{}: {error}", name.escape_ascii())))?;
        seen += 1;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            seen += below(name, fd.as_fd())?;
        }
    }
    Ok(seen)
}

/// Lists one folder.
pub(super) fn list(root: &Path) -> Result<Duration> {
    let start = Instant::now();
    let fd = open_dir(CWD, root.as_os_str().as_encoded_bytes())?;
    let mut names = 0;
    for entry in Dir::read_from(&fd).map_err(at(root))? {
        entry.map_err(at(root))?;
        names += 1;
    }
    match names {
        0..3 => failure(format!("{}: nothing is there", root.display())),
        _ => Ok(start.elapsed()),
    }
}

/// All regular files below `root`.
fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(at(&folder))? {
            let entry = entry.map_err(at(&folder))?;
            let meta = entry.metadata().map_err(at(&folder))?;
            if meta.is_dir() {
                folders.push(entry.path());
            } else if meta.is_file() {
                found.push(entry.path());
            }
        }
    }
    match found.is_empty() {
        true => failure(format!("{}: no file is there", root.display())),
        false => Ok(found),
    }
}

/// What is done to each file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Each {
    /// Open, read all, close.
    Read,
    /// Append one byte.
    Append,
    /// Another mode.
    Chmod,
    /// Another name in the same folder.
    Rename,
}

/// Does it to each file below `root`.
pub(super) fn each(root: &Path, what: Each) -> Result<Duration> {
    let found = files(root)?;
    let mut buffer = vec![0; MIB];
    let start = Instant::now();
    for path in &found {
        let done = match what {
            Each::Read => File::open(path).and_then(|mut file| {
                while file.read(&mut buffer)? > 0 {}
                Ok(())
            }),
            Each::Append => {
                let opened = OpenOptions::new().append(true).open(path);
                opened.and_then(|mut file| file.write_all(b"y"))
            }
            Each::Chmod => fs::set_permissions(path, fs::Permissions::from_mode(0o640)),
            Each::Rename => {
                let mut to = path.clone().into_os_string();
                to.push(".r");
                fs::rename(path, to)
            }
        };
        done.map_err(at(path))?;
    }
    Ok(start.elapsed())
}

/// Removes everything below `root`.
pub(super) fn remove(root: &Path) -> Result<Duration> {
    let start = Instant::now();
    let fd = open_dir(CWD, root.as_os_str().as_encoded_bytes())?;
    remove_below(&fd)?;
    Ok(start.elapsed())
}

fn remove_below(fd: &rustix::fd::OwnedFd) -> Result<()> {
    let told = |error: rustix::io::Errno| Failure(format!("removing: {error}"));
    for entry in Dir::read_from(fd).map_err(told)? {
        let entry = entry.map_err(told)?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let folder = entry.file_type() == FileType::Directory;
        if folder {
            remove_below(&open_dir(fd, name.to_bytes())?)?;
        }
        let flags = match folder {
            true => AtFlags::REMOVEDIR,
            false => AtFlags::empty(),
        };
        unlinkat(fd, name, flags).map_err(told)?;
    }
    Ok(())
}

/// Opens a file for writing, writes one byte in its middle, closes it.
pub(super) fn touch(file: &Path) -> Result<Duration> {
    let start = Instant::now();
    let done = OpenOptions::new()
        .read(true)
        .write(true)
        .open(file)
        .and_then(|open| {
            let middle = open.metadata()?.len() / 2;
            open.write_all_at(b"z", middle)
        });
    done.map_err(at(file))?;
    Ok(start.elapsed())
}

/// Reads a file in steps of 1 MiB.
pub(super) fn read(file: &Path) -> Result<Duration> {
    let mut buffer = vec![0; MIB];
    let start = Instant::now();
    let mut open = File::open(file).map_err(at(file))?;
    while open.read(&mut buffer).map_err(at(file))? > 0 {}
    drop(open);
    Ok(start.elapsed())
}

/// What is done at random places of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum There {
    /// Read a page.
    Read,
    /// Write a page; one fsync at the end.
    Write,
    /// Write a page and wait until its data is on the disk.
    Commit,
}

/// Does it `times` times; opening is not measured.
pub(super) fn random(file: &Path, times: usize, what: There) -> Result<Duration> {
    let options = OpenOptions::new().read(true).write(true).open(file);
    let open = options.map_err(at(file))?;
    let pages = open.metadata().map_err(at(file))?.len() / PAGE;
    let mut page = [b'w'; PAGE as usize];
    let mut random = Random::new();
    let start = Instant::now();
    for _ in 0..times {
        let place = random.below(pages) * PAGE;
        match what {
            There::Read => open.read_exact_at(&mut page, place),
            There::Write => open.write_all_at(&page, place),
            There::Commit => open
                .write_all_at(&page, place)
                .and_then(|()| open.sync_data()),
        }
        .map_err(at(file))?;
    }
    if what == There::Write {
        open.sync_all().map_err(at(file))?;
    }
    drop(open);
    Ok(start.elapsed())
}

/// Writes a new file in steps of 1 MiB, and waits until it is on the disk.
pub(super) fn write(file: &Path, mib: usize) -> Result<Duration> {
    let content = vec![b'w'; MIB];
    let start = Instant::now();
    let mut open = File::create(file).map_err(at(file))?;
    for _ in 0..mib {
        open.write_all(&content).map_err(at(file))?;
    }
    open.sync_all().map_err(at(file))?;
    drop(open);
    Ok(start.elapsed())
}

/// Reads `times` pages at random places through a shared mapping.
pub(super) fn mapped(file: &Path, times: usize) -> Result<Duration> {
    const PROT_READ: i32 = 1;
    const MAP_SHARED: i32 = 1;
    let start = Instant::now();
    let open = File::open(file).map_err(at(file))?;
    let len = open.metadata().map_err(at(file))?.len();
    let size = usize::try_from(len).map_err(at(file))?;
    let region: MmapRegion<()> =
        MmapRegion::build(Some(FileOffset::new(open, 0)), size, PROT_READ, MAP_SHARED)
            .map_err(at(file))?;
    let mut random = Random::new();
    let mut sum = 0_u64;
    for _ in 0..times {
        let place = usize::try_from(random.below(len / PAGE) * PAGE).map_err(at(file))?;
        let byte = region.get_ref::<u8>(place).map_err(at(file))?;
        sum += u64::from(byte.load());
    }
    std::hint::black_box(sum);
    drop(region);
    Ok(start.elapsed())
}

/// Opens and closes a file `times` times.
pub(super) fn open_close(file: &Path, times: usize) -> Result<Duration> {
    let start = Instant::now();
    for _ in 0..times {
        drop(File::open(file).map_err(at(file))?);
    }
    Ok(start.elapsed())
}

/// Looks at one path `times` times.
pub(super) fn stat(file: &Path, times: usize) -> Result<Duration> {
    let start = Instant::now();
    for _ in 0..times {
        fs::metadata(file).map_err(at(file))?;
    }
    Ok(start.elapsed())
}

/// Looks for a thousand names that are not there, until it has looked `times` times.
pub(super) fn missing(folder: &Path, times: usize) -> Result<Duration> {
    let names: Vec<_> = (0..1000).map(|n| folder.join(format!("no-{n}"))).collect();
    let start = Instant::now();
    for name in names.iter().cycle().take(times) {
        match fs::metadata(name) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(at(name)(error)),
            Ok(_) => return failure(format!("{} is there", name.display())),
        }
    }
    Ok(start.elapsed())
}

/// As dpkg puts a file in its place: written beside it, synced, renamed over it.
pub(super) fn replace(folder: &Path, times: usize) -> Result<Duration> {
    let content = [b'd'; PAGE as usize];
    let start = Instant::now();
    for number in 0..times {
        let to = folder.join(format!("p{number}"));
        let new = folder.join(format!("p{number}.new"));
        let mut options = OpenOptions::new();
        let made = options.write(true).create_new(true).mode(0o644).open(&new);
        let done = made.and_then(|mut file| {
            file.write_all(&content)?;
            file.sync_all()?;
            drop(file);
            fs::rename(&new, &to)
        });
        done.map_err(at(&new))?;
    }
    Ok(start.elapsed())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn each_piece_of_work_does_what_it_says() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("tree");
        fs::create_dir(&root).unwrap();
        tree(&root, 250, 10).unwrap();
        assert_eq!(files(&root).unwrap().len(), 250);
        walk(&root, 1).unwrap();
        walk(&root, 4).unwrap();
        list(&root).unwrap();
        each(&root, Each::Read).unwrap();
        each(&root, Each::Append).unwrap();
        each(&root, Each::Chmod).unwrap();
        each(&root, Each::Rename).unwrap();
        let file = root.join("d00001/f00.r");
        let meta = fs::metadata(&file).unwrap();
        assert_eq!((meta.len(), meta.permissions().mode() & 0o777), (11, 0o640));
        open_close(&file, 3).unwrap();
        stat(&file, 3).unwrap();
        missing(&root, 3).unwrap();
        assert!(missing(&file, 3).is_err() || missing(&root.join("d00001"), 3).is_ok());
        replace(&root, 2).unwrap();
        assert_eq!(fs::metadata(root.join("p1")).unwrap().len(), PAGE);

        let big = dir.path().join("big");
        write(&big, 2).unwrap();
        touch(&big).unwrap();
        assert_eq!(fs::read(&big).unwrap()[MIB], b'z');
        for what in [There::Read, There::Write, There::Commit] {
            random(&big, 5, what).unwrap();
        }
        read(&big).unwrap();
        mapped(&big, 5).unwrap();

        remove(&root).unwrap();
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
        assert!(walk(&root, 1).is_err());
        assert!(list(&root).is_err());
        assert!(each(&root, Each::Read).is_err());
    }
}
