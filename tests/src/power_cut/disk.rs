//! A disk with a log: a FUSE file system in this process that contains one file, with a loop device on that file. The
//! loop device forwards every request of the file system on it, writes with direct I/O and flushes as fsync, and waits
//! for the reply. So the log contains all requests in order. (The loop device does not support FUA: the kernel sends a
//! flush after such a write.)

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, WriteFlags,
};
use rustix::fs::SeekFrom;

use crate::random::rng::Rng;
use crate::scratch::Scratch;

/// Size of a disk. XFS requires 300 MiB.
const SIZE: u64 = 400 << 20;
/// Size of an atomic write of the disk.
const BLOCK: usize = 4096;
const TTL: Duration = Duration::from_secs(3600);
/// Inode number of the file.
const FILE: INodeNo = INodeNo(2);
/// Number of requests that are processed concurrently.
const QUEUE: usize = 8;

/// A request, with the times of its arrival and completion. Times are numbers that count up.
#[derive(Debug)]
enum Event {
    Write {
        offset: u64,
        data: Vec<u8>,
        arrived: u64,
        done: u64,
    },
    Flush {
        arrived: u64,
        done: u64,
    },
}

/// The requests since logging began.
#[derive(Debug, Default)]
pub struct Log {
    clock: AtomicU64,
    watching: AtomicBool,
    events: Mutex<Vec<Event>>,
}

impl Log {
    /// Returns the current time.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.clock.load(Ordering::SeqCst)
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst) + 1
    }

    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, event: Event) {
        if self.watching.load(Ordering::SeqCst) {
            self.events().push(event);
        }
    }

    /// Returns the number of writes and flushes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.events().len()
    }

    /// Returns whether there were no requests.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.events().is_empty()
    }

    /// Turns `image`, a copy of the disk from when logging began, into the state after a power cut at `moment`: flushed
    /// writes survive, and the other blocks with a probability of `percent`.
    pub fn replay(&self, image: &File, moment: u64, percent: u64, rng: &mut Rng) {
        let mut events = self.events();
        events.sort_by_key(|event| match event {
            Event::Write { done, .. } | Event::Flush { done, .. } => *done,
        });
        let flushed = events
            .iter()
            .filter_map(|event| match event {
                Event::Flush { arrived, done } if *done <= moment => Some(*arrived),
                _ => None,
            })
            .max()
            .unwrap_or(0);
        for event in events.iter() {
            let Event::Write {
                offset,
                data,
                arrived,
                done,
            } = event
            else {
                continue;
            };
            if *arrived > moment {
                continue;
            }
            let stable = *done < flushed;
            for (index, block) in data.chunks(BLOCK).enumerate() {
                if stable || rng.chance(percent) {
                    let offset = offset + (index * BLOCK) as u64;
                    image
                        .write_all_at(block, offset)
                        .expect("writing the image");
                }
            }
        }
    }
}

/// The simulated disk. Random delays let requests overtake each other.
#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    mount_point: PathBuf,
    device: String,
    log: Arc<Log>,
    session: Option<fuser::BackgroundSession>,
}

impl Disk {
    /// Creates an empty disk in `scratch` and attaches it.
    #[must_use]
    pub fn new(scratch: &Scratch) -> Disk {
        let (image, mount_point) = (scratch.join("disk.image"), scratch.make("disk"));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&image)
            .expect("creating an image");
        file.set_len(SIZE).expect("creating an image");
        let log = Arc::new(Log::default());
        let mut config = fuser::Config::default();
        config.n_threads = Some(QUEUE);
        let filesystem = DiskFile {
            file,
            log: log.clone(),
        };
        let session =
            fuser::spawn_mount(filesystem, &mount_point, &config).expect("mounting the disk");
        let path = mount_point.join("file");
        let args: [&OsStr; 4] = [
            "--direct-io=on".as_ref(),
            "--find".as_ref(),
            "--show".as_ref(),
            path.as_os_str(),
        ];
        let device = crate::command::run("losetup", args).ok().out();
        Disk {
            image,
            mount_point,
            device,
            log,
            session: Some(session),
        }
    }

    /// Returns the path of the block device.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Returns the log of requests.
    #[must_use]
    pub fn log(&self) -> Arc<Log> {
        self.log.clone()
    }

    /// Starts logging, and copies the disk to `to`. Requests during the copy are in the log, and may be in the copy as
    /// well, because the journal may be committed at any time.
    pub fn watch(&self, to: &Path) {
        self.log.watching.store(true, Ordering::SeqCst);
        copy(&self.image, to);
    }

    /// Detaches the disk, which must be unmounted.
    pub fn unplug(mut self) {
        self.log.watching.store(false, Ordering::SeqCst);
        crate::command::run("losetup", ["--detach", &self.device]).ok();
        // Another test's mount namespace may hold a copy of the mount for a moment.
        crate::mount::unmount_free(&self.mount_point);
        // The session's threads end with the mount.
        drop(self.session.take());
    }
}

/// Copies the data of a sparse image.
pub fn copy(from: &Path, to: &Path) {
    let from = File::open(from).expect("opening an image");
    let to = File::create(to).expect("creating an image");
    to.set_len(SIZE).expect("creating an image");
    let mut offset = 0;
    while let Ok(start) = rustix::fs::seek(&from, SeekFrom::Data(offset)) {
        let end = rustix::fs::seek(&from, SeekFrom::Hole(start)).expect("the end of the data");
        let length = usize::try_from(end - start).expect("a length");
        let mut data = vec![0; length];
        from.read_exact_at(&mut data, start)
            .expect("reading an image");
        to.write_all_at(&data, start).expect("writing an image");
        offset = end;
    }
}

struct DiskFile {
    file: File,
    log: Arc<Log>,
}

impl DiskFile {
    fn attr(ino: INodeNo) -> FileAttr {
        let file = ino == FILE;
        FileAttr {
            ino,
            size: if file { SIZE } else { 0 },
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if file {
                FileType::RegularFile
            } else {
                FileType::Directory
            },
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        }
    }

    /// Delays a write: most take little time, some are overtaken by many others.
    fn delay(arrived: u64) {
        let mut rng = Rng::new(arrived);
        let micros = if rng.chance(15) {
            rng.below(20_000)
        } else {
            rng.below(300)
        };
        std::thread::sleep(Duration::from_micros(micros));
    }
}

impl Filesystem for DiskFile {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        config
            .add_capabilities(InitFlags::FUSE_ASYNC_DIO)
            .map_err(|missing| {
                std::io::Error::other(format!("unsupported capabilities: {missing:?}"))
            })?;
        config
            .set_max_write(1 << 20)
            .map(drop)
            .map_err(|limit| std::io::Error::other(format!("max_write is limited to {limit}")))
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "file" {
            reply.entry(&TTL, &DiskFile::attr(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &DiskFile::attr(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut data = vec![0; size as usize];
        match self.file.read_exact_at(&mut data, offset) {
            Ok(()) => reply.data(&data),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let arrived = self.log.tick();
        if self.log.watching.load(Ordering::SeqCst) {
            DiskFile::delay(arrived);
        }
        if self.file.write_all_at(data, offset).is_err() {
            return reply.error(Errno::EIO);
        }
        self.log.note(Event::Write {
            offset,
            data: data.to_vec(),
            arrived,
            done: self.log.tick(),
        });
        reply.written(u32::try_from(data.len()).unwrap_or_default());
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let arrived = self.log.tick();
        let done = self.log.tick();
        self.log.note(Event::Flush { arrived, done });
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}
