//! A disk in memory with an ext4 on it: what a test waits for on a real one is mostly its journal.

use std::ffi::OsStr;
use std::path::Path;

use crate::command::run;
use crate::mount::wait_until;
use crate::scratch::Scratch;

/// Where memory is a filesystem.
const MEMORY: &str = "/dev/shm";
/// Room for some runs at a time; only what is written takes memory.
const SIZE: u64 = 4 << 30;

/// An ext4 in memory, mounted for as long as this lives.
#[derive(Debug)]
pub struct Disk {
    scratch: Scratch,
}

impl Disk {
    /// Makes one.
    #[track_caller]
    #[must_use]
    pub fn new(test: &str) -> Disk {
        let scratch = Scratch::new_in(Path::new(MEMORY), test);
        let (image, place) = (scratch.join("image"), scratch.make("disk"));
        std::fs::File::create(&image)
            .and_then(|file| file.set_len(SIZE))
            .expect("making a disk image");
        let quiet: [&OsStr; 3] = ["-q".as_ref(), "-F".as_ref(), image.as_ref()];
        run("mkfs.ext4", quiet).ok();
        let options: &OsStr = "loop,discard".as_ref();
        let args: [&OsStr; 4] = ["-o".as_ref(), options, image.as_ref(), place.as_ref()];
        run("mount", args).ok();
        Disk { scratch }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> std::path::PathBuf {
        self.scratch.join("disk")
    }

    /// A folder beside the disk: in memory itself, on another filesystem.
    #[must_use]
    pub fn beside(&self) -> &Scratch {
        &self.scratch
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let place = self.path();
        // Daemons let go of their layers a moment after their mounts are gone.
        wait_until("the disk to be free", || {
            crate::mount::plain_unmount(&place).is_ok()
        });
    }
}
