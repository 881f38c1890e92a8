//! Destroying containers. For a while they can be brought back; then their layers go with them, unless
//! another container stands on them.

use jiff::Span;

use super::external::{self, Leftover};
use super::{Container, Swap, browse, lxc};
use crate::error::{Error, Result};
use crate::store::collect;
use crate::store::deleted;
use crate::store::manifest::ContainerId;
use crate::store::orphans;
use crate::store::span;

/// How many days a destroyed container can be brought back when nobody says otherwise.
pub const KEPT_DAYS: i64 = 7;

/// Refuses if somebody uses the container; else unmounts it and takes it out of the store, with its
/// snapshots, to be kept for the usual time.
pub fn destroy(container: Container<'_>) -> Result<ContainerId> {
    destroy_keeping(container, &Span::new().days(KEPT_DAYS))
}

/// The same, to be kept for a span of time.
pub fn destroy_keeping(mut container: Container<'_>, keep: &Span) -> Result<ContainerId> {
    container.unmount(false)?;
    browse::close(&container, |_| true)?;
    let (store, id) = (container.store, container.id());
    let left = leave_outside(&mut container)?;
    deleted::delete(store, id, span::until(keep))?;
    orphans::remove_of(store, id);
    left.remove(store, id)?;
    container.into_lock().remove()?;
    collect::collect_after(store);
    Ok(id)
}

/// The same for good: what it took on the disk is free when this returns, unless another command is at
/// work.
pub fn destroy_now(mut container: Container<'_>) -> Result<ContainerId> {
    container.unmount(false)?;
    browse::close(&container, |_| true)?;
    let (store, id) = (container.store, container.id());
    let left = leave_outside(&mut container)?;
    deleted::discard(store, id)?;
    left.remove(store, id)?;
    drop(container);
    collect::collect_after(store);
    Ok(id)
}

/// Prepares what is to be removed outside the store once the container is gone: whoever comes next
/// finishes that. LXC's config as it is now goes with the container.
fn leave_outside(container: &mut Container<'_>) -> Result<Leftover> {
    let left = Leftover::of(container.manifest());
    if left.is_none() {
        return Ok(left);
    }
    if let Some(now) = lxc::config_copy(container) {
        let mut next = container.manifest().clone();
        if let Some(link) = &mut next.lxc {
            link.written = now;
        }
        container.commit(next, None, |_| Ok(Swap::Done))?;
    }
    external::mark(container.store, container.id(), &left)?;
    Ok(left)
}

/// Refuses while it has protected snapshots.
pub fn refuse_protected(container: &Container<'_>) -> Result<()> {
    let protected: Vec<_> = container
        .manifest()
        .snapshots
        .iter()
        .filter(|snapshot| snapshot.protected)
        .map(|snapshot| snapshot.name.as_str())
        .collect();
    if protected.is_empty() {
        return Ok(());
    }
    let name = container.name();
    Err(Error::failed(format!(
        "{name} is not removed: {} protected",
        match protected.as_slice() {
            [one] => format!("its snapshot {one} is"),
            many => format!("its snapshots {} are", many.join(", ")),
        }
    ))
    .hint(format!(
        "if they are to go as well, type: cowl destroy {name} --protected"
    )))
}
