//! Verification and repair of a store.
//!
//! A verification checks that the files of the store are readable and consistent, that the objects they reference exist
//! and are unchanged, and that there are no leftovers. It changes nothing, except that it records sizes and digests of
//! layers without any. All repairs are in [`repair`]; none destroys the only copy of anything.

mod layers;
mod leftovers;
mod manifests;
pub mod repair;
mod report;

use crate::container::durability::make_all_durable;
use crate::error::Result;
use crate::store::Store;
use crate::tree::error::OnProgress;
pub use report::{CheckReport, Depth, Finding, Fix, Options, Severity};

/// Verifies a store.
pub fn check(store: &Store, options: &Options, progress: OnProgress<'_>) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    // Without a crash of the machine since, snapshots that a background sync did not reach are complete: sync them now.
    if let Err(error) = make_all_durable(store, options.only.as_ref()) {
        log::warn!("snapshots stay settling: {error}");
    }
    let containers = {
        // Under the exclusive lock: objects that a concurrent command is creating would look like leftovers.
        let _alone = store.lock_exclusive()?;
        let containers = manifests::check(store, options, &mut report)?;
        if options.only.is_none() {
            leftovers::check(store, &containers, &mut report)?;
        }
        containers
    };
    // The layers take long. The shared lock lets other commands run, but no garbage collection.
    let _reading = store.lock_shared()?;
    layers::check(store, options, &containers, &mut report, progress)?;
    report.findings.sort_by_key(|finding| finding.level);
    Ok(report)
}
