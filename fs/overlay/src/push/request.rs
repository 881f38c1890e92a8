//! The request to push a layer, and its result.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cowl_layers::error::Error;
use cowl_layers::setup::SetupError;
use cowl_layers::shown::Show as _;

use super::helper::{Ran, run_until};

/// The time for which a failed push waits until it is undone.
const CLEANUP_TIME: Duration = Duration::from_secs(2);
/// The maximum number of names in a message.
pub(super) const MAX_SHOWN: usize = 5;

/// A file that the kernel reads or writes without requests (passthrough).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassthroughFile {
    /// The node id.
    pub node_id: u64,
    /// The version of the content that it reads or writes ([`crate::inode::Inode::content_version`]); `None` if unknown.
    pub version: Option<u32>,
    /// Whether the kernel may write to it.
    pub is_written: bool,
    /// Whether it may be mapped for writing.
    pub is_mapped: bool,
}

/// Whether programs write to files while a layer is pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writers {
    /// Programs may write.
    Running,
    /// Programs are stopped. If the file system cannot share blocks, files are copied up to a total size.
    Stopped {
        /// The maximum total size of the files in bytes.
        max_bytes: u64,
    },
}

/// The parameters of a push.
#[derive(Clone, Copy)]
pub struct PushRequest<'a> {
    /// Returns the files that the kernel reads or writes without requests.
    pub passthrough: &'a dyn Fn() -> Vec<PassthroughFile>,
    /// Whether programs write to files.
    pub writers: Writers,
}

impl Default for PushRequest<'_> {
    fn default() -> Self {
        Self {
            passthrough: &Vec::new,
            writers: Writers::Running,
        }
    }
}

impl fmt::Debug for PushRequest<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("PushRequest")
            .field("writers", &self.writers)
            .finish_non_exhaustive()
    }
}

/// The effects of a push.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pushed {
    /// The number of files that were copied because the kernel reads or writes them without requests.
    pub copied: usize,
    /// Their size in bytes.
    pub bytes: u64,
    /// The number of rounds in which files were copied, until none changed any more.
    pub rounds: u32,
    /// The time for which requests waited.
    pub pause: Duration,
    /// The time for which the push waited for running operations, in all attempts.
    pub waited: Duration,
    /// The time for which the push waited for programs to end their writes, after requests had continued.
    pub delayed: Duration,
    /// The number of attempts; more than one if names changed at the same time.
    pub attempts: u32,
    /// Whether the copies share blocks with the files.
    pub shares_blocks: bool,
    /// The node ids of directories whose attributes in the kernel's cache are stale.
    pub stale: Vec<u64>,
}

/// Files that prevented a push.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unattended {
    /// Their number.
    pub count: usize,
    /// The paths of some of them, relative to the root.
    pub names: Vec<Vec<u8>>,
    /// The reason.
    pub cause: UnattendedCause,
}

/// The reason why files that are written without requests prevented a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnattendedCause {
    /// The file system cannot share blocks, and programs were not stopped.
    NoSharedBlocks,
    /// The file system cannot share blocks, and the files have this number of bytes.
    TooLarge(u64),
    /// The files changed after each attempt to copy them.
    KeptChanging,
    /// There are too many files.
    TooMany,
    /// The copies took too long.
    TooSlow,
    /// The files are unknown, or not at their expected location.
    Unknown,
}

/// The reason why a layer was not pushed. The stack is unchanged.
#[derive(Debug)]
pub enum PushError {
    /// Running operations did not end before the timeout.
    TooBusy,
    /// An earlier push that failed is still being undone.
    Undoing,
    /// The kernel may write to files without a request (passthrough), which would change the frozen layer.
    Unattended(Unattended),
    /// The new layer cannot be used.
    Setup(SetupError),
}

impl fmt::Display for Unattended {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            count,
            names,
            cause,
        } = self;
        write!(out, "{count} file(s) may be written by passthrough")?;
        for (index, name) in names.iter().take(MAX_SHOWN).enumerate() {
            let before = if index == 0 { " (" } else { ", " };
            write!(out, "{before}/{}", name.shown())?;
        }
        if !names.is_empty() {
            let rest = if *count > MAX_SHOWN { ", ..." } else { "" };
            write!(out, "{rest})")?;
        }
        let closed = "close them (a file that was opened for reading and writing counts until the kernel forgets it: \
                      'sysctl vm.drop_caches=2')";
        match cause {
            UnattendedCause::NoSharedBlocks => write!(
                out,
                ", and the file system of the layers cannot share blocks, as XFS and btrfs can: {closed}"
            ),
            UnattendedCause::TooLarge(bytes) => write!(
                out,
                ", and the file system of the layers cannot share their {bytes} bytes: {closed}"
            ),
            UnattendedCause::KeptChanging => out.write_str(
                ", and programs changed them again whenever they had been copied: try again when less is written",
            ),
            UnattendedCause::TooMany => {
                write!(out, ", which is more than can be copied: {closed}")
            }
            UnattendedCause::TooSlow => out.write_str(
                ", and it takes too long to copy them: try again when less is written",
            ),
            UnattendedCause::Unknown => write!(out, ", and cannot be copied: {closed}"),
        }?;
        out.write_str(", or mount again with passthrough=read")
    }
}

/// The reason why the steps of a push did not succeed.
#[derive(Debug)]
pub(super) enum Stopped {
    /// Files prevented it.
    By(Unattended),
    /// Names changed at the same time.
    Race,
    /// A system call failed.
    Error(Error),
}

/// A push that did not succeed.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) cause: Stopped,
    /// The work that is left once requests no longer wait.
    pub(super) cleanup: Option<Cleanup>,
}

/// The work that remains after a push has failed.
pub(super) struct Cleanup(pub(super) Box<dyn FnOnce() + Send>);

impl fmt::Debug for Cleanup {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Cleanup")
    }
}

impl Cleanup {
    /// Does the rest in another thread, which may have to wait for a program. Waits for it for a short time.
    ///
    /// `undoing` has one more reference until the end.
    pub(super) fn start(self, undoing: Arc<()>) {
        let work = move || {
            (self.0)();
            drop(undoing);
        };
        match run_until(Instant::now() + CLEANUP_TIME, work) {
            Ok(Ran::Done(())) => {}
            Ok(Ran::Late(_)) => {
                log::warn!(
                    "a push that failed is still being undone, because a program does not end a write"
                );
            }
            Err(error) => log::error!("cannot undo a push: {error}"),
        }
    }
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl<T: Into<Stopped>> From<T> for Failed {
    fn from(cause: T) -> Self {
        Self {
            cause: cause.into(),
            cleanup: None,
        }
    }
}
