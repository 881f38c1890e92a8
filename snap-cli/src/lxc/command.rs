//! LXC containers through LXC's own tools: paths, state, start and stop.
//!
//! Independent of cowl's stores and containers.

use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::config;
use crate::error::{Error, Result};
use crate::host::files;
use crate::host::rootless::{self, outside};
use crate::shell::quoted;
use cowl_layers::shown::Show as _;

/// The default directory of LXC's containers.
const DEFAULT: &str = "/var/lib/lxc";

/// An LXC container: the directory of all containers, and its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LxcContainer {
    /// The directory of all containers.
    pub lxcpath: PathBuf,
    /// The name.
    pub name: String,
}

/// The state of an LXC container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LxcState {
    /// It is stopped.
    Stopped,
    /// It is running, starting, stopping or frozen.
    Running {
        /// LXC's name of the state, in lower case.
        word: String,
        /// The first process, if there is one.
        pid: Option<u32>,
    },
}

/// Returns the directory of all containers: the requested one, or the one that LXC is configured with.
pub fn lxcpath(requested: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = requested {
        return std::path::absolute(path).map_err(|e| Error::at("use", path, e));
    }
    // In the namespace of a plain user, LXC's tools take this process for root.
    if rootless::is_inside() {
        return own_lxcpath();
    }
    let configured = match run("lxc-config", [OsStr::new("lxc.lxcpath")]) {
        Ok(output) => output.stdout.trim_ascii().to_vec(),
        Err(Missing::Program) => Vec::new(),
        Err(Missing::Other(error)) => return Err(error),
    };
    Ok(if configured.is_empty() {
        PathBuf::from(DEFAULT)
    } else {
        PathBuf::from(OsString::from_vec(configured))
    })
}

/// Returns the directory of the containers of a plain user.
fn own_lxcpath() -> Result<PathBuf> {
    let home = std::env::var_os("HOME").filter(|home| !home.is_empty());
    let home = home.map(PathBuf::from).ok_or_else(|| {
        Error::failed("the directory of LXC's containers is unknown: HOME is not set")
            .hint("specify it: -P DIR")
    })?;
    let text = files::read_opt(&home.join(".config/lxc/lxc.conf"))?.unwrap_or_default();
    Ok(match config::get(&text, "lxc.lxcpath") {
        Some(path) => PathBuf::from(OsStr::from_bytes(path)),
        None => home.join(".local/share/lxc"),
    })
}

enum Missing {
    /// LXC is not installed.
    Program,
    Other(Error),
}

fn run<'a>(
    program: &str,
    args: impl IntoIterator<Item = &'a OsStr>,
) -> std::result::Result<Output, Missing> {
    let args: Vec<&OsStr> = args.into_iter().collect();
    let output = outside::run(program, args.iter().copied()).unwrap_or_else(|| {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).output()
    });
    output.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Missing::Program,
        _ => Missing::Other(Error::failed(format!("cannot run {program}")).because(error)),
    })
}

impl LxcContainer {
    /// Returns the container's directory.
    pub fn dir(&self) -> PathBuf {
        self.lxcpath.join(&self.name)
    }

    /// Returns the path of the container's config.
    pub fn config(&self) -> PathBuf {
        self.dir().join("config")
    }

    /// Returns the options that select the container in LXC's tools, quoted for a shell.
    pub fn options(&self) -> String {
        let name = quoted(&self.name);
        if self.lxcpath == Path::new(DEFAULT) {
            return format!("-n {name}");
        }
        format!("-P {} -n {name}", quoted(&self.lxcpath))
    }

