//! Verification of a store: what its files say, whether what they name is there and unchanged, and which leftovers
//! there are. And repair of what can be repaired, without ever destroying the only copy of anything.
//!
//! A verification changes nothing but the recorded sizes and digests of layers that had none; all repair is in
//! [`repair`].

mod layers;
mod leftovers;
mod manifests;
pub mod repair;
mod report;

use crate::container::durability::make_all_durable;
use crate::error::Result;
use crate::store::Store;
use crate::tree::error::OnProgress;
pub use report::{Depth, Finding, Fix, Level, Options, Report};

/// Verifies a store.
pub fn check(store: &Store, options: &Options, progress: OnProgress<'_>) -> Result<Report> {
    let mut report = Report::default();
    // What a background sync did not come to is whole as long as the machine has not gone down.
    if let Err(error) = make_all_durable(store, options.only.as_ref()) {
        log::warn!("snapshots stay settling: {error}");
    }
    let known = {
        // What a command is just making looks like something left over.
        let _alone = store.lock_exclusive()?;
        let known = manifests::look(store, options, &mut report)?;
        if options.only.is_none() {
            leftovers::look(store, &known, &mut report)?;
        }
        known
    };
    // The rest takes its time: others may go on, and nothing is collected meanwhile.
    let _reading = store.lock_shared()?;
    layers::look(store, options, &known, &mut report, progress)?;
    report.findings.sort_by_key(|finding| finding.level);
    Ok(report)
}
