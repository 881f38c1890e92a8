//! Stops the programs of a container for the moment of a snapshot.

use super::Container;
use crate::error::Result;
use crate::host::freezer::{FreezerGroup, Stopped};
use crate::lxc::binding;
use crate::lxc::command::LxcState;

/// Stops the programs in the LXC container; they continue when the result is dropped.
///
/// Returns `None` if it is not an LXC container, is not running, or has no control group that can be frozen.
pub(crate) fn stop_programs(container: &Container<'_>) -> Result<Option<Stopped>> {
    let Some(link) = &container.manifest().lxc else {
        return Ok(None);
    };
    let LxcState::Running { pid: Some(pid), .. } = binding::from_link(link).state()? else {
        return Ok(None);
    };
    match FreezerGroup::of_container(pid)? {
        Some(group) => group.stop().map(Some),
        None => Ok(None),
    }
}
