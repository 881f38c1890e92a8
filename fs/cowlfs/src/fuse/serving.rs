//! The settings of a session.

use std::sync::Arc;
use std::time::Duration;

use crate::choices::{Awake, Coherence, Passthrough};
use crate::requests::Requests;

/// How requests are answered.
pub(crate) struct Serving {
    /// By how many threads.
    pub(crate) threads: usize,
    /// How long the kernel may keep what it is told.
    pub(crate) keep: Duration,
    /// Whether it may keep listings, of which it does not ask after a while whether they are still right.
    pub(crate) keep_listings: bool,
    /// How long a thread that has answered looks out for the next request before it sleeps.
    pub(crate) lookout: Duration,
    /// Whether CPUs are kept awake while requests come in numbers.
    pub(crate) awake: Awake,
    /// Where they are counted.
    pub(crate) requests: Arc<Requests>,
    /// Which files the kernel reads and writes by itself.
    pub(crate) passthrough: Passthrough,
    /// What old descriptors of lower files show.
    pub(crate) coherence: Coherence,
    /// Whether this process may let the kernel do so.
    pub(crate) may_pass: bool,
    /// Whether somebody can push a layer while the mount lives.
    pub(crate) may_be_pushed: bool,
}
