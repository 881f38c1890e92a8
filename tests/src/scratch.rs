//! A directory for one test, on a disk file system (`/tmp` may be a tmpfs). Drop removes it, together with everything
//! that is still mounted in it.

use std::ops::Deref;
use std::path::{Path, PathBuf};

/// A temporary directory.
#[derive(Debug)]
pub struct Scratch {
    dir: Option<tempfile::TempDir>,
    path: PathBuf,
}

impl Scratch {
    /// Creates one for the calling test. Its name contains only the beginning of the test's name, because sockets and
    /// podman's directories have short limits on paths.
    #[must_use]
    pub fn for_test() -> Scratch {
        Scratch::new(&short_test_name())
    }

    /// Makes one for the calling test in memory, if there is a file system in memory: on a disk, the journal dominates
    /// the time.
    #[must_use]
    pub fn in_memory() -> Scratch {
        let memory = Path::new("/dev/shm");
        match memory.is_dir() {
            true => Scratch::new_in(memory, &short_test_name()),
            false => Scratch::for_test(),
        }
    }

    /// Creates one below `COWL_TEST_DIR`, or below `/var/tmp` if that is not set.
    #[must_use]
    pub fn new(test: &str) -> Scratch {
        let parent = std::env::var_os("COWL_TEST_DIR").unwrap_or_else(|| "/var/tmp".into());
        Scratch::new_in(Path::new(&parent), test)
    }

    /// Makes one in `parent`. The test gets a umask of its own.
    #[must_use]
    pub fn new_in(parent: &Path, test: &str) -> Scratch {
        crate::conditions::own_umask();
        let dir = tempfile::Builder::new()
            .prefix(&format!("cowl-{test}-"))
            .tempdir_in(parent)
            .unwrap_or_else(|error| {
                panic!("cannot create a directory in {}: {error}", parent.display())
            });
        let path = dir
            .path()
            .canonicalize()
            .expect("the canonical path of the directory");
        Scratch {
            dir: Some(dir),
            path,
        }
    }

    /// Creates a directory in it, and returns its path.
    #[must_use]
    pub fn make(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        std::fs::create_dir_all(&path)
            .unwrap_or_else(|error| panic!("cannot create {}: {error}", path.display()));
        path
    }
}

/// Returns the beginning of the calling test's name, without its modules.
fn short_test_name() -> String {
    let test = crate::conditions::test_name();
    let (_, name) = test.rsplit_once("::").unwrap_or(("", &test));
    let start: String = name.chars().take(16).collect();
    start.replace(' ', "-")
}

impl Deref for Scratch {
    type Target = Path;
    fn deref(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for mount in crate::mount::below(&self.path).into_iter().rev() {
            if let Err(error) = crate::mount::detach(&mount) {
                eprintln!("cannot unmount {}: {error}", mount.display());
            }
        }
        let Some(dir) = self.dir.take() else { return };
        if std::env::var_os("COWL_KEEP").is_some() {
            eprintln!("kept {}", dir.keep().display());
        } else if let Err(error) = dir.close() {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}
