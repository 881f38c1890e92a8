//! An ext4 file system in memory, because most of the time of a test on a real disk is spent waiting for the journal.

use std::ffi::OsStr;
use std::path::Path;

use crate::command::run;
use crate::mount::wait_until;
use crate::scratch::Scratch;

/// A tmpfs on every machine.
const MEMORY: &str = "/dev/shm";
/// Size of the image, sufficient for several concurrent runs. The image is sparse, so only written blocks take memory.
const SIZE: u64 = 4 << 30;

/// An ext4 file system in memory, mounted until this is dropped.
#[derive(Debug)]
pub struct Disk {
    scratch: Scratch,
}

impl Disk {
    /// Creates and mounts a file system.
    #[track_caller]
    #[must_use]
    pub fn new(test: &str) -> Disk {
        let scratch = Scratch::new_in(Path::new(MEMORY), test);
        let (image, mount_point) = (scratch.join("image"), scratch.make("disk"));
        std::fs::File::create(&image)
            .and_then(|file| file.set_len(SIZE))
            .expect("creating a disk image");
        let quiet: [&OsStr; 3] = ["-q".as_ref(), "-F".as_ref(), image.as_ref()];
        run("mkfs.ext4", quiet).ok();
        let options: &OsStr = "loop,discard".as_ref();
        let args: [&OsStr; 4] = ["-o".as_ref(), options, image.as_ref(), mount_point.as_ref()];
        run("mount", args).ok();
        Disk { scratch }
    }

    /// Returns the mount point.
    #[must_use]
    pub fn path(&self) -> std::path::PathBuf {
        self.scratch.join("disk")
    }

    /// Returns a directory on another file system, also in memory.
    #[must_use]
    pub fn beside(&self) -> &Scratch {
        &self.scratch
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let mount_point = self.path();
        // A daemon releases its layers shortly after its mount is gone.
        wait_until("the disk to be free", || {
            crate::mount::plain_unmount(&mount_point).is_ok()
        });
    }
}
