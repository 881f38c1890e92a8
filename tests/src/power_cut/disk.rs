//! A disk with a log: a file system of one file in this process, with a loop device on the file. The loop
//! device hands every request of the file system on it to us, writes directly and flushes as fsync, and
//! waits for our answer; so the log has them all, in their order. (It knows no FUA: the kernel makes a flush
//! after the write of it.)

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

/// How large a disk is. XFS wants 300 MiB.
const SIZE: u64 = 400 << 20;
/// What a disk writes whole or not at all.
const BLOCK: usize = 4096;
const TTL: Duration = Duration::from_secs(3600);
/// The one file's number.
const FILE: INodeNo = INodeNo(2);
/// How many requests are worked on at a time.
const QUEUE: usize = 8;

/// One request, with the moments (numbers that count up) at which it came and was done.
#[derive(Debug)]
enum Event {
    Write {
        at: u64,
        data: Vec<u8>,
        came: u64,
        done: u64,
    },
    Flush {
        came: u64,
        done: u64,
    },
}

/// What the disk was given since it was watched.
#[derive(Debug, Default)]
pub struct Log {
    clock: AtomicU64,
    watching: AtomicBool,
    events: Mutex<Vec<Event>>,
}

impl Log {
    /// This moment.
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

    /// How many writes and flushes there were.
    #[must_use]
    pub fn len(&self) -> usize {
        self.events().len()
    }

    /// True when there were none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.events().is_empty()
    }

    /// Makes `image`, which is as the disk was when watching began, what a cut at `moment` leaves of it:
    /// what was flushed, and `percent` of the rest.
    pub fn replay(&self, image: &File, moment: u64, percent: u64, coin: &mut Rng) {
        let mut events = self.events();
        events.sort_by_key(|event| match event {
            Event::Write { done, .. } | Event::Flush { done, .. } => *done,
        });
        let flushed = events
            .iter()
            .filter_map(|event| match event {
                Event::Flush { came, done } if *done <= moment => Some(*came),
                _ => None,
            })
            .max()
            .unwrap_or(0);
        for event in events.iter() {
            let Event::Write {
                at,
                data,
                came,
                done,
            } = event
            else {
                continue;
            };
            if *came > moment {
                continue;
            }
            let stable = *done < flushed;
            for (index, block) in data.chunks(BLOCK).enumerate() {
                if stable || coin.chance(percent) {
                    let at = at + (index * BLOCK) as u64;
                    image.write_all_at(block, at).expect("writing the image");
                }
            }
        }
    }
}

/// The disk. Its slowness is what lets requests overtake each other.
#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    place: PathBuf,
    device: String,
    log: Arc<Log>,
    session: Option<fuser::BackgroundSession>,
}

impl Disk {
    /// Makes an empty one in `scratch` and plugs it in.
    #[must_use]
    pub fn new(scratch: &Scratch) -> Disk {
        let (image, place) = (scratch.join("disk.image"), scratch.make("disk"));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&image)
            .expect("making an image");
        file.set_len(SIZE).expect("making an image");
        let log = Arc::new(Log::default());
        let mut config = fuser::Config::default();
        config.n_threads = Some(QUEUE);
        let served = Served {
            file,
            log: log.clone(),
        };
        let session = fuser::spawn_mount(served, &place, &config).expect("mounting the disk");
        let served = place.join("file");
        let args: [&OsStr; 4] = [
            "--direct-io=on".as_ref(),
            "--find".as_ref(),
            "--show".as_ref(),
            served.as_os_str(),
        ];
        let device = crate::command::run("losetup", args).ok().out();
        Disk {
            image,
            place,
            device,
            log,
            session: Some(session),
        }
    }

    /// The block device.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.device
    }

    /// What it is given.
    #[must_use]
    pub fn log(&self) -> Arc<Log> {
        self.log.clone()
    }

    /// Keeps a copy of what is on it as `to`, and remembers from here on what it is given. What comes while
    /// it is copied is in the log, and in the copy or not: the journal may be committed at any time.
    pub fn watch(&self, to: &Path) {
        self.log.watching.store(true, Ordering::SeqCst);
        copy(&self.image, to);
    }

    /// Pulls it out; what used it has been unmounted.
    pub fn unplug(mut self) {
        self.log.watching.store(false, Ordering::SeqCst);
        crate::command::run("losetup", ["--detach", &self.device]).ok();
        // Another test's mount namespace may hold a copy for a moment.
        crate::mount::unmount_free(&self.place);
        // Its threads end with the mount.
        drop(self.session.take());
    }
}

/// Copies an image's data, not its holes.
pub fn copy(from: &Path, to: &Path) {
    let from = File::open(from).expect("opening an image");
    let to = File::create(to).expect("making an image");
    to.set_len(SIZE).expect("making an image");
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(&from, SeekFrom::Data(at)) {
        let end = rustix::fs::seek(&from, SeekFrom::Hole(start)).expect("the end of the data");
        let length = usize::try_from(end - start).expect("a length");
        let mut data = vec![0; length];
        from.read_exact_at(&mut data, start)
            .expect("reading an image");
        to.write_all_at(&data, start).expect("writing an image");
        at = end;
    }
}

struct Served {
    file: File,
    log: Arc<Log>,
}

impl Served {
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

    /// As long as this write takes: most are quick, some are overtaken by many.
    fn linger(came: u64) {
        let mut luck = Rng::new(came);
        let micros = if luck.chance(15) {
            luck.below(20_000)
        } else {
            luck.below(300)
        };
        std::thread::sleep(Duration::from_micros(micros));
    }
}

impl Filesystem for Served {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        config
            .add_capabilities(InitFlags::FUSE_ASYNC_DIO)
            .map_err(|lacks| std::io::Error::other(format!("{lacks:?}")))?;
        config
            .set_max_write(1 << 20)
            .map(drop)
            .map_err(|most| std::io::Error::other(format!("at most {most}")))
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "file" {
            reply.entry(&TTL, &Served::attr(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &Served::attr(ino));
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
        at: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut data = vec![0; size as usize];
        match self.file.read_exact_at(&mut data, at) {
            Ok(()) => reply.data(&data),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let came = self.log.tick();
        if self.log.watching.load(Ordering::SeqCst) {
            Served::linger(came);
        }
        if self.file.write_all_at(data, at).is_err() {
            return reply.error(Errno::EIO);
        }
        self.log.note(Event::Write {
            at,
            data: data.to_vec(),
            came,
            done: self.log.tick(),
        });
        reply.written(u32::try_from(data.len()).unwrap_or_default());
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let came = self.log.tick();
        let done = self.log.tick();
        self.log.note(Event::Flush { came, done });
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}
