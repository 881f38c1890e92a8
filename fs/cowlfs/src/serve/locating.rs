//! Location of the objects of a killed daemon's inodes, in the background.
//!
//! Requests locate the objects that they need by themselves (docs/decisions/0035). Until all are located, directories
//! that the kernel has forgotten are retained for those in them.

use std::io;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use cowl_overlay::Overlay;
use cowl_overlay::inode::Unlocated;

/// The number of objects that are located between two pauses. It takes about one millisecond.
const BATCH: usize = 256;
/// The pause, which leaves the CPU and the disk to requests.
const PAUSE: Duration = Duration::from_millis(4);

/// Starts a thread that locates all objects, unless they are located.
pub(super) fn start(overlay: &Arc<Overlay>) -> io::Result<()> {
    let unlocated = Unlocated::of(overlay.inodes()).numbers();
    if unlocated.is_empty() {
        return Ok(());
    }
    let overlay = Arc::downgrade(overlay);
    let builder = thread::Builder::new().name("locating".to_owned());
    builder.spawn(move || locate(&overlay, &unlocated))?;
    Ok(())
}

fn locate(overlay: &Weak<Overlay>, unlocated: &[u64]) {
    for batch in unlocated.chunks(BATCH) {
        let Some(overlay) = overlay.upgrade() else {
            return;
        };
        for ino in batch {
            if let Err(error) = overlay.begin().inode(*ino) {
                log::debug!("inode {ino} was forgotten, or is to be located later: {error}");
            }
        }
        drop(overlay);
        thread::sleep(PAUSE);
    }
    if let Some(overlay) = overlay.upgrade()
        && let Err(error) = overlay.locate_all()
    {
        log::warn!("cannot read an object that was known before the kill: {error}");
    }
}
