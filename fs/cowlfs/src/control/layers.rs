//! Requests that change the stack of layers.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{PushReport, ReplacedLayers, Response, RunningWriters};
use crate::config::Config;
use crate::fuse::PassthroughFiles;
use crate::keeper::Custody;
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::{Layer, Upper, lock};
use cowl_layers::points::point;
use cowl_layers::setup::SetupError;
use cowl_overlay::{Overlay, PushError, PushRequest, ReplaceError, Writers};

fn open(config: &Config, path: &Path) -> Result<Arc<Layer>, SetupError> {
    Layer::open(path, config.space.unwrap_or_else(XattrSpace::detect))
}

fn failed(message: String) -> Response {
    Response::Failed { message }
}

fn too_busy() -> Response {
    failed("requests were running for ten seconds without a pause: try again".into())
}

/// Pushes a new upper layer.
///
/// `invalidate` drops the attributes of a directory that the kernel has cached.
pub(super) fn push(
    (overlay, custody): (&Overlay, Option<&Arc<Custody>>),
    config: &Config,
    (upper, work): (&Path, &Path),
    (writers, passthrough): (Option<RunningWriters>, &PassthroughFiles),
    invalidate: impl Fn(u64) -> io::Result<()>,
) -> Response {
    if !config.snapshots {
        return failed("no layer can be pushed on this mount".into());
    }
    if overlay.layer_paths().0.as_deref() == Some(upper) {
        // A daemon that was killed pushed it and could not answer.
        return Response::Done;
    }
    let opened = open(config, upper)
        .and_then(|layer| Upper::from_layer(config.mount.through(), layer, work));
    let new = match opened {
        Ok(new) => new,
        Err(error) => return failed(error.to_string()),
    };
    if let Some(custody) = custody
        && let Err(error) = custody.keep_upper(&new)
    {
        // If this process is killed from here on, the mount ends.
        log::warn!("cannot hand the layer to the keeper: {error}");
    }
    let pushed = overlay.push_layer(
        new,
        &PushRequest {
            passthrough: &|| passthrough.end_unused(overlay.ledger()),
            writers: match writers {
                None | Some(RunningWriters::Running) => Writers::Running,
                Some(RunningWriters::Stopped { max_bytes }) => Writers::Stopped { max_bytes },
            },
        },
    );
    point("before the end of a push");
    release_unused(overlay, custody);
    match pushed {
        Ok(pushed) => {
            for ino in pushed.stale {
                // Until then, stat(2) can show the previous link count of the directory.
                if let Err(error) = invalidate(ino) {
                    log::warn!("cannot invalidate the attributes of inode {ino}: {error}");
                }
            }
            match writers {
                None => Response::Done,
                Some(_) => Response::Pushed(PushReport {
                    copied: pushed.copied,
                    bytes: pushed.bytes,
                    rounds: pushed.rounds,
                    pause: pushed.pause.as_secs_f64(),
                    waited: pushed.waited.as_secs_f64(),
                    delayed: pushed.delayed.as_secs_f64(),
                    attempts: pushed.attempts,
                    shares_blocks: pushed.shares_blocks,
                }),
            }
        }
        Err(PushError::TooBusy) => too_busy(),
        Err(PushError::Undoing) => failed(
            "an earlier snapshot that failed is still being undone, because a program does not end a write: try again"
                .into(),
        ),
        Err(PushError::Unattended(files)) => match writers {
            None => failed(files.to_string()),
            Some(_) => Response::Unattended {
                message: files.to_string(),
            },
        },
        Err(PushError::Setup(error)) => failed(error.to_string()),
    }
}

/// Replaces the lower layers by others with the same merged tree.
///
/// `invalidate` drops the listing of a directory that the kernel has cached.
pub(super) fn replace(
    (overlay, custody): (&Overlay, Option<&Arc<Custody>>),
    config: &Config,
    lowers: Vec<Vec<u8>>,
    invalidate: impl Fn(u64) -> io::Result<()>,
) -> Response {
    if !config.snapshots {
        return failed("the layers of this mount cannot be replaced".into());
    }
    let path = |bytes| PathBuf::from(OsString::from_vec(bytes));
    let lowers: Vec<PathBuf> = lowers.into_iter().map(path).collect();
    let replaced = overlay.replace_layers(&lowers, |path| {
        let (layer, lock) = open(config, path).and_then(lock::for_reading)?;
        if let Some(custody) = custody
            && let Err(error) = custody.keep_layer(&layer)
        {
            log::warn!("cannot hand the layer to the keeper: {error}");
        }
        Ok((layer, lock))
    });
    point("before the end of a replacement of layers");
    release_unused(overlay, custody);
    let replaced = match replaced {
        Ok(replaced) => replaced,
        Err(ReplaceError::TooBusy) => return too_busy(),
        Err(ReplaceError::OtherStack) => {
            return failed("the layers do not fit those of the mount".into());
        }
        Err(ReplaceError::Different(difference)) => return failed(difference.to_string()),
        Err(ReplaceError::Setup(error)) => return failed(error.to_string()),
    };
    for ino in replaced.stale_listings {
        // Until then, d_ino of entries that no process knew can differ from their st_ino.
        if let Err(error) = invalidate(ino) {
            log::warn!("cannot invalidate the listing of inode {ino}: {error}");
        }
    }
    Response::Replaced(ReplacedLayers {
        moved: replaced.moved,
        retained: replaced.retained,
    })
}

/// Makes the keeper close the layers that are not in use any more.
fn release_unused(overlay: &Overlay, custody: Option<&Arc<Custody>>) {
    if let Some(custody) = custody
        && let Err(error) = custody.keep_only(overlay)
    {
        log::debug!("cannot notify the keeper: {error}");
    }
}
