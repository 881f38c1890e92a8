//! A store with one container that is not mounted. Its content is changed through the overlay in process.
#![allow(dead_code, reason = "not every test needs all of it")]

use std::path::{Path, PathBuf};

use cowl::store::Store;
use cowl::store::manifest::{ContainerId, ContainerManifest, LayerId};
use cowl::store::name::ContainerName;
use cowl::tree::digest;
use cowl_layers::layer::Upper;
use cowl_layers::name::Name;
use cowl_overlay::{Caller, OpenOptions, Overlay, OverlayOptions, RenameFlags, Writer};
use cowl_tests::command::{Output, run_command};

use crate::library;

pub(crate) struct World {
    cli: cowl_tests::cowl::Store,
}

impl World {
    /// Creates a store with the container web, which contains a file with "one", and two files in directories.
    pub(crate) fn new() -> Self {
        let cli = cowl_tests::cowl::Store::for_test();
        let base = cli.beside("base");
        std::fs::create_dir_all(base.join("etc/deep")).unwrap();
        for (name, text) in [("file", "one"), ("etc/a", "a"), ("etc/deep/b", "b")] {
            std::fs::write(base.join(name), text).unwrap();
        }
        cli.create("web", &base);
        Self { cli }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.cli.beside(name)
    }

    /// Runs a command in the directory of the test.
    fn run(&self, args: &[&str]) -> Output {
        let mut command = self.cli.command(args);
        command.current_dir(&**self.cli.scratch());
        run_command(command, b"")
    }

    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        self.run(args).ok().out()
    }

    /// Runs a command that must fail with this exit code, and returns its message.
    #[track_caller]
    pub(crate) fn fails(&self, args: &[&str], code: i32) -> String {
        self.run(args).fails(code, &[]).err()
    }

    pub(crate) fn store(&self) -> Store {
        library::open(self.cli.path()).unwrap()
    }

    pub(crate) fn manifest(&self, name: &str) -> (ContainerId, ContainerManifest) {
        let (id, record) = self
            .store()
            .find(&ContainerName::parse(name).unwrap())
            .unwrap();
        (id, record.body)
    }

    pub(crate) fn snapshots(&self) -> Vec<String> {
        let (_, manifest) = self.manifest("web");
        let names = manifest.snapshots.iter();
        names.map(|known| known.name.to_string()).collect()
    }

    /// Writes a file directly into the head.
    pub(crate) fn write(&self, path: &str, content: &str) {
        let head = self.store().paths().layer_tree(self.manifest("web").1.head);
        let path = head.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    /// Exports a state as a plain directory, and returns its path.
    pub(crate) fn export(&self, state: &str, to: &str) -> PathBuf {
        let to = self.path(to);
        self.ok(&["export", "--dir", state, to.to_str().unwrap()]);
        to
    }

    pub(crate) fn read(&self, path: &str) -> String {
        let dir = self.export("web", "read");
        let text = std::fs::read_to_string(dir.join(path)).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
        text
    }

    pub(crate) fn digest(&self, stack: &[LayerId]) -> String {
        let view = self.store().view(stack).unwrap();
        digest(&view, &mut |_| ()).unwrap().to_string()
    }

    pub(crate) fn now(&self) -> String {
        self.digest(&self.manifest("web").1.stack)
    }

    pub(crate) fn at(&self, snapshot: &str) -> String {
        let (id, manifest) = self.manifest("web");
        let known = manifest.snapshots.iter();
        let known = known.clone().find(|s| s.name.as_str() == snapshot).unwrap();
        self.digest(&self.store().snapshot(id, known.id).unwrap().stack)
    }
}

/// Returns the digest of a plain directory.
pub(crate) fn digest_dir(dir: &Path) -> String {
    cowl::tree::digest_dir(dir, &mut |_| ())
        .unwrap()
        .to_string()
}

/// The container's file system in process.
pub(crate) struct Fs(Overlay);

fn caller() -> Caller {
    Caller {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        umask: 0,
        pid: std::process::id(),
    }
}

fn split(path: &str) -> (&[u8], Name) {
    let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
    (parent.as_bytes(), Name::new(name.as_bytes()).unwrap())
}

impl Fs {
    pub(crate) fn remove(&self, path: &str) {
        let (op, (parent, name)) = (self.0.begin(), split(path));
        op.unlink(&op.lookup_path(parent).unwrap(), &name).unwrap();
    }

    pub(crate) fn rmdir(&self, path: &str) {
        let (op, (parent, name)) = (self.0.begin(), split(path));
        op.rmdir(&op.lookup_path(parent).unwrap(), &name).unwrap();
    }

    pub(crate) fn mkdir(&self, path: &str) {
        let (op, (parent, name)) = (self.0.begin(), split(path));
        op.mkdir(caller(), &op.lookup_path(parent).unwrap(), &name, 0o755)
            .unwrap();
    }

    pub(crate) fn rename(&self, from: &str, to: &str) {
        let (op, (old, from), (new, to)) = (self.0.begin(), split(from), split(to));
        let (old, new) = (op.lookup_path(old).unwrap(), op.lookup_path(new).unwrap());
        op.rename(caller(), &old, &from, &new, &to, RenameFlags::default())
            .unwrap();
    }

    /// Creates the file, or replaces its content.
    pub(crate) fn write(&self, path: &str, content: &str) {
        let (op, (parent, name)) = (self.0.begin(), split(path));
        let parent = op.lookup_path(parent).unwrap();
        let options = OpenOptions {
            write: true,
            truncate: true,
            ..OpenOptions::default()
        };
        let handle = match op.lookup(&parent, &name).unwrap() {
            Some(inode) => op.open(caller(), &inode, options).unwrap(),
            None => {
                op.create(caller(), &parent, &name, 0o644, options)
                    .unwrap()
                    .1
            }
        };
        op.write(&handle, 0, content.as_bytes(), Writer::Privileged)
            .unwrap();
        self.0.close(&handle);
    }
}

impl World {
    /// Changes the container through the overlay, as programs in it do.
    pub(crate) fn edit(&self, change: impl FnOnce(&Fs)) {
        let (store, manifest) = (self.store(), self.manifest("web").1);
        let (tree, work) = (
            store.paths().layer_tree(manifest.head),
            store.paths().layer_work(manifest.head),
        );
        let upper = Upper::open(&tree, &work, store.space()).unwrap();
        let lowers = store.open_layers(manifest.below_head()).unwrap();
        change(&Fs(Overlay::new(
            Some(upper),
            lowers,
            OverlayOptions::default(),
        )
        .unwrap()));
    }

    /// Asserts that each layer in the store is referenced.
    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        let (id, manifest) = self.manifest("web");
        let mut used: std::collections::BTreeSet<_> = manifest.stack.iter().copied().collect();
        for known in &manifest.snapshots {
            used.extend(self.store().snapshot(id, known.id).unwrap().stack);
        }
        let there = self.store().layer_ids().unwrap().into_iter().collect();
        assert_eq!(used, there);
    }
}
