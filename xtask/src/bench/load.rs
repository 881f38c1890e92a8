//! Work that the file systems are compared on. Each function returns the elapsed time of its measured part; the
//! collection of paths beforehand is not measured.

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

fn with_path<'a, E: std::fmt::Display>(path: &'a Path) -> impl Fn(E) -> Failure + 'a {
    move |error| Failure(format!("{}: {error}", path.display()))
}

/// A deterministic generator, so that every file system gets the same sequence.
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

/// Creates `files` files of `size` bytes, a hundred per directory.
pub(super) fn tree(root: &Path, files: usize, size: usize) -> Result<Duration> {
    let content = vec![b'x'; size];
    let start = Instant::now();
    let mut directory = PathBuf::new();
    for number in 0..files {
        if number % 100 == 0 {
            directory = root.join(format!("d{:05}", number / 100));
            fs::create_dir(&directory).map_err(with_path(&directory))?;
        }
        let path = directory.join(format!("f{:02}", number % 100));
        let made = File::create_new(&path).and_then(|mut file| file.write_all(&content));
        made.map_err(with_path(&path))?;
    }
    Ok(start.elapsed())
}

/// Lists everything below `root` and stats each object, as `find -ls` does.
pub(super) fn walk(root: &Path, threads: usize) -> Result<Duration> {
    let start = Instant::now();
    let mut below = Vec::new();
    let seen = stat_entries(
        CWD,
        root.as_os_str().as_encoded_bytes(),
        &mut |name, dir| {
            if threads > 1 {
                below.push(name.to_vec());
                return Ok(0);
            }
            walk_below(dir, name)
        },
    )?;
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
        0 => failure(format!("{}: the directory is empty", root.display())),
        _ => Ok(start.elapsed()),
    }
}

fn walk_below(dir: impl rustix::fd::AsFd, name: &[u8]) -> Result<usize> {
    stat_entries(dir, name, &mut |name, dir| walk_below(dir, name))
}

fn open_dir(dir: impl rustix::fd::AsFd, name: &[u8]) -> Result<rustix::fd::OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(dir, name, flags, Mode::empty())
        .map_err(|error| Failure(format!("{}: {error}", name.escape_ascii())))
}

type OnDirectory<'a> = dyn FnMut(&[u8], rustix::fd::BorrowedFd<'_>) -> Result<usize> + 'a;

/// Stats each entry of one directory, and calls `below` for each subdirectory. Returns the number of entries.
fn stat_entries(
    dir: impl rustix::fd::AsFd,
    name: &[u8],
    below: &mut OnDirectory<'_>,
) -> Result<usize> {
    use rustix::fd::AsFd;
    let fd = open_dir(dir, name)?;
    let failed = |error| Failure(format!("{}: {error}", name.escape_ascii()));
    let mut seen = 0;
    for entry in Dir::read_from(&fd).map_err(failed)? {
        let entry = entry.map_err(failed)?;
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

/// Lists one directory.
pub(super) fn list(root: &Path) -> Result<Duration> {
    let start = Instant::now();
    let fd = open_dir(CWD, root.as_os_str().as_encoded_bytes())?;
    let mut names = 0;
    for entry in Dir::read_from(&fd).map_err(with_path(root))? {
        entry.map_err(with_path(root))?;
        names += 1;
    }
    match names {
        0..3 => failure(format!("{}: the directory is empty", root.display())),
        _ => Ok(start.elapsed()),
    }
}

/// Returns all regular files below `root`.
fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).map_err(with_path(&directory))? {
            let entry = entry.map_err(with_path(&directory))?;
            let meta = entry.metadata().map_err(with_path(&directory))?;
            if meta.is_dir() {
                directories.push(entry.path());
            } else if meta.is_file() {
                found.push(entry.path());
            }
        }
    }
    match found.is_empty() {
        true => failure(format!("{}: there are no regular files", root.display())),
        false => Ok(found),
    }
}

/// An operation on each file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Each {
    /// Opens, reads and closes the file.
    Read,
    /// Appends one byte.
    Append,
    /// Changes the mode.
    Chmod,
    /// Renames the file within its directory.
    Rename,
}

/// Performs an operation on each file below `root`.
pub(super) fn each(root: &Path, operation: Each) -> Result<Duration> {
    let found = files(root)?;
    let mut buffer = vec![0; MIB];
    let start = Instant::now();
    for path in &found {
        let done = match operation {
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
        done.map_err(with_path(path))?;
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
    let failed = |error: rustix::io::Errno| Failure(format!("cannot remove the tree: {error}"));
    for entry in Dir::read_from(fd).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let is_dir = entry.file_type() == FileType::Directory;
        if is_dir {
            remove_below(&open_dir(fd, name.to_bytes())?)?;
        }
        let flags = match is_dir {
            true => AtFlags::REMOVEDIR,
            false => AtFlags::empty(),
        };
        unlinkat(fd, name, flags).map_err(failed)?;
    }
    Ok(())
}

/// Opens a file for writing, writes one byte in the middle, and closes it.
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
    done.map_err(with_path(file))?;
    Ok(start.elapsed())
}

