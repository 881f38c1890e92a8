//! The program `cowlfs`: parses its arguments and calls [`cowlfs::serve`].

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use cowl_layers::setup::{SetupError, SetupKind};
use cowl_layers::shown::{Allowed, Show as _, plain};
use cowl_layers::sys::process::{Background, to_background};
use cowlfs::cli::{Args, Colors, Invocation, render_error};
use cowlfs::config::{Config, Successor, Supervision};
use cowlfs::control::Client;
use cowlfs::{Event, Takeover};
use log::LevelFilter;

fn main() -> ExitCode {
    cowl_layers::panics::install();
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return print_usage(error),
    };
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err((text, code)) => {
            let text = plain(&text, Allowed::default());
            // If standard error fails, there is nowhere to report it.
            drop(writeln!(std::io::stderr(), "cowlfs: {text}"));
            ExitCode::from(code)
        }
    }
}

/// Prints help to standard output, or a usage error to standard error.
fn print_usage(error: clap::Error) -> ExitCode {
    let code = u8::try_from(error.exit_code()).unwrap_or(2);
    let is_error = error.use_stderr();
    let text = render_error(error, Colors::Off);
    let written = match is_error {
        true => std::io::stderr().write_all(text.as_bytes()),
        false => std::io::stdout().write_all(text.as_bytes()),
    };
    match written {
        Ok(()) => ExitCode::from(code),
        Err(_) => ExitCode::FAILURE,
    }
}

/// Runs the program. Returns the message and the exit code of an error.
fn run(args: Args) -> Result<(), (String, u8)> {
    if let Some(socket) = &args.upgrade {
        return upgrade(socket).map_err(|text| (text, 1));
    }
    if args.take_over {
        start_log(args.debug);
        return take_over(args.debug).map_err(|error| describe(&error));
    }
    let Invocation {
        config,
        foreground,
        debug,
        remount,
        ignored,
    } = args.into_invocation().map_err(|text| (text, 2))?;
    start_log(debug);
    let config = Config {
        successor: Some(successor(debug)),
        ..config
    };
    for message in ignored {
        log::warn!("{message}");
    }
    if remount {
        return cowlfs::remount(&config).map_err(|error| describe(&error));
    }
    if foreground {
        let mountpoint = config.mountpoint.clone();
        let config = Config {
            supervision: Supervision::On,
            ..config
        };
        return cowlfs::serve(config, |event| note_end(event, &mountpoint))
            .map_err(|error| describe(&error));
    }
    match to_background().map_err(|error| (format!("cannot start the daemon: {error}"), 1))? {
        Background::Parent(message) if message.is_empty() => Ok(()),
        Background::Parent(message) => {
            let (code, message) = message.split_once(' ').unwrap_or(("1", &message));
            Err((message.to_owned(), code.parse().unwrap_or(1)))
        }
        Background::Child(pipe) => {
            let mut pipe = Some(pipe);
            let mountpoint = config.mountpoint.clone();
            let served = cowlfs::serve(config, |event| {
                note_end(event, &mountpoint);
                let Some(pipe) = pipe.take() else { return };
                let done = match event {
                    Event::Mounted(_) => pipe.ready(),
                    Event::TakenOver(_) | Event::Continued(_) | Event::Kept => pipe.release(),
                    Event::GivenUp(reason) => pipe.failed(&format!("1 {reason}")),
                };
                if let Err(error) = done {
                    log::error!("cannot notify the parent process: {error}");
                }
            });
            let Err(error) = served else { return Ok(()) };
            let (message, code) = describe(&error);
            match pipe {
                Some(pipe) => pipe
                    .failed(&format!("{code} {message}"))
                    .map_err(|error| (error.to_string(), 1)),
                None => Err((message, code)),
            }
        }
    }
}

fn start_log(debug: bool) {
    cowlfs::logging::start(match debug {
        true => LevelFilter::Debug,
        false => LevelFilter::Warn,
    });
}

/// Logs the command that ends a mount whose daemon was killed and is not replaced.
fn note_end(event: Event, mountpoint: &Path) {
    if let Event::GivenUp(_) = event {
        log::error!("type: umount {}; then mount it again", mountpoint.shown());
    }
}

/// Returns how the program is started that takes over the mount.
fn successor(debug: bool) -> Successor {
    let mut arguments = vec!["--take-over".into()];
    if debug {
        arguments.push("--debug".into());
    }
    Successor {
        arguments,
        ..Successor::default()
    }
}

/// Continues the mount of the daemon that has started this process.
fn take_over(debug: bool) -> Result<(), SetupError> {
    let mut takeover = Takeover::receive()?;
    takeover.config_mut().successor = Some(successor(debug));
    let mountpoint = takeover.config_mut().mountpoint.clone();
    takeover.serve(|event| note_end(event, &mountpoint))
}

/// Replaces the daemon with this control socket by this program.
fn upgrade(socket: &Path) -> Result<(), String> {
    let program = std::env::current_exe()
        .map_err(|error| format!("cannot find the program itself: {error}"))?;
    let upgraded = Client::connect(socket)
        .and_then(|mut client| client.upgrade(&program))
        .map_err(|error| format!("cannot replace the daemon: {error}"))?;
    let text = format!(
        "pid {}: version {} replaced version {}\n",
        upgraded.pid, upgraded.to, upgraded.from
    );
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|error| error.to_string())
}

/// Returns the message and the exit code of an error.
fn describe(error: &SetupError) -> (String, u8) {
    let code = match error.kind {
        SetupKind::Usage => 2,
        SetupKind::Host => 1,
        SetupKind::Busy => 4,
        SetupKind::Damaged => 5,
    };
    (error.to_string(), code)
}
