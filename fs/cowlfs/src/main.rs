//! `cowlfs`: arguments to a configuration, then [`cowlfs::serve`].

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use cowl_layers::setup::{SetupError, SetupKind};
use cowl_layers::shown::{Allowed, plain, plain_panics};
use cowl_layers::sys::process::{Background, to_background};
use cowlfs::cli::{Args, Invocation, explanation};

fn main() -> ExitCode {
    plain_panics();
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return usage(error),
    };
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err((text, code)) => {
            let text = plain(&text, Allowed::default());
            // Nothing is left to tell when standard error is closed.
            drop(writeln!(std::io::stderr(), "cowlfs: {text}"));
            ExitCode::from(code)
        }
    }
}

/// Prints help to standard output, mistakes to standard error.
fn usage(error: clap::Error) -> ExitCode {
    let code = u8::try_from(error.exit_code()).unwrap_or(2);
    let is_mistake = error.use_stderr();
    let text = explanation(error, false);
    let written = match is_mistake {
        true => std::io::stderr().write_all(text.as_bytes()),
        false => std::io::stdout().write_all(text.as_bytes()),
    };
    match written {
        Ok(()) => ExitCode::from(code),
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(args: Args) -> Result<(), (String, u8)> {
    let Invocation {
        config,
        foreground,
        debug,
        remount,
    } = args.into_invocation().map_err(|text| (text, 2))?;
    cowlfs::logging::start(debug);
    if remount {
        return cowlfs::remount(&config).map_err(|error| told(&error));
    }
    if foreground {
        return cowlfs::serve(config, |_| {}).map_err(|error| told(&error));
    }
    match to_background().map_err(|error| (format!("cannot fork: {error}"), 1))? {
        Background::Parent(why) if why.is_empty() => Ok(()),
        Background::Parent(why) => {
            let (code, why) = why.split_once(' ').unwrap_or(("1", &why));
            Err((why.to_owned(), code.parse().unwrap_or(1)))
        }
        Background::Child(pipe) => {
            let mut pipe = Some(pipe);
            let served = cowlfs::serve(config, |_| {
                if let Some(pipe) = pipe.take()
                    && let Err(error) = pipe.ready()
                {
                    log::error!("cannot tell the parent: {error}");
                }
            });
            let Err(error) = served else { return Ok(()) };
            let (why, code) = told(&error);
            match pipe {
                Some(pipe) => pipe
                    .failed(&format!("{code} {why}"))
                    .map_err(|error| (error.to_string(), 1)),
                None => Err((why, code)),
            }
        }
    }
}

fn told(error: &SetupError) -> (String, u8) {
    let code = match error.kind {
        SetupKind::Usage => 2,
        SetupKind::Host => 1,
        SetupKind::Busy => 4,
        SetupKind::Damaged => 5,
    };
    (error.to_string(), code)
}
