//! What everything stands on: an ext4 of its own in memory, or a folder on a disk; and its end, also when
//! the run is broken off.

use std::path::{Path, PathBuf};
use std::time::Duration;

use cowl_tests::mount;
use cowl_tests::scratch::Scratch;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::lowers;
use super::rows::Sizes;
use crate::run::{Failure, Result, Run, failure, note};

const GIB: u64 = 1 << 30;

/// Where memory is a file system.
const MEMORY: &str = "/dev/shm";

/// The ground, cleared away when it is dropped.
#[derive(Debug)]
pub(super) struct Ground {
    scratch: Scratch,
    /// How it is called in the report.
    pub(super) told: String,
}

impl Ground {
    /// Makes it: in memory with room for what `sizes` needs, or below `disk`.
    pub(super) fn new(disk: Option<&Path>, sizes: &Sizes) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return failure("only root can mount what is compared");
        }
        let parent = disk.unwrap_or(Path::new(MEMORY));
        // Not gone with its owner before the signals are watched: a second of nothing at worst.
        let scratch = Scratch::new_in(parent, &format!("bench-{}", std::process::id()));
        watch(&scratch)?;
        let place = scratch.make("ground");
        let mut ground = Self {
            scratch,
            told: "a disk".to_owned(),
        };
        if disk.is_none() {
            let size = room(sizes)?;
            let image = ground.scratch.join("image");
            std::fs::File::create(&image)?.set_len(size)?;
            Run::new("mkfs.ext4").args(["-q", "-F"]).arg(&image).run()?;
            // What is removed goes back to memory.
            Run::new("mount")
                .args(["-o", "loop,discard"])
                .arg(&image)
                .arg(&place)
                .run()?;
            ground.told = "ext4 on an image in memory".to_owned();
        } else {
            let kind = Run::new("findmnt")
                .args(["-n", "-o", "FSTYPE", "-T"])
                .arg(&place)
                .unseen()
                .output()?;
            ground.told = format!("{kind} on this machine's disk");
        }
        lowers::make(&ground.path(), sizes)?;
        Ok(ground)
    }

    /// The folder with the layers.
    pub(super) fn path(&self) -> PathBuf {
        self.scratch.join("ground")
    }

    /// A fresh mount point, upper and work folder, in that order.
    pub(super) fn fresh(&self, name: &str) -> Result<[PathBuf; 3]> {
        let run = self.path().join(name);
        clear(&run)?;
        let folders = ["m", "u", "w"].map(|folder| run.join(folder));
        for folder in &folders {
            std::fs::create_dir_all(folder)?;
        }
        Ok(folders)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // The scratch folder takes away what is mounted in it lazily; a loop device that is still busy for
        // a moment goes with its last user.
        for place in mount::below(&self.scratch).into_iter().rev() {
            for _ in 0..50 {
                if mount::plain_unmount(&place).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// Unmounts, lazily when somebody goes on using it for a second.
pub(super) fn unmount(place: &Path) -> Result<()> {
    for _ in 0..100 {
        if mount::at(place).is_none() || mount::plain_unmount(place).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    note(&format!("{} is still in use", place.display()));
    mount::detach(place).map_err(Failure::from)
}

/// Removes a folder that may not be there.
pub(super) fn clear(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Failure(format!(
            "cannot remove {}: {error}",
            folder.display()
        ))),
        _ => Ok(()),
    }
}

/// How large an image has to be, and whether the machine has as much: an overlay's copies of both big files,
/// what is written beside them, and the small files three times over.
fn room(sizes: &Sizes) -> Result<u64> {
    let (big, files) = (sizes.big_mib as u64, sizes.files as u64);
    let small = files * 5 * 3 + (sizes.owned as u64 + sizes.names as u64) * 2;
    let used = (big << 20) * 6 + (small << 12) + GIB / 2;
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let free = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .map_or(0, |kilobytes| kilobytes << 10);
    // What is read from the image is in memory a second time.
    if used * 2 > free {
        return failure(format!(
            "this needs {} MiB of memory and {} are free: --disk DIR, or a smaller --big and --files",
            (used * 2) >> 20,
            free >> 20
        ));
    }
    Ok(used.next_multiple_of(GIB))
}

/// Ctrl-C and the like: what was mounted is unmounted and removed, then the run ends.
fn watch(scratch: &Path) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    let scratch = scratch.to_owned();
    std::thread::spawn(move || {
        let Some(signal) = signals.forever().next() else {
            return;
        };
        note("\nbroken off: clearing up");
        // Twice: the ground is free only when what stands on it is gone.
        for _ in 0..2 {
            for place in mount::below(&scratch).into_iter().rev() {
                if let Err(error) = mount::detach(&place) {
                    note(&format!("cannot unmount {}: {error}", place.display()));
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