/// Reads a file in steps of 1 MiB.
pub(super) fn read(file: &Path) -> Result<Duration> {
    let mut buffer = vec![0; MIB];
    let start = Instant::now();
    let mut open = File::open(file).map_err(with_path(file))?;
    while open.read(&mut buffer).map_err(with_path(file))? > 0 {}
    drop(open);
    Ok(start.elapsed())
}

/// An operation at random offsets of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum There {
    /// Reads a page.
    Read,
    /// Writes a page; the file is synced once at the end.
    Write,
    /// Writes a page and syncs it with fdatasync.
    Commit,
}

/// Performs an operation at `times` random offsets. The open is not measured.
pub(super) fn random(file: &Path, times: usize, operation: There) -> Result<Duration> {
    let options = OpenOptions::new().read(true).write(true).open(file);
    let open = options.map_err(with_path(file))?;
    let pages = open.metadata().map_err(with_path(file))?.len() / PAGE;
    let mut page = [b'w'; PAGE as usize];
    let mut random = Random::new();
    let start = Instant::now();
    for _ in 0..times {
        let offset = random.below(pages) * PAGE;
        match operation {
            There::Read => open.read_exact_at(&mut page, offset),
            There::Write => open.write_all_at(&page, offset),
            There::Commit => open
                .write_all_at(&page, offset)
                .and_then(|()| open.sync_data()),
        }
        .map_err(with_path(file))?;
    }
    if operation == There::Write {
        open.sync_all().map_err(with_path(file))?;
    }
    drop(open);
    Ok(start.elapsed())
}

/// Writes a new file in steps of 1 MiB, and syncs it.
pub(super) fn write(file: &Path, mib: usize) -> Result<Duration> {
    let content = vec![b'w'; MIB];
    let start = Instant::now();
    let mut open = File::create(file).map_err(with_path(file))?;
    for _ in 0..mib {
        open.write_all(&content).map_err(with_path(file))?;
    }
    open.sync_all().map_err(with_path(file))?;
    drop(open);
    Ok(start.elapsed())
}

/// Reads `times` pages at random offsets through a shared mapping.
pub(super) fn mapped(file: &Path, times: usize) -> Result<Duration> {
    const PROT_READ: i32 = 1;
    const MAP_SHARED: i32 = 1;
    let start = Instant::now();
    let open = File::open(file).map_err(with_path(file))?;
    let len = open.metadata().map_err(with_path(file))?.len();
    let size = usize::try_from(len).map_err(with_path(file))?;
    let region: MmapRegion<()> =
        MmapRegion::build(Some(FileOffset::new(open, 0)), size, PROT_READ, MAP_SHARED)
            .map_err(with_path(file))?;
    let mut random = Random::new();
    let mut sum = 0_u64;
    for _ in 0..times {
        let offset = usize::try_from(random.below(len / PAGE) * PAGE).map_err(with_path(file))?;
        let byte = region.get_ref::<u8>(offset).map_err(with_path(file))?;
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
        drop(File::open(file).map_err(with_path(file))?);
    }
    Ok(start.elapsed())
}

/// Stats one path `times` times.
pub(super) fn stat(file: &Path, times: usize) -> Result<Duration> {
    let start = Instant::now();
    for _ in 0..times {
        fs::metadata(file).map_err(with_path(file))?;
    }
    Ok(start.elapsed())
}

/// Stats nonexistent names `times` times, cycling through a thousand of them.
pub(super) fn missing(directory: &Path, times: usize) -> Result<Duration> {
    let names: Vec<_> = (0..1000)
        .map(|n| directory.join(format!("no-{n}")))
        .collect();
    let start = Instant::now();
    for name in names.iter().cycle().take(times) {
        match fs::metadata(name) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(with_path(name)(error)),
            Ok(_) => return failure(format!("{} exists", name.display())),
        }
    }
    Ok(start.elapsed())
}

/// Replaces files as dpkg does: writes a temporary file, syncs it, and renames it to the final name.
pub(super) fn replace(directory: &Path, times: usize) -> Result<Duration> {
    let content = [b'd'; PAGE as usize];
    let start = Instant::now();
    for number in 0..times {
        let to = directory.join(format!("p{number}"));
        let new = directory.join(format!("p{number}.new"));
        let mut options = OpenOptions::new();
        let made = options.write(true).create_new(true).mode(0o644).open(&new);
        let done = made.and_then(|mut file| {
            file.write_all(&content)?;
            file.sync_all()?;
            drop(file);
            fs::rename(&new, &to)
        });
        done.map_err(with_path(&new))?;
    }
    Ok(start.elapsed())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn every_workload_performs_its_operations() {
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
        for operation in [There::Read, There::Write, There::Commit] {
            random(&big, 5, operation).unwrap();
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
