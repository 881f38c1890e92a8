//! A trial: a container in a temporary store is mounted, changed, snapshotted, restored and removed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cowl_layers::shown::Show as _;
use serde_json::Value;

use super::Finding;

/// The content of a program, which the kernel may read past the daemon: its magic number and some pages.
const PROGRAM: &[u8; 4] = b"\x7fELF";
const PAGES: usize = 64 << 10;

/// The processes of the trial. They are ended and the store is removed when it is dropped.
struct Trial {
    store: tempfile::TempDir,
    program: PathBuf,
}

pub(super) fn examine(dir: &Path) -> Vec<Finding> {
    let begun = || -> Result<Trial, String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let store = tempfile::Builder::new()
            .prefix("cowl-doctor-")
            .tempdir_in(dir);
        let store = store.map_err(|error| error.to_string())?;
        Ok(Trial { store, program })
    };
    let tried = begun().and_then(|trial| trial.run());
    tried.unwrap_or_else(|reason| vec![broken(&reason)])
}

fn broken(reason: &str) -> Finding {
    Finding::broken("mount", reason.to_owned())
        .remedy("correct what is broken above, or see docs/troubleshooting.md")
}

impl Trial {
    fn run(&self) -> Result<Vec<Finding>, String> {
        let source = self.store.path().join("source");
        let write = |path: &Path, content: &[u8]| {
            std::fs::write(path, content).map_err(|error| format!("{}: {error}", path.shown()))
        };
        std::fs::create_dir(&source).map_err(|error| error.to_string())?;
        let mut program = PROGRAM.to_vec();
        program.resize(PAGES, 0);
        write(&source.join("library.so"), &program)?;
        write(&source.join("file"), b"original")?;
        self.cowl(&[
            "create".as_ref(),
            "trial".as_ref(),
            "--from".as_ref(),
            source.as_os_str(),
        ])?;
        let mounted = self.cowl(&["mount", "trial"].map(OsStr::new))?;
        let root = Path::new(OsStr::new(mounted.trim_end())).to_path_buf();
        let read = |name: &str| {
            std::fs::read(root.join(name)).map_err(|error| format!("cannot read {name}: {error}"))
        };
        if read("library.so")? != program {
            return Err("a file in the mount has another content".to_owned());
        }
        let stats = self.json(&["stats", "trial", "--json"])?;
        let status = self.json(&["status", "trial", "--json"])?;
        self.cowl(&["snapshot", "trial"].map(OsStr::new))?;
        write(&root.join("file"), b"changed")?;
        self.cowl(&["umount", "trial"].map(OsStr::new))?;
        self.cowl(&["restore", "trial", "snap0"].map(OsStr::new))?;
        let mounted = self.cowl(&["mount", "trial"].map(OsStr::new))?;
        if mounted.trim_end().as_bytes() != root.as_os_str().as_encoded_bytes()
            || read("file")? != b"original"
        {
            return Err(
                "a restored container does not have the content of its snapshot".to_owned(),
            );
        }
        self.cowl(&["umount", "trial"].map(OsStr::new))?;
        let detail = "a container was created, mounted, changed, snapshotted and restored";
        Ok(vec![
            Finding::works("mount", detail),
            keeper(&stats),
            passthrough(&stats),
            limits(&status),
            self.kernel_driver()?,
        ])
    }

    fn kernel_driver(&self) -> Result<Finding, String> {
        let name = "kernel-driver";
        if let Err(reason) = self.cowl(&["mount", "--driver", "kernel", "trial"].map(OsStr::new)) {
            return Ok(Finding::absent(name, reason));
        }
        self.cowl(&["umount", "trial"].map(OsStr::new))?;
        Ok(Finding::works(
            name,
            "kernel overlayfs can mount containers (cowl mount --driver kernel)",
        ))
    }

    fn json(&self, args: &[&str]) -> Result<Value, String> {
        let args: Vec<_> = args.iter().map(OsStr::new).collect();
        serde_json::from_str(&self.cowl(&args)?).map_err(|error| error.to_string())
    }

    /// Runs a command on the temporary store, and returns what it prints; its error messages if it fails.
    fn cowl(&self, args: &[&OsStr]) -> Result<String, String> {
        let output = Command::new(&self.program)
            .arg("--store")
            .arg(self.store.path().join("store"))
            .arg("--quiet")
            .args(args)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("cannot start {}: {error}", self.program.shown()))?;
        let shown = |bytes: &[u8]| bytes.shown().to_string();
        match output.status.success() {
            true => String::from_utf8(output.stdout).map_err(|error| error.to_string()),
            false => {
                let command: Vec<_> = args
                    .iter()
                    .map(|arg| shown(arg.as_encoded_bytes()))
                    .collect();
                let message = output.stderr.strip_suffix(b"\n").unwrap_or(&output.stderr);
                Err(format!(
                    "cowl {} failed: {}",
                    command.join(" "),
                    shown(message)
                ))
            }
        }
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        // A failed trial may leave the container mounted. A successful one has unmounted it.
        if let Err(error) = self.cowl(&["umount", "--force", "trial"].map(OsStr::new)) {
            log::debug!("{error}");
        }
    }
}

fn keeper(stats: &Value) -> Finding {
    match stats.get("keeper").and_then(Value::as_str) {
        Some("running") => Finding::works("keeper", "a mount outlives its daemon"),
        state => Finding::limited(
            "keeper",
            format!("no keeper ({})", state.unwrap_or("unknown")),
            "a mount ends if its daemon is killed",
        )
        .remedy("use Linux 6.9 or later, without keeper = \"off\" in the configuration file"),
    }
}

fn passthrough(stats: &Value) -> Finding {
    let reads = stats
        .get("requests")
        .and_then(|requests| requests.get("read"));
    match reads.and_then(Value::as_u64) {
        None | Some(0) => Finding::works(
            "passthrough",
            "the kernel reads programs and libraries directly",
        ),
        Some(_) => Finding::limited(
            "passthrough",
            "the daemon reads all content",
            "programs start more slowly, and mapped files take memory twice",
        )
        .remedy("mount as root, on Linux 6.9 or later with CONFIG_FUSE_PASSTHROUGH"),
    }
}

fn limits(status: &Value) -> Finding {
    let lacking = status.get("lacking").and_then(Value::as_array);
    let names: Vec<_> = lacking
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    match names.is_empty() {
        true => Finding::works(
            "daemon-limits",
            "the daemon has limits and priorities of its own",
        ),
        false => Finding::limited(
            "daemon-limits",
            format!("not applied: {}", names.join(", ")),
            "limits of the command that mounts apply to the daemon",
        )
        .remedy(match crate::host::rootless::is_system_root() {
            true => "run cowl with CAP_SYS_RESOURCE, on a kernel with control groups",
            false => "mount as root; a plain user cannot apply all of them",
        }),
    }
}
