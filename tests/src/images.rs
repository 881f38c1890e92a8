//! Filesystems of other kinds below a test's folder: in memory, or in a file that is mounted by a
//! loop device. Whoever makes one asks [`crate::conditions`] first whether the machine can.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::command::run;
use crate::conditions::Need;
use crate::scratch::Scratch;

/// A filesystem that can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// ext4 in a file.
    Ext4,
    /// XFS in a file; reflink on, as mkfs has it.
    Xfs,
    /// btrfs in a file.
    Btrfs,
    /// Memory, with extended attributes.
    Tmpfs,
    /// Memory, and no extended attributes at all.
    Ramfs,
}

/// A filesystem that is packed once from a folder and never written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packed {
    /// squashfs: whole seconds only, no ACLs.
    Squashfs,
    /// EROFS.
    Erofs,
}

impl Kind {
    /// What the machine must have for it.
    #[must_use]
    pub fn needs(self) -> Vec<Need> {
        let mut needs = vec![Need::Filesystem(self.name())];
        needs.extend(self.maker().map(|(program, _)| Need::Program(program)));
        needs
    }

    /// The name of the file system type.
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

    /// Makes one and mounts it at `name` in `scratch`.
    #[track_caller]
    #[must_use]
    pub fn mount(self, scratch: &Scratch, name: &str) -> PathBuf {
        let place = scratch.make(name);
        let Some((program, quiet)) = self.maker() else {
            run(
                "mount",
                [OsStr::new("-t"), self.name().as_ref(), "none".as_ref()]
                    .into_iter()
                    .chain([place.as_os_str()]),
            )
            .ok();
            return place;
        };
        let image = scratch.join(format!("{name}.image"));
        // XFS refuses less than 300 MiB; the file is a hole but for what is written.
        let file = std::fs::File::create(&image).expect("an image file");
        file.set_len(320 << 20).expect("the size of an image file");
        run(program, [OsStr::new(quiet), image.as_os_str()]).ok();
        mount_loop(self.name(), "loop", &image, &place);
        place
    }

    /// Mounts the image of an earlier [`Kind::mount`] again, on a new loop device, once the old one is free.
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
    crate::mount::wait_until("the loop device is free", || {
        let used = run("losetup", ["-j".as_ref(), image.as_os_str()]);
        used.ok().stdout.is_empty()
    });
}

/// An ext4 of its own with room for `files` small files, mounted at `name` in `scratch`: what it writes for
/// itself is the same in every run, wherever the machine's own file systems have room left.
#[track_caller]
#[must_use]
pub fn ext4_for(files: u32, scratch: &Scratch, name: &str) -> PathBuf {
    let place = scratch.make(name);
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
    mount_loop("ext4", "loop", &image, &place);
    place
}

impl Packed {
    /// What the machine must have for it.
    #[must_use]
    pub fn needs(self) -> Vec<Need> {
        match self {
            Packed::Squashfs => vec![Need::Filesystem("squashfs"), Need::Program("mksquashfs")],
            Packed::Erofs => vec![Need::Filesystem("erofs"), Need::Program("mkfs.erofs")],
        }
    }

    /// Packs the folder `tree` and mounts the result at `name` in `scratch`.
    #[track_caller]
    #[must_use]
    pub fn mount(self, tree: &Path, scratch: &Scratch, name: &str) -> PathBuf {
        let place = scratch.make(name);
        let image = scratch.join(format!("{name}.image"));
        let (tree, file) = (tree.as_os_str(), image.as_os_str());
        match self {
            Packed::Squashfs => {
                let options = ["-quiet", "-no-progress", "-xattrs"].map(OsStr::new);
                run("mksquashfs", [tree, file].into_iter().chain(options)).ok();
                mount_loop("squashfs", "loop,ro", &image, &place);
            }
            Packed::Erofs => {
                run("mkfs.erofs", [OsStr::new("--quiet"), file, tree]).ok();
                mount_loop("erofs", "loop,ro", &image, &place);
            }
        }
        place
    }
}

#[track_caller]
fn mount_loop(kind: &str, options: &str, image: &Path, place: &Path) {
    let words = ["-t", kind, "-o", options].map(OsStr::new);
    let paths = [image.as_os_str(), place.as_os_str()];
    run("mount", words.into_iter().chain(paths)).ok();
}

/// A second sight of `tree` at `name` in `scratch`, through which nothing can be written.
#[track_caller]
#[must_use]
pub fn read_only_bind(tree: &Path, scratch: &Scratch, name: &str) -> PathBuf {
    let place = scratch.make(name);
    let bind = [OsStr::new("--bind"), tree.as_os_str(), place.as_os_str()];
    run("mount", bind).ok();
    let again = ["-o", "remount,bind,ro"].map(OsStr::new);
    run("mount", again.into_iter().chain([place.as_os_str()])).ok();
    place
}

/// Copies a tree with everything that it has; `preserve` as cp(1) takes it.
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
