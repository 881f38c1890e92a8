//! Creates the file system that everything is measured on: an ext4 of its own in memory, or a directory on a disk.
//! Removes it at the end, also when the run is interrupted.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cowl_tests::mount;
use cowl_tests::scratch::Scratch;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::namespace::UserNamespace;
use crate::run::{Failure, Result, Run, failure, note};

const GIB: u64 = 1 << 30;

/// A tmpfs on every machine.
const MEMORY: &str = "/dev/shm";

/// A base file system, which is removed on drop.
#[derive(Debug)]
pub(super) struct Ground {
    scratch: Scratch,
    /// Description for the report.
    pub(super) description: String,
    /// The namespaces of a plain user, once a file system has been mounted in them.
    user: OnceCell<UserNamespace>,
}

impl Ground {
    /// Creates the base file system: in memory, for this number of bytes, or below `disk`.
    pub(super) fn new(disk: Option<&Path>, bytes: u64) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return failure("only root can mount the compared file systems");
        }
        let parent = disk.unwrap_or(Path::new(MEMORY));
        // If a signal arrives before `watch`, the scratch directory is left behind, but nothing is mounted yet.
        let scratch = Scratch::new_in(parent, &format!("bench-{}", std::process::id()));
        watch(&scratch)?;
        let mount = scratch.make("ground");
        let mut ground = Self {
            scratch,
            description: "a disk".to_owned(),
            user: OnceCell::new(),
        };
        if disk.is_none() {
            let size = image_size(bytes)?;
            let image = ground.scratch.join("image");
            std::fs::File::create(&image)?.set_len(size)?;
            Run::new("mkfs.ext4").args(["-q", "-F"]).arg(&image).run()?;
            // With discard, the blocks of removed files are returned to memory.
            Run::new("mount")
                .args(["-o", "loop,discard"])
                .arg(&image)
                .arg(&mount)
                .run()?;
            ground.description = "ext4 on an image in memory".to_owned();
        } else {
            let kind = Run::new("findmnt")
                .args(["-n", "-o", "FSTYPE", "-T"])
                .arg(&mount)
                .unseen()
                .output()?;
            ground.description = format!("{kind} on this machine's disk");
        }
        Ok(ground)
    }

    /// Returns the namespaces of a plain user, and creates them at the first call, with copies of these programs.
    pub(super) fn user(&self, programs: &[&Path]) -> Result<&UserNamespace> {
        if let Some(user) = self.user.get() {
            return Ok(user);
        }
        let user = UserNamespace::new(&self.scratch, programs)?;
        Ok(self.user.get_or_init(|| user))
    }

    /// Returns the directory with the layers.
    pub(super) fn path(&self) -> PathBuf {
        self.scratch.join("ground")
    }

    /// Creates an empty mount point, upper and work directory, and returns them in that order.
    pub(super) fn fresh(&self, name: &str) -> Result<[PathBuf; 3]> {
        let run = self.path().join(name);
        clear(&run)?;
        let directories = ["m", "u", "w"].map(|name| run.join(name));
        for directory in &directories {
            std::fs::create_dir_all(directory)?;
        }
        Ok(directories)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // Its copy of the base file system would keep the loop device in use.
        drop(self.user.take());
        // The scratch directory unmounts lazily, which would leave a loop device attached. So unmount here, and retry
        // while the device is busy.
        for mount in mount::below(&self.scratch).into_iter().rev() {
            for _ in 0..50 {
                if mount::plain_unmount(&mount).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// Unmounts `path`; lazily if it is still busy after a second.
pub(super) fn unmount(path: &Path) -> Result<()> {
    for _ in 0..100 {
        if mount::at(path).is_none() || mount::plain_unmount(path).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    note(&format!("{} is still in use", path.display()));
    mount::detach(path).map_err(Failure::from)
}

/// Removes a directory if it exists.
pub(super) fn clear(directory: &Path) -> Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Failure(format!(
            "cannot remove {}: {error}",
            directory.display()
        ))),
        _ => Ok(()),
    }
}

/// Returns the size of an image for this number of bytes. Fails if the machine has too little free memory.
fn image_size(used: u64) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let free = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .map_or(0, |kilobytes| kilobytes << 10);
    // The page cache holds the content of the image a second time.
    if used * 2 > free {
        return failure(format!(
            "this needs {} MiB of memory and {} MiB are free: use --disk DIR, or reduce --big and --files",
            (used * 2) >> 20,
            free >> 20
        ));
    }
    Ok(used.next_multiple_of(GIB))
}

/// Starts a thread that unmounts and removes everything on SIGINT, SIGTERM or SIGHUP, and then exits the process.
fn watch(scratch: &Path) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    let scratch = scratch.to_owned();
    std::thread::spawn(move || {
        let Some(signal) = signals.forever().next() else {
            return;
        };
        note("\ninterrupted: cleaning up");
        // Twice, because the base is busy until the mounts on it are detached.
        for _ in 0..2 {
            for mount in mount::below(&scratch).into_iter().rev() {
                if let Err(error) = mount::detach(&mount) {
                    note(&format!("cannot unmount {}: {error}", mount.display()));
                }
            }
        }
        if let Err(error) = clear(&scratch) {
            note(&error.to_string());
        }
        std::process::exit(128 + signal);
    });
    Ok(())
}
