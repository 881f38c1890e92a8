//! Runs `cowl` as a user does, on a store of the test.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::command::{Output, run_command, show};
use crate::killer::{daemon_of, kill_both};
use crate::scratch::Scratch;

/// A store for one test, in a directory that the test may use for other files.
#[derive(Debug)]
pub struct Store {
    scratch: Scratch,
    path: PathBuf,
    /// Whether the mounts get a keeper.
    keeper: bool,
    /// Whether containers are mounted with kernel overlayfs.
    kernel: bool,
    /// Whether files of the upper layer use passthrough.
    passthrough: bool,
}

impl Store {
    /// Returns a store that does not exist yet. The first command creates it.
    #[must_use]
    pub fn for_test() -> Store {
        Store::in_scratch(Scratch::for_test())
    }

    /// Returns a store in an existing directory, which the first command creates.
    #[must_use]
    pub fn in_scratch(scratch: Scratch) -> Store {
        let path = scratch.join("store");
        Store {
            scratch,
            path,
            keeper: false,
            kernel: false,
            passthrough: false,
        }
    }

    /// Returns a store on a file system that `make` mounts at a name in the test's directory.
    #[must_use]
    pub fn on(make: impl FnOnce(&Scratch, &str) -> PathBuf) -> Store {
        let scratch = Scratch::for_test();
        let path = make(&scratch, "own").join("store");
        Store {
            scratch,
            path,
            keeper: false,
            kernel: false,
            passthrough: false,
        }
    }

    /// Gives the mounts of the container a keeper each.
    #[must_use]
    pub fn with_keepers(mut self) -> Store {
        self.keeper = true;
        self
    }

    /// Mounts containers with kernel overlayfs by default.
    #[must_use]
    pub fn with_kernel_driver(mut self) -> Store {
        self.kernel = true;
        self
    }

    /// Mounts containers with passthrough for all files.
    #[must_use]
    pub fn with_passthrough(mut self) -> Store {
        self.passthrough = true;
        self
    }

    /// Returns the path of the store.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the directory that contains the store, for other files of the test.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Returns the directories, one per container, in which root's mounts of this store keep their run-time files.
    ///
    /// The path follows docs/format.md: uuid, device and inode of the store.
    #[must_use]
    pub fn run_dirs(&self) -> Vec<PathBuf> {
        let Some(dir) = run_dir_of(&self.path) else {
            return Vec::new();
        };
        let entries = std::fs::read_dir(dir).into_iter().flatten();
        let paths = entries.map(|entry| entry.expect("an entry").path());
        // The directory also contains a symlink to the store.
        paths.filter(|path| !path.is_symlink()).collect()
    }

