//! A store with one container that is not mounted: what is in it is written through the file system in
//! process.
#![allow(dead_code, reason = "not every test needs all of it")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use cowl::delta::digest;
use cowl::store::manifest::{ContainerId, ContainerManifest, LayerId};
use cowl::store::name::ContainerName;
use cowl::store::{Session, Store};

pub(crate) struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// A store with the container web: a file that says "one", and a folder with two more.
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        std::fs::create_dir_all(base.join("etc/deep")).unwrap();
        for (name, text) in [("file", "one"), ("etc/a", "a"), ("etc/deep/b", "b")] {
            std::fs::write(base.join(name), text).unwrap();
        }
        let world = Self { dir };
        world.ok(&["create", "web", "--from", base.to_str().unwrap()]);
        world
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_cowl"))
            .arg("--store")
            .arg(self.path("store"))
            .args(args)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// What it says when it fails with this exit code.
    #[track_caller]
    pub(crate) fn fails(&self, args: &[&str], code: i32) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    pub(crate) fn store(&self) -> Store {
        let session = Session {
            who: "test".to_owned(),
            patience: Duration::from_secs(5),
        };
        Store::open(&self.path("store"), session).unwrap()
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

    /// Writes straight into the head, which is enough for whole files in folders that are there.
    pub(crate) fn write(&self, path: &str, content: &str) {
        let head = self.store().layer_tree(self.manifest("web").1.head);
        let path = head.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    /// What a state holds, as a plain folder.
    pub(crate) fn export(&self, state: &str, to: &str) -> PathBuf {
        let to = self.path(to);
        self.ok(&["export", "--dir", state, to.to_str().unwrap()]);
        to
    }

    pub(crate) fn read(&self, path: &str) -> String {
        let dir = self.export("web", "look");
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

/// The digest of a plain folder.
pub(crate) fn digest_dir(dir: &Path) -> String {
    cowl::delta::digest_dir(dir, &mut |_| ())
        .unwrap()
        .to_string()
}
