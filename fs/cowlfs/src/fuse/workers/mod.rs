//! The threads that answer requests.
//!
//! `pool` decides how many of them wait for a request and parks the others, `monitor` is the thread that adjusts that
//! number, and `busy_poll` is the work of a thread between two requests. `gate` stops all requests for a handover.
//! docs/decisions/0014 has the reasons.

mod busy_poll;
mod gate;
mod monitor;
mod pool;

pub(super) use busy_poll::{BusyPoll, IdleWork, RequestSpan};
pub(crate) use gate::ClosedGate;
pub(super) use gate::Gate;
pub(super) use monitor::start as start_monitor;
pub(super) use pool::WorkerPool;
