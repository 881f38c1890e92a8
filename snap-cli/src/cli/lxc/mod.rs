//! Commands for LXC: `cowl lxc`, `cowl import-lxc-snapshots`, `cowl lxc-template`, and cowl called as `lxc-snapshot`.

pub(super) mod convert;
pub(super) mod import;
pub(super) mod snapshot;
pub(super) mod template;
