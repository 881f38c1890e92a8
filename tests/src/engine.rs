//! Container engines with storage of their own, which only import, export and save images. No container runs.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::command::{Output, run_command};

/// An engine. Drop ends its daemon.
#[derive(Debug)]
pub struct Engine {
    program: &'static str,
    dir: PathBuf,
    daemon: Option<Child>,
}

impl Engine {
    /// Returns podman with its storage in `dir`.
    #[must_use]
    pub fn podman(dir: &Path) -> Engine {
        Engine {
            program: "podman",
            dir: dir.to_owned(),
            daemon: None,
        }
    }

    /// Starts a Docker daemon with its storage and its socket in `dir`. It changes no setting of the network.
    ///
    /// # Panics
    /// If the daemon does not serve within a minute.
    #[must_use]
    pub fn docker(dir: &Path) -> Engine {
        let log = dir.join("dockerd.log");
        let output = File::create(&log).expect("the log of dockerd");
        let mut command = Command::new("dockerd");
        command
            .args(["--iptables=false", "--ip6tables=false", "--bridge=none"])
            .args(["--storage-driver", "vfs", "--data-root"])
            .arg(dir.join("data"))
            .arg("--exec-root")
            .arg(dir.join("exec"))
            .arg("--pidfile")
            .arg(dir.join("pid"))
            .args(["--host", &socket(dir)])
            .stdout(output.try_clone().expect("the log of dockerd"))
            .stderr(output);
        let daemon = command.spawn().expect("dockerd");
        let engine = Engine {
            program: "docker",
            dir: dir.to_owned(),
            daemon: Some(daemon),
        };
        let start = Instant::now();
        while engine.run(&["version"]).code != 0 {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "dockerd does not serve: {}",
                std::fs::read_to_string(&log).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        engine
    }

    /// Returns the name of the engine's program.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.program
    }

    /// Runs a command of the engine in its directory.
    #[must_use]
    pub fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(self.program);
        match self.daemon {
            Some(_) => command
                .args(["--host", &socket(&self.dir)])
                .env("DOCKER_CONFIG", &self.dir),
            None => command
                .arg("--root")
                .arg(self.dir.join("root"))
                .arg("--runroot")
                .arg(self.dir.join("run"))
                .args(["--storage-driver", "vfs"]),
        };
        command.args(args).current_dir(&self.dir);
        run_command(command, b"")
    }
}

fn socket(dir: &Path) -> String {
    format!("unix://{}", dir.join("socket").display())
}

impl Drop for Engine {
    fn drop(&mut self) {
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        // It ends its containerd as well.
        let pid = Pid::from_child(daemon);
        if let Err(error) = kill_process(pid, Signal::TERM).map_err(std::io::Error::from) {
            eprintln!("cannot end dockerd: {error}");
        }
        if let Err(error) = daemon.wait() {
            eprintln!("cannot wait for dockerd: {error}");
        }
    }
}