    fn tool<'a>(
        &'a self,
        program: &str,
        more: &'a [&'a str],
    ) -> std::result::Result<Output, Missing> {
        let args: [&OsStr; 4] = [
            OsStr::new("-P"),
            self.lxcpath.as_os_str(),
            OsStr::new("-n"),
            OsStr::new(&self.name),
        ];
        run(program, args.into_iter().chain(more.iter().map(OsStr::new)))
    }

    /// Returns the container's state according to LXC.
    ///
    /// If LXC is not installed, the socket of the container's monitor determines the state.
    pub fn state(&self) -> Result<LxcState> {
        let output = match self.tool("lxc-info", &["-H", "-s", "-p"]) {
            Ok(output) => output,
            Err(Missing::Program) => return self.state_by_socket(),
            Err(Missing::Other(error)) => return Err(error),
        };
        let text = String::from_utf8(output.stdout).unwrap_or_default();
        let field = |key: &str| {
            let mut lines = text.lines().filter_map(|line| line.split_once(':'));
            let found = lines.find(|(found, _)| found.eq_ignore_ascii_case(key));
            found.map(|(_, value)| value.trim().to_owned())
        };
        Ok(match field("State") {
            None => LxcState::Stopped,
            Some(word) if word == "STOPPED" => LxcState::Stopped,
            Some(word) => LxcState::Running {
                word: word.to_ascii_lowercase(),
                pid: field("PID").and_then(|pid| pid.parse().ok()),
            },
        })
    }

    fn state_by_socket(&self) -> Result<LxcState> {
        let table = Path::new("/proc/net/unix");
        let text = std::fs::read(table).map_err(|e| Error::at("read", table, e))?;
        let mut name = b"@".to_vec();
        name.extend_from_slice(self.dir().join("command").as_os_str().as_bytes());
        let is_running = text
            .split(|&b| b == b'\n')
            .any(|line| line.ends_with(&name));
        Ok(match is_running {
            true => LxcState::Running {
                word: "running".to_owned(),
                pid: None,
            },
            false => LxcState::Stopped,
        })
    }

    /// Stops the container, by force after half a minute.
    ///
    /// Returns whether it was running.
    pub fn stop(&self) -> Result<bool> {
        if self.state()? == LxcState::Stopped {
            return Ok(false);
        }
        self.act("lxc-stop", &["-t", "30"], "stop")?;
        // LXC reports it as running until its monitor ends, a moment later.
        let until = Instant::now() + Duration::from_secs(10);
        while self.state()? != LxcState::Stopped && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(true)
    }

    /// Starts the container in the background.
    pub fn start(&self) -> Result<()> {
        self.act("lxc-start", &["-d"], "start")
    }

    fn act(&self, program: &str, more: &[&str], verb: &str) -> Result<()> {
        let command = format!("{program} {}", self.options());
        let output = match self.tool(program, more) {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => output,
            Err(Missing::Program) => {
                return Err(
                    Error::failed(format!("cannot run {program}: it is not installed"))
                        .hint("install LXC's tools: apt install lxc"),
                );
            }
            Err(Missing::Other(error)) => return Err(error),
        };
        let message = output.stderr.trim_ascii().shown().to_string();
        Err(
            Error::failed(format!("cannot {verb} the LXC container {}", self.name))
                .because(message.replace("\\n", "; "))
                .hint(format!("run it directly to see its messages: {command}")),
        )
    }
}

/// Returns a value of a config, including included files. `None` if there is none, or if LXC cannot read it.
pub fn config_value(config: &Path, key: &str) -> Result<Option<Vec<u8>>> {
    read_config_value(config, key).or_else(|error| {
        log::info!("{error}");
        Ok(None)
    })
}

/// Returns a value of a config, including included files. `None` if there is none, or if LXC is not installed. Fails if
/// LXC cannot read the config or an included file.
///
/// The container is not named: lxc-info asks the monitor of a container that runs or starts, and while a hook of the
/// start runs, the monitor waits for the hook and does not answer. No container is in the directory of the config.
pub fn read_config_value(config: &Path, key: &str) -> Result<Option<Vec<u8>>> {
    let dir = config.parent().unwrap_or(config);
    let file = [
        "-P".as_ref(),
        dir.as_os_str(),
        "--rcfile".as_ref(),
        config.as_os_str(),
    ];
    let args = file
        .into_iter()
        .chain(["-n", ".config", "-H", "-c", key].map(OsStr::new));
    let output = match run("lxc-info", args) {
        Ok(output) => output,
        Err(Missing::Program) => return Ok(None),
        Err(Missing::Other(error)) => return Err(error),
    };
    if !output.status.success() {
        let message = output.stderr.trim_ascii().shown().to_string();
        return Err(Error::failed(format!(
            "LXC cannot read {}, or a file that it includes",
            config.shown()
        ))
        .because(message.replace("\\n", "; "))
        .hint(format!(
            "correct it; this command shows the error: lxc-info -n CONTAINER --rcfile {} -c {key}",
            quoted(config)
        )));
    }
    let text = output.stdout.trim_ascii();
    let at = text.iter().position(|&byte| byte == b'=');
    let value = at.and_then(|at| text.get(at + 1..)).unwrap_or(text);
    Ok(Some(value.trim_ascii().to_vec()).filter(|value| !value.is_empty()))
}

/// Returns whether LXC's tools can be run.
pub fn is_installed() -> bool {
    !matches!(
        run("lxc-info", [OsStr::new("--version")]),
        Err(Missing::Program)
    )
}

/// Returns three random bytes for the second half of a hardware address.
pub fn random_address() -> [u8; 3] {
    let (high, ..) = uuid::Uuid::new_v4().as_fields();
    let [a, b, c, _] = high.to_be_bytes();
    [a, b, c]
}
