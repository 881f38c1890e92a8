//! Destruction of containers.
//!
//! A destroyed container can be undeleted for some days. After that, garbage collection removes its layers, unless
//! another container uses them.

use jiff::Span;

use super::detach::Ending;
use super::external::{self, Leftover};
use super::{Container, Swap, browse, lxc};
use crate::container::mount::AfterUnmount;
use crate::error::{Error, Result};
use crate::store::collect;
use crate::store::deleted;
use crate::store::manifest::ContainerId;
use crate::store::orphans;
use crate::store::ownership;
use crate::store::span;

/// The default number of days during which a destroyed container can be undeleted.
pub const RETENTION_DAYS: i64 = 7;

/// Unmounts a container and removes it and its snapshots; they can be undeleted for [`RETENTION_DAYS`] days.
///
/// Fails if a process uses the container.
pub fn destroy(container: Container<'_>) -> Result<ContainerId> {
    destroy_with_retention(container, &Span::new().days(RETENTION_DAYS))
}

/// Like [`destroy`], with another retention period.
pub fn destroy_with_retention(
    mut container: Container<'_>,
    retention: &Span,
) -> Result<ContainerId> {
    ownership::refuse_owned(container.manifest(), "destroy")?;
    container.unmount(AfterUnmount::StayUnmounted)?;
    browse::close(&container, Ending::Orderly, |_| true)?;
    let (store, id) = (container.store, container.id());
    let left = leave_outside(&mut container)?;
    deleted::delete(store, id, span::until(retention))?;
    orphans::remove_for(store, id);
    left.remove(store, id)?;
    container.into_lock().remove()?;
    collect::collect_or_warn(store);
    Ok(id)
}

/// Unmounts a container and removes it permanently.
///
/// Its disk space is free when this returns, unless another command prevents garbage collection at the moment.
pub fn destroy_now(mut container: Container<'_>) -> Result<ContainerId> {
    ownership::refuse_owned(container.manifest(), "destroy")?;
    container.unmount(AfterUnmount::StayUnmounted)?;
    browse::close(&container, Ending::Orderly, |_| true)?;
    let (store, id) = (container.store, container.id());
    let left = leave_outside(&mut container)?;
    deleted::discard(store, id)?;
    left.remove(store, id)?;
    drop(container);
    collect::collect_or_warn(store);
    Ok(id)
}

/// Records the files outside the store that are removed after the container, and stores LXC's current config in the
/// manifest.
///
/// If the command is interrupted, the next command completes the removal.
fn leave_outside(container: &mut Container<'_>) -> Result<Leftover> {
    let left = Leftover::from_manifest(container.manifest());
    if left.is_none() {
        return Ok(left);
    }
    if let Some(now) = lxc::read_config_copy(container) {
        let mut next = container.manifest().clone();
        if let Some(link) = &mut next.lxc {
            link.written = now;
        }
        container.commit(next, None, |_| Ok(Swap::Done))?;
    }
    external::write_marker(container.store, container.id(), &left)?;
    Ok(left)
}

/// Returns an error if the container has protected snapshots.
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
        "to remove them as well, type: cowl destroy {name} --protected"
    )))
}
