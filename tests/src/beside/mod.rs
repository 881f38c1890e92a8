//! Runs the same script in a mount and in a plain directory with the same content, and compares the output.
//!
//! The scripts are written in Python: like the programs in a container, they fork, change users, map files and pass
//! descriptors, which a multithreaded test process cannot do.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{Output, run_command};
use crate::conditions::{Need, can};
use crate::mount::{Overlay, Stack};
use crate::scratch::Scratch;

const PRELUDE: &str = include_str!("prelude.py");

/// Combinations of every operation with every attribute: the functions `plant_all` and `run_all` for attributes,
/// `plant_programs` and `run_programs` for the execution of changed programs.
pub const MATRIX: &str = include_str!("matrix.py");

/// Requirements of every test of this kind.
pub const NEEDS: [Need; 3] = [Need::Root, Need::Fuse, Need::Program("python3")];

/// Layer with the initial content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A lower layer, so that every change causes a copy-up.
    Lower,
    /// The upper layer.
    Upper,
}

/// A mount and a plain directory with the same content.
#[derive(Debug)]
pub struct Beside {
    /// The mount. It is dropped before its directory.
    pub mount: Overlay,
    /// Layers of the mount.
    pub stack: Stack,
    /// The plain directory.
    pub plain: PathBuf,
    /// The directory of all files.
    pub scratch: Scratch,
}

impl Beside {
    /// Creates both, and fills them with the script `build`.
    #[track_caller]
    #[must_use]
    pub fn new(content: Content, build: &str) -> Beside {
        Beside::with(content, build, "")
    }

    /// Creates both with additional mount options, and fills them with the script `build`.
    #[track_caller]
    #[must_use]
    pub fn with(content: Content, build: &str, options: &str) -> Beside {
        let scratch = Scratch::for_test();
        // Other users need to traverse this directory.
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
        // The root of the mount has the attributes of the upper's root.
        copy_mode(&plain, &scratch.join("upper"));
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

    /// Unmounts and mounts again, so that the state comes from the layers only.
    #[track_caller]
    #[must_use]
    pub fn remounted(self) -> Beside {
        let mount_point = self.mount.path().to_owned();
        self.mount.unmount();
        Beside {
            mount: Overlay::cowlfs(&self.stack, &mount_point, "suid,dev"),
            ..self
        }
    }

    /// Runs a script in both, which must succeed and print the same. Returns the output.
    #[track_caller]
    pub fn same(&self, script: &str) -> String {
        let ours = python(self.mount.path(), script);
        let theirs = python(&self.plain, script).ok();
        let (output, expected) = (ours.out(), theirs.out());
        for (line, (one, two)) in output.lines().zip(expected.lines()).enumerate() {
            assert_eq!(
                one,
                two,
                "line {} differs from a plain directory (right); {}",
                line + 1,
                ours.report()
            );
        }
        ours.ok();
        assert_eq!(output, expected, "one of the outputs has more lines");
        output
    }
}

/// Runs `script` on content that `build` creates, in three directories: a mount with the content in a lower layer, a
/// mount with it in the upper layer, and a plain directory. The outputs must be equal.
#[track_caller]
pub fn beside(build: &str, script: &str) {
    for content in [Content::Lower, Content::Upper] {
        over(content, build, script);
    }
}

/// Runs `script` on content that `build` creates, in a mount with the content in a lower layer, and in a plain directory:
/// for tests of copy-ups. The outputs must be equal.
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

/// Runs a script in a directory.
#[track_caller]
#[must_use]
pub fn python(dir: &Path, script: &str) -> Output {
    let mut command = Command::new("python3");
    // The script is passed on standard input, so that a failure's report does not contain it.
    command
        .args(["-X", "utf8", "-"])
        .current_dir(dir)
        .env("PYTHONDONTWRITEBYTECODE", "1");
    run_command(command, format!("{PRELUDE}\n{script}\n").as_bytes())
}

fn copy_mode(from: &Path, path: &Path) {
    let copied =
        std::fs::metadata(from).and_then(|meta| std::fs::set_permissions(path, meta.permissions()));
    copied.unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()));
}

fn open_to_all(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
        .unwrap_or_else(|error| panic!("cannot open {} to all: {error}", path.display()));
}
