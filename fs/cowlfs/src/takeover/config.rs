//! The configuration of a mount, for another process.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use cowl_layers::format::XattrSpace;
use cowl_layers::sys::mount::MountOptions;
use cowl_overlay::OverlayOptions;
use serde::{Deserialize, Serialize};

use crate::config::{
    Awake, Coherence, Config, ControlSocket, Keeper, LiveLayers, MountPath, Mounter, Passthrough,
    Supervision,
};

/// A [`Config`]. Paths are byte strings, because serde encodes a path as UTF-8.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConfigRecord {
    lowers: Vec<OsString>,
    data_only: Vec<OsString>,
    upper: Option<(OsString, OsString)>,
    mountpoint: OsString,
    mounter: Mounter,
    mount: MountOptions,
    overlay: OverlayOptions,
    space: Option<XattrSpace>,
    foreign: bool,
    threads: Option<usize>,
    cache_timeout: Duration,
    busy_poll: Duration,
    awake: Awake,
    passthrough: Passthrough,
    coherence: Coherence,
    live_layers: LiveLayers,
    control: Option<OsString>,
    control_socket: ControlSocket,
    snapshots: bool,
    reach: Vec<OsString>,
    keeper: Keeper,
}

impl ConfigRecord {
    /// Records a configuration.
    pub(crate) fn new(config: &Config) -> Self {
        let Config {
            lowers,
            data_only,
            upper,
            mountpoint,
            path: _,
            mounter,
            mount,
            overlay,
            space,
            foreign,
            threads,
            cache_timeout,
            busy_poll,
            awake,
            passthrough,
            coherence,
            live_layers,
            control,
            control_socket,
            snapshots,
            reach,
            keeper,
            // Another process is started, and this one does not know whether that is watched.
            supervision: _,
            // The successor has its own.
            settle: _,
            successor: _,
        } = config.clone();
        let all = |paths: Vec<PathBuf>| paths.into_iter().map(PathBuf::into_os_string).collect();
        Self {
            lowers: all(lowers),
            data_only: all(data_only),
            upper: upper.map(|(upper, work)| (upper.into_os_string(), work.into_os_string())),
            mountpoint: mountpoint.into_os_string(),
            mounter,
            mount,
            overlay,
            space,
            foreign,
            threads,
            cache_timeout,
            busy_poll,
            awake,
            passthrough,
            coherence,
            live_layers,
            control: control.map(PathBuf::into_os_string),
            control_socket,
            snapshots,
            reach: all(reach),
            keeper,
        }
    }

    /// Returns the configuration, without a thread that syncs layers and without a successor.
    pub(crate) fn into_config(self) -> Config {
        let all = |paths: Vec<OsString>| paths.into_iter().map(PathBuf::from).collect();
        Config {
            lowers: all(self.lowers),
            data_only: all(self.data_only),
            upper: self.upper.map(|(upper, work)| (upper.into(), work.into())),
            mountpoint: self.mountpoint.into(),
            // It is mounted already.
            path: MountPath::Exact,
            mounter: self.mounter,
            mount: self.mount,
            overlay: self.overlay,
            space: self.space,
            foreign: self.foreign,
            threads: self.threads,
            cache_timeout: self.cache_timeout,
            busy_poll: self.busy_poll,
            awake: self.awake,
            passthrough: self.passthrough,
            coherence: self.coherence,
            live_layers: self.live_layers,
            control: self.control.map(PathBuf::from),
            control_socket: self.control_socket,
            snapshots: self.snapshots,
            reach: all(self.reach),
            keeper: self.keeper,
            supervision: Supervision::Off,
            settle: None,
            successor: None,
        }
    }
}
