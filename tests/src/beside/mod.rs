//! The same script in a mount and in a plain folder with the same content: both must say the same.
//!
//! The scripts are Python: they fork, become other users, map files and give descriptors to each
//! other as the programs do that a container runs, which a test process with threads can't.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{Output, run_command};
use crate::conditions::{Need, can};
use crate::mount::{Overlay, Stack};
use crate::scratch::Scratch;

const PRELUDE: &str = include_str!("prelude.py");

/// Every operation beside every attribute: the functions `plant_all` and `run_all` for the attributes,
/// `plant_programs` and `run_programs` for what programs may do afterwards.
pub const MATRIX: &str = include_str!("matrix.py");

/// What every such test needs.
pub const NEEDS: [Need; 3] = [Need::Root, Need::Fuse, Need::Program("python3")];

/// Where the content lies that a script finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// In a layer that is only read, so that every change copies up.
    Lower,
    /// In the layer that is written.
    Upper,
}

/// A mount beside a plain folder with the same content.
#[derive(Debug)]
pub struct Beside {
    /// The mount. It goes before the folder that it lies in.
    pub mount: Overlay,
    /// The mount's layers.
    pub stack: Stack,
    /// The plain folder.
    pub plain: PathBuf,
    /// Where everything lies.
    pub scratch: Scratch,
}

impl Beside {
    /// Makes both; the script `build` fills them.
    #[track_caller]
    #[must_use]
    pub fn new(content: Content, build: &str) -> Beside {
        Beside::with(content, build, "")
    }

    /// Like [`Beside::new`], with more options for the mount.
    #[track_caller]
    #[must_use]
    pub fn with(content: Content, build: &str, options: &str) -> Beside {
        let scratch = Scratch::for_test();
        // Other users go through it.
        open_to_all(&scratch);
        let plain = scratch.make("plain");
        let stack = Stack {
            lowers: vec![scratch.make("lower")],
            upper: Some((scratch.make("upper"), scratch.make("work"))),
        };
        python(&plain, build).ok();
        if content == Content::Lower {
            python(&scratch.join("lower"), build).ok();
        }
        // The mount's own folder is the upper's.
        open_as(&plain, &scratch.join("upper"));
        let options = ["suid,dev", options].join(",");
        let options = options.trim_end_matches(',');
        let mount = Overlay::cowlfs(&stack, &scratch.make("mount"), options);
        if content == Content::Upper {
            python(mount.path(), build).ok();
        }
        Beside {
            mount,
            stack,
            plain,
            scratch,
        }
    }

    /// Unmounts and mounts anew: what is seen then comes from the layers alone.
    #[track_caller]
    #[must_use]
    pub fn remounted(self) -> Beside {
        let place = self.mount.path().to_owned();
        self.mount.unmount();
        Beside {
            mount: Overlay::cowlfs(&self.stack, &place, "suid,dev"),
            ..self
        }
    }

    /// Runs a script in both; it must succeed and say the same. Returns what it said.
    #[track_caller]
    pub fn same(&self, script: &str) -> String {
        let ours = python(self.mount.path(), script);
        let theirs = python(&self.plain, script).ok();
        let (said, wanted) = (ours.out(), theirs.out());
        for (line, (one, two)) in said.lines().zip(wanted.lines()).enumerate() {
            assert_eq!(
                one,
                two,
                "line {} differs from a plain folder (right); {}",
                line + 1,
                ours.report()
            );
        }
        ours.ok();
        assert_eq!(said, wanted, "one of the two says more");
        said
    }
}

/// Runs `script` over the content that `build` makes, in a mount where it lies in a lower layer, in one
/// where it lies in the upper, and in a plain folder: all must say the same.
#[track_caller]
pub fn beside(build: &str, script: &str) {
    for content in [Content::Lower, Content::Upper] {
        over(content, build, script);
    }
}

/// The same with the content in a lower layer alone: for what is about copying up.
#[track_caller]
pub fn beside_lower(build: &str, script: &str) {
    over(Content::Lower, build, script);
}

#[track_caller]
fn over(content: Content, build: &str, script: &str) {
    if !can(&NEEDS) {
        return;
    }
    eprintln!("content in the {content:?} layer");
    let beside = Beside::new(content, build);
    beside.same(script);
    beside.mount.unmount();
}

/// Runs a script in a folder.
#[track_caller]
#[must_use]
pub fn python(dir: &Path, script: &str) -> Output {
    let mut command = Command::new("python3");
    // From its standard input, so that a failure's message does not repeat the whole of it.
    command
        .args(["-X", "utf8", "-"])
        .current_dir(dir)
        .env("PYTHONDONTWRITEBYTECODE", "1");
    run_command(command, format!("{PRELUDE}\n{script}\n").as_bytes())
}

fn open_as(from: &Path, path: &Path) {
    let copied =
        std::fs::metadata(from).and_then(|meta| std::fs::set_permissions(path, meta.permissions()));
    copied.unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()));
}

fn open_to_all(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
        .unwrap_or_else(|error| panic!("cannot open {} to all: {error}", path.display()));
}
