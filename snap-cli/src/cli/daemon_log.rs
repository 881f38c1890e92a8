//! Bounds the size of a daemon's log, which may be in memory (`/run`) and which a container's activity can fill.

use std::io::Result;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::FileType;

use crate::container::mount::LOG_LIMIT;

/// Starts a new log if the one that standard error goes to is too long. The old one is renamed to `log.old`.
pub(super) fn bound() -> Result<()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let Ok(_alone) = ONE_AT_A_TIME.try_lock() else {
        return Ok(());
    };
    let stderr = std::io::stderr();
    let stat = rustix::fs::fstat(stderr.as_fd())?;
    let length = u64::try_from(stat.st_size).unwrap_or(0);
    if length <= LOG_LIMIT || FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(());
    }
    let path = std::fs::read_link("/proc/self/fd/2")?;
    let Some(next) = begin_anew(&path)? else {
        return Ok(());
    };
    Ok(rustix::stdio::dup2_stderr(&next)?)
}

/// Moves the log at `path` aside and creates a new one; returns `None` if `path` is not a log of cowl.
fn begin_anew(path: &Path) -> Result<Option<std::fs::File>> {
    if path.file_name() != Some("log".as_ref()) {
        return Ok(None);
    }
    let old: PathBuf = path.with_extension("old");
    std::fs::rename(path, old)?;
    let mut how = std::fs::File::options();
    how.create_new(true).append(true).mode(0o600);
    how.open(path).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_log_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        for text in ["one", "two"] {
            std::fs::write(&log, text).unwrap();
            assert_eq!(
                begin_anew(&log).unwrap().unwrap().metadata().unwrap().len(),
                0
            );
            assert_eq!(
                std::fs::read_to_string(dir.path().join("log.old")).unwrap(),
                text
            );
        }
        assert!(begin_anew(&dir.path().join("other")).unwrap().is_none());
    }
}
