//! The snapshot manager as a user calls it, on a store of its own.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::command::{Output, run_command, show};
use crate::scratch::Scratch;

/// A store for one test, and whatever else the test puts beside it.
#[derive(Debug)]
pub struct Store {
    scratch: Scratch,
    path: PathBuf,
}

impl Store {
    /// A store that does not exist yet: the first command makes it.
    #[must_use]
    pub fn for_test() -> Store {
        Store::in_scratch(Scratch::for_test())
    }

    /// The same, in a folder that there is.
    #[must_use]
    pub fn in_scratch(scratch: Scratch) -> Store {
        let path = scratch.join("store");
        Store { scratch, path }
    }

    /// The same on a file system that `make` mounts at a name in the test's folder.
    #[must_use]
    pub fn on(make: impl FnOnce(&Scratch, &str) -> PathBuf) -> Store {
        let scratch = Scratch::for_test();
        let path = make(&scratch, "own").join("store");
        Store { scratch, path }
    }

    /// Where the store is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder that the store is in, for a test's other files.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// The directories, one per container, in which root's mounts of this store keep their run-time files.
    ///
    /// Found by the rule that docs/format.md gives: uuid, device and inode of the store.
    #[must_use]
    pub fn run_dirs(&self) -> Vec<PathBuf> {
        let Some(dir) = run_dir_of(&self.path) else {
            return Vec::new();
        };
        let entries = std::fs::read_dir(dir).into_iter().flatten();
        let paths = entries.map(|entry| entry.expect("an entry").path());
        // Beside them there is a link to the store.
        paths.filter(|path| !path.is_symlink()).collect()
    }

    /// Runs `cowl --store STORE ARGS`.
    #[track_caller]
    pub fn cowl<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        self.cowl_with(args, b"")
    }

    /// The same with something on standard input.
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
            .stdin(Stdio::null());
        command
    }

    /// Returns the path of another file of the test, beside the store.
    #[must_use]
    pub fn beside(&self, name: impl AsRef<Path>) -> PathBuf {
        self.scratch.join(name)
    }

    /// Makes a container from a folder or a tar.
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

    /// Mounts a container (or finds it mounted) and gives the place.
    #[track_caller]
    #[must_use]
    pub fn mount(&self, name: &str) -> PathBuf {
        let place = PathBuf::from(self.cowl(["mount", name]).ok().out());
        assert!(
            crate::mount::at(&place).is_some(),
            "{} is no mount point",
            place.display()
        );
        place
    }

    /// Runs a shell line in a container; it must succeed.
    #[track_caller]
    pub fn exec(&self, name: &str, line: &str) -> Output {
        let mut command = self.command(["exec", name, "--", "sh", "-euc", line]);
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C.UTF-8");
        run_command(command, b"").ok()
    }

    /// Restores, so that it can't be mistyped.
    #[track_caller]
    pub fn restore(&self, name: &str, snapshot: &str) -> Output {
        self.cowl(["restore", name, snapshot]).ok()
    }

    /// The process id of the daemon that serves a container.
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

    /// The names of a container's snapshots, oldest first, by `list --json`.
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

    /// Bytes on disk below the store, mounts left out; each inode counts once.
    #[must_use]
    pub fn disk_usage(&self) -> u64 {
        let args = [OsString::from("-skx"), self.path.clone().into_os_string()];
        let said = crate::command::run("du", args).ok().out();
        let kilobytes: Option<u64> = said.split_whitespace().next().and_then(|n| n.parse().ok());
        1024 * kilobytes.unwrap_or_else(|| panic!("du said {said:?}"))
    }
}

impl Drop for Store {
    /// Nothing else removes them before the machine is restarted.
    fn drop(&mut self) {
        if let Some(dir) = run_dir_of(&self.path)
            && let Err(error) = std::fs::remove_dir_all(&dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            eprintln!("cannot remove {}: {error}", dir.display());
        }
    }
}

/// Where root's mounts of the store at `path` have their run-time files; nothing where there is no store.
#[must_use]
pub fn run_dir_of(path: &Path) -> Option<PathBuf> {
    let meta = std::fs::metadata(path).ok()?;
    let text = std::fs::read(path.join("store.json")).ok()?;
    let json: Value = serde_json::from_slice(&text).ok()?;
    let (uuid, dev, ino) = (find(&json, "uuid")?.as_str()?, meta.dev(), meta.ino());
    Some(PathBuf::from(format!("/run/cowl/{uuid}-{dev:x}-{ino:x}")))
}

/// The first value with this key, at any depth.
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
