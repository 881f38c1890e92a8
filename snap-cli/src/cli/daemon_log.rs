//! A bound on the size of a daemon's log, which may be in memory (`/run`) and which a container's activity can fill.

use std::io::Result;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::FileType;

use crate::container::launch::LOG_LIMIT;

/// Rotates the log that standard error refers to if it is longer than [`LOG_LIMIT`]. The old log is renamed to
/// `log.old`.
pub(super) fn rotate_if_long() -> Result<()> {
    static ROTATING: Mutex<()> = Mutex::new(());
    let Ok(_guard) = ROTATING.try_lock() else {
        return Ok(());
    };
    let stderr = std::io::stderr();
    let stat = rustix::fs::fstat(stderr.as_fd())?;
    let length = u64::try_from(stat.st_size).unwrap_or(0);
    if length <= LOG_LIMIT || FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(());
    }
    let path = std::fs::read_link("/proc/self/fd/2")?;
    let Some(next) = rotate(&path)? else {
        return Ok(());
    };
    Ok(rustix::stdio::dup2_stderr(&next)?)
}

/// Renames the log at `path` and creates a new one; returns `None` if `path` is not a log of cowl.
fn rotate(path: &Path) -> Result<Option<std::fs::File>> {
    if path.file_name() != Some("log".as_ref()) {
        return Ok(None);
    }
    let old: PathBuf = path.with_extension("old");
    std::fs::rename(path, old)?;
    let mut options = std::fs::File::options();
    options.create_new(true).append(true).mode(0o600);
    options.open(path).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_retains_the_last_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        for text in ["one", "two"] {
            std::fs::write(&log, text).unwrap();
            assert_eq!(rotate(&log).unwrap().unwrap().metadata().unwrap().len(), 0);
            assert_eq!(
                std::fs::read_to_string(dir.path().join("log.old")).unwrap(),
                text
            );
        }
        assert!(rotate(&dir.path().join("other")).unwrap().is_none());
    }
}
