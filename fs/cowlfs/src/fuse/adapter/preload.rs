//! Small files whose content the kernel gets with the first open, so that it sends no READ.
//!
//! The content is stored in the kernel's page cache (FUSE_NOTIFY_STORE) before the reply to the OPEN. The kernel locks
//! each page for that, and a READ of another process would hold the lock until it is answered, which can depend on this
//! OPEN: a push of a layer waits for it, and new requests wait for the push. So it happens only at the first open since
//! the kernel has known the inode, and the replies to other opens of the file wait until it is done: there is no READ
//! of the file before.

use std::cell::RefCell;
use std::os::fd::OwnedFd;

use fuser::{INodeNo, Notifier};
use parking_lot::{Condvar, Mutex};
use rustc_hash::FxHashSet;

use cowl_layers::points::point;
use cowl_layers::sys;
use cowl_overlay::inode::{Inode, while_content_stays};

/// The maximum size in bytes of a file that is stored as a whole.
const MAX_SIZE: usize = 64 << 10;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The files whose first open is being answered, by their inode numbers.
#[derive(Debug, Default)]
pub(super) struct FirstOpens {
    pending: Mutex<FxHashSet<u64>>,
    done: Condvar,
}

/// The first open of a file. While it exists, other opens of the file wait.
pub(super) struct FirstOpen<'a> {
    opens: &'a FirstOpens,
    ino: u64,
}

impl FirstOpens {
    /// Begins an open of `inode`, and waits until the first one is done. Returns `Some` if it is the first one.
    pub(super) fn begin(&self, inode: &Inode) -> Option<FirstOpen<'_>> {
        let ino = inode.ino();
        let mut pending = self.pending.lock();
        if inode.flags().note_open() {
            pending.insert(ino);
            return Some(FirstOpen { opens: self, ino });
        }
        while pending.contains(&ino) {
            self.done.wait(&mut pending);
        }
        None
    }
}

impl FirstOpen<'_> {
    /// Stores the content of a file in the kernel's page cache if it is small. `descriptor` is that of the content in
    /// a lower layer, which does not change, with its version.
    pub(super) fn store(
        &self,
        notifier: &Notifier,
        (inode, node_id): (&Inode, INodeNo),
        (fd, version): (&OwnedFd, u32),
    ) {
        // The READ reports an error.
        let Ok(size) = sys::stat::stat_fd(fd).map(|stat| stat.size) else {
            return;
        };
        let Some(size) = usize::try_from(size)
            .ok()
            .filter(|size| (1..=MAX_SIZE).contains(size))
        else {
            return;
        };
        BUFFER.with_borrow_mut(|buffer| {
            buffer.resize(size, 0);
            let read = rustix::io::retry_on_intr(|| rustix::io::pread(fd, &mut **buffer, 0));
            if read != Ok(size) {
                return;
            }
            let content = buffer.as_slice();
            point("before content is stored");
            // A write or a truncation needs a copy-up first, which waits: what the kernel has cached is then older than
            // their effect.
            let stored =
                while_content_stays(inode, version, || notifier.store(node_id, 0, content));
            if let Some(Err(error)) = stored {
                log::debug!("cannot store the content of inode {}: {error}", self.ino);
            }
        });
    }
}

impl Drop for FirstOpen<'_> {
    fn drop(&mut self) {
        self.opens.pending.lock().remove(&self.ino);
        self.opens.done.notify_all();
    }
}
