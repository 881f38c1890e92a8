//! LXC containers through LXC's own tools: paths, state, start and stop. Independent of cowl's stores and containers.

use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::shell::quoted;

/// Where LXC keeps containers when nobody says otherwise.
const DEFAULT: &str = "/var/lib/lxc";

/// An LXC container: the folder of all containers, and its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LxcContainer {
    /// The folder of all containers.
    pub lxcpath: PathBuf,
    /// Its name.
    pub name: String,
}

/// Whether it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// No.
    Stopped,
    /// Yes (or it is about to, or frozen), in LXC's word for it; with its first process, where there is one.
    Running {
        /// LXC's word, in lower case.
        word: String,
        /// Its first process.
        pid: Option<u32>,
    },
}

/// The folder of all containers: what was asked for, else what LXC is set up with.
pub fn lxcpath(asked: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = asked {
        return std::path::absolute(path).map_err(|e| Error::at("use", path, e));
    }
    let said = match run("lxc-config", [OsStr::new("lxc.lxcpath")]) {
        Ok(output) => output.stdout.trim_ascii().to_vec(),
        Err(Missing::Program) => Vec::new(),
        Err(Missing::Other(error)) => return Err(error),
    };
    Ok(if said.is_empty() {
        PathBuf::from(DEFAULT)
    } else {
        PathBuf::from(OsString::from_vec(said))
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
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    command.output().map_err(|error| match error.kind() {
        ErrorKind::NotFound => Missing::Program,
        _ => Missing::Other(Error::failed(format!("cannot run {program}")).because(error)),
    })
}

impl LxcContainer {
    /// Its folder.
    pub fn dir(&self) -> PathBuf {
        self.lxcpath.join(&self.name)
    }

    /// Its config.
    pub fn config(&self) -> PathBuf {
        self.dir().join("config")
    }

    /// The options by which LXC's tools find it, to be typed.
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

    /// Whether it runs, as LXC tells; where LXC is not installed, by the socket that its monitor has.
    pub fn state(&self) -> Result<State> {
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
            None => State::Stopped,
            Some(word) if word == "STOPPED" => State::Stopped,
            Some(word) => State::Running {
                word: word.to_ascii_lowercase(),
                pid: field("PID").and_then(|pid| pid.parse().ok()),
            },
        })
    }

    /// A value of its config, with all that it includes.
    pub fn value(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let output = match self.tool("lxc-info", &["-H", "-c", key]) {
            Ok(output) => output,
            Err(Missing::Program) => return Ok(None),
            Err(Missing::Other(error)) => return Err(error),
        };
        let text = output.stdout.trim_ascii();
        let at = text.iter().position(|&byte| byte == b'=');
        let value = at.and_then(|at| text.get(at + 1..)).unwrap_or(text);
        Ok(Some(value.trim_ascii().to_vec()).filter(|value| !value.is_empty()))
    }

    fn state_by_socket(&self) -> Result<State> {
        let table = Path::new("/proc/net/unix");
        let text = std::fs::read(table).map_err(|e| Error::at("read", table, e))?;
        let mut name = b"@".to_vec();
        name.extend_from_slice(self.dir().join("command").as_os_str().as_bytes());
        let there = text
            .split(|&b| b == b'\n')
            .any(|line| line.ends_with(&name));
        Ok(match there {
            true => State::Running {
                word: "running".to_owned(),
                pid: None,
            },
            false => State::Stopped,
        })
    }

    /// Stops it, in good order, and after half a minute in bad order; true when it ran.
    pub fn stop(&self) -> Result<bool> {
        if self.state()? == State::Stopped {
            return Ok(false);
        }
        self.act("lxc-stop", &["-t", "30"], "stop")?;
        // Its monitor, with which it would be said to run still, ends a moment later.
        let until = Instant::now() + Duration::from_secs(10);
        while self.state()? != State::Stopped && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(true)
    }

    /// Starts it in the background.
    pub fn start(&self) -> Result<()> {
        self.act("lxc-start", &["-d"], "start")
    }

    fn act(&self, program: &str, more: &[&str], word: &str) -> Result<()> {
        let typed = format!("{program} {}", self.options());
        let output = match self.tool(program, more) {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => output,
            Err(Missing::Program) => {
                return Err(Error::failed(format!("there is no {program} program"))
                    .hint("install LXC's tools (apt install lxc)"));
            }
            Err(Missing::Other(error)) => return Err(error),
        };
        let said = output.stderr.trim_ascii().escape_ascii().to_string();
        Err(
            Error::failed(format!("cannot {word} the LXC container {}", self.name))
                .because(said.replace("\\n", "; "))
                .hint(format!("look at what this says: {typed}")),
        )
    }
}

/// A hardware address's last half, at random.
pub fn random_address() -> [u8; 3] {
    let (high, ..) = uuid::Uuid::new_v4().as_fields();
    let [a, b, c, _] = high.to_be_bytes();
    [a, b, c]
}
