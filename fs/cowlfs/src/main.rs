//! The program `cowlfs`: parses its arguments and calls [`cowlfs::serve`].

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use cowl_layers::setup::{SetupError, SetupKind};
use cowl_layers::shown::{Allowed, plain};
use cowl_layers::sys::process::{Background, to_background};
use cowlfs::Event;
use cowlfs::cli::{Args, Colors, Invocation, render_error};
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
    let Invocation {
        config,
        foreground,
        debug,
        remount,
        ignored,
    } = args.into_invocation().map_err(|text| (text, 2))?;
    cowlfs::logging::start(match debug {
        true => LevelFilter::Debug,
        false => LevelFilter::Warn,
    });
    for message in ignored {
        log::warn!("{message}");
    }
    if remount {
        return cowlfs::remount(&config).map_err(|error| describe(&error));
    }
    if foreground {
        return cowlfs::serve(config, |_| {}).map_err(|error| describe(&error));
    }
    match to_background().map_err(|error| (format!("cannot start the daemon: {error}"), 1))? {
        Background::Parent(message) if message.is_empty() => Ok(()),
        Background::Parent(message) => {
            let (code, message) = message.split_once(' ').unwrap_or(("1", &message));
            Err((message.to_owned(), code.parse().unwrap_or(1)))
        }
        Background::Child(pipe) => {
            let mut pipe = Some(pipe);
            let served = cowlfs::serve(config, |event| {
                let Some(pipe) = pipe.take() else { return };
                let done = match event {
                    Event::Mounted(_) => pipe.ready(),
                    Event::Continued(_) | Event::Kept => pipe.release(),
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
