//! The command line.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, Parser};
use clap_mangen::Man;
use cowl::config::{Config, Overrides};
use cowl::host::programs;
use cowl::store::{Session, Store};
use cowl::{Error, Result};
use log::LevelFilter;

use crate::listener::listen;
use crate::manager::Manager;
use crate::{logging, serving};

/// Make a store of cowl available to containerd as a snapshotter
///
/// Runs in the foreground until it receives SIGTERM. Mounts of containers continue to be served after that. systemd
/// starts it when containerd connects (cowl-snapshotter.socket).
///
/// Exit codes are those of cowl: 0 success, 1 failure, 2 usage error, 4 busy or locked, 5 the store is damaged.
#[derive(Debug, Parser)]
#[command(name = "cowl-snapshotter", version, max_term_width = 100)]
pub(crate) struct Cli {
    /// Use the store in this directory; create it if there is none [default: $COWL_STORE, else /var/lib/cowl]
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,

    /// Listen at this path, unless the service manager passes a socket
    #[arg(
        long,
        value_name = "SOCKET",
        default_value = "/run/cowl-snapshotter/snapshotter.sock"
    )]
    address: PathBuf,

    /// Read this configuration file [default: $COWL_CONFIG, else /etc/cowl/config.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Print the manual page (internal: for building and installing cowl)
    #[arg(long, hide = true)]
    man_page: bool,

    /// Print informational messages; if given twice, debugging messages as well
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

/// Runs the command line of this process.
pub(crate) fn main() -> ExitCode {
    cowl_layers::panics::install();
    cowl_layers::points::arm();
    let cli = Cli::parse();
    logging::start(match cli.verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        _ => LevelFilter::Debug,
    });
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            if let Some(hint) = &error.hint {
                log::error!("hint: {hint}");
            }
            ExitCode::from(error.kind.code())
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    if cli.man_page {
        let printed = std::io::stdout().write_all(&manual_page()?);
        return printed
            .map_err(|error| Error::failed("cannot print the manual page").because(error));
    }
    if !rustix::process::geteuid().is_root() {
        return Err(Error::usage(
            "only root can manage the snapshots of containerd",
        ));
    }
    let config = Config::load(Overrides {
        config: cli.config,
        store: cli.store,
        ..Overrides::default()
    })?;
    let session = Session {
        command: "cowl-snapshotter".to_owned(),
        patience: Duration::from_secs(config.wait.min(24 * 3600)),
        mounts: config.mounts,
        program: Some(find_cowl()?),
    };
    let store = Store::open_or_make(&Store::locate(config.store)?, session)?;
    // Before the socket, which the process that holds the lock may still use.
    let alone = store.lock_containerd()?;
    // Before the snapshots are read, because it must not be done while other threads run.
    let socket = listen(&cli.address)?;
    let manager = Manager::open(store, alone)?;
    serving::serve(socket, manager)
}

/// Returns the path of the program that serves mounts: the one beside this program, or else that in PATH.
fn find_cowl() -> Result<PathBuf> {
    let own = std::env::current_exe()
        .map_err(|e| Error::failed("cannot find this program").because(e))?;
    let beside = own.with_file_name("cowl");
    if beside.is_file() {
        return Ok(beside);
    }
    programs::find("cowl").ok_or_else(|| {
        Error::failed("cannot find the program cowl, which serves mounts")
            .hint("install it beside cowl-snapshotter, or in a directory of PATH")
    })
}

/// Returns the manual page.
fn manual_page() -> Result<Vec<u8>> {
    let mut page = Vec::new();
    Man::new(Cli::command())
        .manual("cowl manual")
        .render(&mut page)
        .map_err(|error| Error::failed("cannot write the manual page").because(error))?;
    Ok(page)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_manual_agrees_with_the_help() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/man/cowl-snapshotter.1");
        let written = std::fs::read(path).unwrap();
        assert!(
            written == manual_page().unwrap(),
            "run `cargo xtask man` to update the manual page"
        );
    }

    #[test]
    fn the_installed_unit_contains_a_valid_command_line() {
        let unit = include_str!("../../dist/systemd/cowl-snapshotter.service");
        let line = unit
            .lines()
            .find_map(|line| line.strip_prefix("ExecStart=@bindir@/"));
        Cli::try_parse_from(line.unwrap().split_whitespace()).unwrap();
        let socket = include_str!("../../dist/systemd/cowl-snapshotter.socket");
        let address = Cli::parse_from(["cowl-snapshotter"]).address;
        let listens = format!("ListenStream={}\n", address.to_str().unwrap());
        assert!(socket.contains(&listens), "{listens}");
    }
}
