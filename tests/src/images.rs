//! File systems of various types for tests: in memory, or in an image file on a loop device. The caller first checks
//! with [`crate::conditions`] whether the machine supports the type.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::command::run;
use crate::conditions::Need;
use crate::scratch::Scratch;

/// A writable file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// ext4 in an image file.
    Ext4,
    /// XFS in an image file, with reflinks, the default of mkfs.
    Xfs,
    /// btrfs in an image file.
    Btrfs,
    /// tmpfs, with xattrs.
    Tmpfs,
    /// ramfs, without xattrs.
    Ramfs,
}

/// A read-only file system that is created from a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packed {
    /// squashfs: times in whole seconds, no ACLs.
    Squashfs,
    /// EROFS.
    Erofs,
}

impl Kind {
    /// Returns the requirements on the machine.
    #[must_use]
    pub fn needs(self) -> Vec<Need> {
        let mut needs = vec![Need::Filesystem(self.name())];
        needs.extend(self.maker().map(|(program, _)| Need::Program(program)));
        needs
    }

    /// Returns the name of the file system type.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Ext4 => "ext4",
            Kind::Xfs => "xfs",
            Kind::Btrfs => "btrfs",
            Kind::Tmpfs => "tmpfs",
            Kind::Ramfs => "ramfs",
        }
    }

    fn maker(self) -> Option<(&'static str, &'static str)> {
        match self {
            Kind::Ext4 => Some(("mkfs.ext4", "-qF")),
            Kind::Xfs => Some(("mkfs.xfs", "-q")),
            Kind::Btrfs => Some(("mkfs.btrfs", "-q")),
            Kind::Tmpfs | Kind::Ramfs => None,
        }
    }

    /// Creates a file system and mounts it at `name` in `scratch`.
    #[track_caller]
    #[must_use]
    pub fn mount(self, scratch: &Scratch, name: &str) -> PathBuf {
        // XFS requires 300 MiB.
        self.mount_with_size(scratch, name, 320 << 20)
    }

    /// Like [`Kind::mount`], with the size of the image in bytes.
    #[track_caller]
    #[must_use]
    pub fn mount_with_size(self, scratch: &Scratch, name: &str, size: u64) -> PathBuf {
        let mount_point = scratch.make(name);
        let Some((program, quiet)) = self.maker() else {
            run(
                "mount",
                [OsStr::new("-t"), self.name().as_ref(), "none".as_ref()]
                    .into_iter()
                    .chain([mount_point.as_os_str()]),
            )
            .ok();
            return mount_point;
        };
        let image = scratch.join(format!("{name}.image"));
        // The image is sparse.
        let file = std::fs::File::create(&image).expect("an image file");
        file.set_len(size).expect("the size of an image file");
        run(program, [OsStr::new(quiet), image.as_os_str()]).ok();
        mount_loop(self.name(), "loop", &image, &mount_point);
        mount_point
    }

    /// Mounts the image of an earlier [`Kind::mount`] again, on a new loop device, after the old one was released.
    #[track_caller]
    pub fn mount_again(self, scratch: &Scratch, name: &str) {
        let image = scratch.join(format!("{name}.image"));
        wait_detached(&image);
        mount_loop(self.name(), "loop", &image, &scratch.join(name));
    }
}

/// Waits until no loop device uses `image`: another mount namespace may hold its file system for a moment.
#[track_caller]
pub fn wait_detached(image: &Path) {
    crate::mount::wait_until("the loop device to be released", || {
        let used = run("losetup", ["-j".as_ref(), image.as_os_str()]);
        used.ok().stdout.is_empty()
    });
}

/// Creates an ext4 with space for `files` small files, and mounts it at `name` in `scratch`. Unlike the machine's own
/// file systems, it writes the same amount of its own metadata in every run.
#[track_caller]
#[must_use]
pub fn ext4_for(files: u32, scratch: &Scratch, name: &str) -> PathBuf {
    let mount_point = scratch.make(name);
    let image = scratch.join(format!("{name}.image"));
    let file = std::fs::File::create(&image).expect("an image file");
    file.set_len(u64::from(files) * (16 << 10))
        .expect("the size of an image file");
    let inodes = (files * 2).to_string();
    run(
        "mkfs.ext4",
        [
            "-qF".as_ref(),
            "-N".as_ref(),
            inodes.as_ref(),
            image.as_os_str(),
        ],
    )
    .ok();
    mount_loop("ext4", "loop", &image, &mount_point);
    mount_point
}

impl Packed {
    /// Returns the requirements on the machine.
    #[must_use]
    pub fn needs(self) -> Vec<Need> {
        match self {
            Packed::Squashfs => vec![Need::Filesystem("squashfs"), Need::Program("mksquashfs")],
            Packed::Erofs => vec![Need::Filesystem("erofs"), Need::Program("mkfs.erofs")],
        }
    }

    /// Packs the directory `tree`, and mounts the result at `name` in `scratch`.
    #[track_caller]
    #[must_use]
    pub fn mount(self, tree: &Path, scratch: &Scratch, name: &str) -> PathBuf {
        let mount_point = scratch.make(name);
        let image = scratch.join(format!("{name}.image"));
        let (tree, file) = (tree.as_os_str(), image.as_os_str());
        match self {
            Packed::Squashfs => {
                let options = ["-quiet", "-no-progress", "-xattrs"].map(OsStr::new);
                run("mksquashfs", [tree, file].into_iter().chain(options)).ok();
                mount_loop("squashfs", "loop,ro", &image, &mount_point);
            }
            Packed::Erofs => {
                run("mkfs.erofs", [OsStr::new("--quiet"), file, tree]).ok();
                mount_loop("erofs", "loop,ro", &image, &mount_point);
            }
        }
        mount_point
    }
}

#[track_caller]
fn mount_loop(kind: &str, options: &str, image: &Path, mount_point: &Path) {
    let words = ["-t", kind, "-o", options].map(OsStr::new);
    let paths = [image.as_os_str(), mount_point.as_os_str()];
    run("mount", words.into_iter().chain(paths)).ok();
}

/// Creates a read-only bind mount of `tree` at `name` in `scratch`.
#[track_caller]
#[must_use]
pub fn read_only_bind(tree: &Path, scratch: &Scratch, name: &str) -> PathBuf {
    let mount_point = scratch.make(name);
    let bind = [
        OsStr::new("--bind"),
        tree.as_os_str(),
        mount_point.as_os_str(),
    ];
    run("mount", bind).ok();
    let again = ["-o", "remount,bind,ro"].map(OsStr::new);
    run("mount", again.into_iter().chain([mount_point.as_os_str()])).ok();
    mount_point
}

/// Copies a tree; `preserve` is the argument of cp's option.
#[track_caller]
pub fn copy(from: &Path, to: &Path, preserve: &str) {
    let words = ["-dRT".to_owned(), format!("--preserve={preserve}")];
    let paths = [from, to].map(|path| path.as_os_str().to_owned());
    run(
        "cp",
        words.into_iter().map(std::ffi::OsString::from).chain(paths),
    )
    .ok();
}
