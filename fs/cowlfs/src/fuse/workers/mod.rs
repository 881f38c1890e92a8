//! The threads that answer requests: how many wait for the next one (`crew`), the thread that watches over them
//! (`watch`), and what a thread does between two requests (`turn`). docs/decisions/0014 has the reasons.

mod crew;
mod turn;
mod watch;

pub(super) use crew::Crew;
pub(super) use turn::{Lookout, Turn};
pub(super) use watch::start;
