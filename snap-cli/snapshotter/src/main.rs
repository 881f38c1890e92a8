//! cowl-snapshotter: makes a store of cowl available to containerd as a snapshotter (docs/containerd.md).
//!
//! The modules, from top to bottom; each imports only from those below it:
//!
//! - `cli`: the command line.
//! - `serving`: the socket's connections, and the end of the process.
//! - `service`: the gRPC service. Its messages are in `messages`, the generated code in `server`.
//! - `operations`: the requests that use the store.
//! - `manager`: the index and the store.
//! - `index`: the snapshots by key. `unanswered`: commits that containerd may not have recorded.
//! - `filter`, `listener`, `logging`: filters of lists, the socket, the log.
//! - `error`: errors and status codes.

mod cli;
mod error;
mod filter;
mod index;
mod listener;
mod logging;
mod manager;
mod messages;
mod operations;
mod server;
mod service;
mod serving;
mod unanswered;

fn main() -> std::process::ExitCode {
    cli::main()
}
