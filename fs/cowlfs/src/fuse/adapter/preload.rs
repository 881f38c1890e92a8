//! Stores the content of a small file in the kernel's page cache at the first open, so that no READ follows.
//!
//! The notification (FUSE_NOTIFY_STORE) is sent before the reply to the OPEN. It could deadlock with a READ of
//! another process: the kernel locks each page to store it, and a READ holds that lock until it is answered, which
//! can depend on this OPEN, because a push of a layer waits for the OPEN, and new requests wait for the push. So the
//! content is stored only at the first open after the kernel has looked the inode up, and the replies to other opens
//! of the file wait until it is stored. There is no READ of the file before.

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
    /// Begins an open of `inode`. Returns `Some` if it is the first one; otherwise, waits until the first one is
    /// done.
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
    /// Stores the content of a file in the kernel's page cache if it is small.
    ///
    /// `fd` must be a descriptor of the content in a lower layer, which does not change, and `version` that of the
    /// content.
    pub(super) fn store(
        &self,
        notifier: &Notifier,
        (inode, node_id): (&Inode, INodeNo),
        (fd, version): (&OwnedFd, u32),
    ) {
        // After an error nothing is stored: the READ that follows reports it.
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
            // A write or a truncation needs a copy-up first, which waits for the store. Its effect on the kernel's
            // cache therefore comes later than the stored content.
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
