//! What works on this host, for `cowl doctor`: the kernel, the store's file system, the user, and other programs.
//!
//! Nothing is assumed from version numbers where it can be tried. The trial mounts a container in a temporary store.

mod filesystem;
mod kernel;
mod programs;
mod trial;
mod user;

use std::path::{Path, PathBuf};

use crate::error::Result;

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// It works.
    Works,
    /// It is not installed or not configured, and only those need it who use it.
    Absent,
    /// cowl works without it, at a cost.
    Limited,
    /// cowl cannot mount containers without it.
    Broken,
}

impl Verdict {
    /// Returns the name that is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Works => "works",
            Self::Absent => "absent",
            Self::Limited => "limited",
            Self::Broken => "broken",
        }
    }
}

/// The result of a check, with explanations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The name of the check, for programs.
    pub check: &'static str,
    /// The result.
    pub verdict: Verdict,
    /// A description of what was found.
    pub detail: String,
    /// The consequence: a function that does not work or is slower.
    pub cost: Option<String>,
    /// The command to type, or another action.
    pub remedy: Option<String>,
}

impl Finding {
    fn works(check: &'static str, detail: impl Into<String>) -> Self {
        Self {
            check,
            verdict: Verdict::Works,
            detail: detail.into(),
            cost: None,
            remedy: None,
        }
    }

    fn absent(check: &'static str, detail: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Absent,
            ..Self::works(check, detail)
        }
    }

    fn limited(check: &'static str, detail: impl Into<String>, cost: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Limited,
            cost: Some(cost.into()),
            ..Self::works(check, detail)
        }
    }

    fn broken(check: &'static str, detail: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Broken,
            cost: Some("no container can be mounted".to_owned()),
            ..Self::works(check, detail)
        }
    }

    fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

/// Examines this host for a store at `root`, which need not exist. Temporary files are created beside it.
///
/// `entered` is the result of an attempt to enter the namespace of a plain user.
pub fn examine(root: &Path, entered: &Result<()>) -> Vec<Finding> {
    let dir = existing_ancestor(root);
    let mut found = kernel::examine();
    found.extend(filesystem::examine(&dir));
    found.extend(trial::examine(&dir));
    found.extend(user::examine(entered));
    found.extend(programs::examine());
    found
}

/// Returns the path itself, or the closest directory above it that exists.
fn existing_ancestor(path: &Path) -> PathBuf {
    let found = path.ancestors().find(|path| path.is_dir());
    found.unwrap_or_else(|| Path::new("/")).to_path_buf()
}
