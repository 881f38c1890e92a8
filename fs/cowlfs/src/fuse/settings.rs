//! The settings of a session.

use std::sync::Arc;
use std::time::Duration;

use crate::choices::{Awake, Coherence, Mounter, Passthrough};
use crate::requests::Requests;

/// The settings of a session with the kernel.
pub(crate) struct SessionSettings {
    /// The number of worker threads.
    pub(crate) threads: usize,
    /// The time for which the kernel may cache names and attributes.
    pub(crate) cache_timeout: Duration,
    /// Whether the kernel may cache listings, which have no timeout.
    pub(crate) cache_listings: bool,
    /// The time for which a thread that has answered a request polls for the next one before it sleeps.
    pub(crate) busy_poll: Duration,
    /// Whether CPUs are kept awake during a burst of requests.
    pub(crate) awake: Awake,
    /// The counters of requests.
    pub(crate) requests: Arc<Requests>,
    /// The files that the kernel reads and writes without the daemon.
    pub(crate) passthrough: Passthrough,
    /// The content that old descriptors of lower files show.
    pub(crate) coherence: Coherence,
    /// The process that mounts, in whose pid namespace callers are identified.
    pub(crate) mounter: Mounter,
    /// Whether another process may change the layers.
    pub(crate) live_layers: bool,
    /// Whether this process has the privilege for passthrough.
    pub(crate) may_use_passthrough: bool,
    /// Whether layers can be pushed while the file system is mounted.
    pub(crate) stack: StackMode,
}

/// Whether the stack of layers can change during a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StackMode {
    /// A control client can push a new top layer, which takes a snapshot.
    Pushable,
    /// The stack stays the same until the unmount.
    Fixed,
}