    /// Runs `cowl --store STORE ARGS`.
    #[track_caller]
    pub fn cowl<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        self.cowl_with(args, b"")
    }

    /// Runs `cowl --store STORE ARGS` with `input` as standard input.
    #[track_caller]
    pub fn cowl_with<S: AsRef<OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
        input: &[u8],
    ) -> Output {
        run_command(self.command(args), input)
    }

    /// Runs a command that must succeed. Returns its standard output as it is.
    #[track_caller]
    pub fn ok<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        show(&self.cowl(args).ok().stdout)
    }

    /// Runs a command that must fail with this exit code and print nothing but a message with these words.
    #[track_caller]
    pub fn refused<S: AsRef<OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
        code: i32,
        words: &[&str],
    ) {
        let output = self.cowl(args).fails(code, words);
        assert!(output.stdout.is_empty(), "{}", output.report());
    }

    /// Returns the command line, which may be changed before it runs. Local time is UTC.
    #[must_use]
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(crate::programs::cowl());
        command
            .arg("--store")
            .arg(&self.path)
            .args(args)
            .env("TZ", "UTC")
            // A registry that fails must not hold a test for a minute.
            .env("COWL_RETRY_WAIT", "10")
            .envs(self.settings())
            .stdin(Stdio::null());
        command
    }

    /// Returns the environment of the commands, and of programs that start some.
    pub fn settings(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let keeper = self.keeper.then_some(("COWL_KEEPER", "on"));
        let driver = self.kernel.then_some(("COWL_DRIVER", "kernel"));
        let passthrough = self.passthrough.then_some(("COWL_PASSTHROUGH", "all"));
        keeper.into_iter().chain(driver).chain(passthrough)
    }

    /// Returns the path of another file of the test, beside the store.
    #[must_use]
    pub fn beside(&self, name: impl AsRef<Path>) -> PathBuf {
        self.scratch.join(name)
    }

    /// Creates a container from a directory or a tar.
    #[track_caller]
    pub fn create(&self, name: &str, from: &Path) {
        let args: [&OsStr; 4] = [
            "create".as_ref(),
            name.as_ref(),
            "--from".as_ref(),
            from.as_ref(),
        ];
        self.cowl(args).ok();
    }

    /// Mounts a container if necessary, and returns the mount point.
    #[track_caller]
    #[must_use]
    pub fn mount(&self, name: &str) -> PathBuf {
        let mount_point = PathBuf::from(self.cowl(["mount", name]).ok().out());
        assert!(
            crate::mount::at(&mount_point).is_some(),
            "{} is not a mount point",
            mount_point.display()
        );
        mount_point
    }

    /// Runs a shell line in a container, which must succeed.
    #[track_caller]
    pub fn exec(&self, name: &str, line: &str) -> Output {
        let mut command = self.command(["exec", name, "--", "sh", "-euc", line]);
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C.UTF-8");
        run_command(command, b"").ok()
    }

    /// Restores a snapshot, which must succeed.
    #[track_caller]
    pub fn restore(&self, name: &str, snapshot: &str) -> Output {
        self.cowl(["restore", name, snapshot]).ok()
    }

    /// Returns the process id in the state of a container: that of its keeper, or of its daemon if it has none.
    #[track_caller]
    #[must_use]
    pub fn pid(&self, name: &str) -> u32 {
        let status = self.cowl(["status", name, "--json"]).ok();
        let json = status.json();
        find(&json, "pid")
            .and_then(Value::as_u64)
            .and_then(|pid| u32::try_from(pid).ok())
            .unwrap_or_else(|| panic!("no pid: {}", status.report()))
    }

    /// Returns the process id of the process that serves a container, which differs from [`Self::pid`] if it has a
    /// keeper.
    #[track_caller]
    #[must_use]
    pub fn daemon(&self, name: &str) -> u32 {
        let pid = self.pid(name);
        daemon_of(pid).unwrap_or(pid)
    }

    /// Kills the processes that serve a container, so that its mount is dead.
    #[track_caller]
    pub fn kill_daemon(&self, name: &str) {
        kill_both(self.pid(name));
    }

    /// Returns the names of a container's snapshots, oldest first, from `list --json`.
    #[track_caller]
    #[must_use]
    pub fn snapshots(&self, name: &str) -> Vec<String> {
        let output = self.cowl(["list", name, "--json"]).ok();
        let mut json = output.json();
        let list = match find(&json, "snapshots") {
            Some(list) => list.clone(),
            None => json.take(),
        };
        let Value::Array(list) = list else {
            panic!("no list: {}", output.report())
        };
        list.iter()
            .map(|snapshot| {
                snapshot["name"]
                    .as_str()
                    .expect("a snapshot's name")
                    .to_owned()
            })
            .collect()
    }

    /// Returns the disk usage of the store in bytes, without mounts; each inode counts once.
    #[must_use]
    pub fn disk_usage(&self) -> u64 {
        let args = [OsString::from("-skx"), self.path.clone().into_os_string()];
        let output = crate::command::run("du", args).ok().out();
        let kilobytes: Option<u64> = output
            .split_whitespace()
            .next()
            .and_then(|n| n.parse().ok());
        1024 * kilobytes.unwrap_or_else(|| panic!("unexpected output of du: {output:?}"))
    }
}

impl Drop for Store {
    /// Removes the run-time files, which otherwise remain until the next boot.
    fn drop(&mut self) {
        if let Some(dir) = run_dir_of(&self.path)
            && let Err(error) = std::fs::remove_dir_all(&dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            eprintln!("cannot remove {}: {error}", dir.display());
        }
    }
}

/// Returns the directory for run-time files of root's mounts of the store at `path`, if the store exists.
#[must_use]
pub fn run_dir_of(path: &Path) -> Option<PathBuf> {
    let meta = std::fs::metadata(path).ok()?;
    let text = std::fs::read(path.join("store.json")).ok()?;
    let json: Value = serde_json::from_slice(&text).ok()?;
    let (uuid, dev, ino) = (find(&json, "uuid")?.as_str()?, meta.dev(), meta.ino());
    Some(PathBuf::from(format!("/run/cowl/{uuid}-{dev:x}-{ino:x}")))
}

/// Returns the first value with the given key, at any depth.
#[must_use]
pub fn find<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Object(map) => map
            .get(key)
            .or_else(|| map.values().find_map(|inner| find(inner, key))),
        Value::Array(list) => list.iter().find_map(|inner| find(inner, key)),
        _ => None,
    }
}
