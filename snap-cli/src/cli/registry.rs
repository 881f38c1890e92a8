//! The options for registries, and the commands `cowl login` and `cowl logout`.

use std::ffi::OsString;
use std::io::{BufRead, IsTerminal as _, Read as _, Write as _};
use std::path::{Path, PathBuf};

use rustix::termios::{LocalModes, OptionalActions};

use super::{CliCommand, Context, Namespace, output};
use crate::error::{Error, Result};
use crate::registry::{
    Access, AuthFiles, Client, RegistryImage, RegistryName, RegistryRef, TlsVerify, Trust, log_in,
    log_out,
};
use cowl_layers::shown::Show as _;

/// The maximum length of a password, in bytes. Some registries use tokens as passwords.
const MAX_PASSWORD: u64 = 64 << 10;

/// The options for registries.
#[derive(Debug, clap::Args)]
pub(super) struct RegistryArgs {
    /// Read credentials for registries from this file [default: $REGISTRY_AUTH_FILE, else those of podman
    /// and docker]
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
}

/// The options for the certificates of registries.
#[derive(Debug, clap::Args)]
struct TrustArgs {
    /// Verify the certificate of a registry, and refuse plain HTTP except on this machine. With `false`,
    /// anyone on the network can read and replace what is transferred
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true,
          default_missing_value = "true", action = clap::ArgAction::Set)]
    tls_verify: bool,
    /// Trust the certificates in the files *.crt of this directory, too, and use the certificate of the
    /// client in NAME.cert and NAME.key [default: /etc/containers/certs.d/REGISTRY and
    /// /etc/docker/certs.d/REGISTRY]
    #[arg(long, value_name = "DIR")]
    cert_dir: Option<PathBuf>,
}

impl TrustArgs {
    fn trust(&self) -> Trust {
        Trust {
            verify: match self.tls_verify {
                true => TlsVerify::On,
                false => TlsVerify::Off,
            },
            cert_dir: self.cert_dir.clone(),
        }
    }
}

impl RegistryArgs {
    fn auth_files(&self) -> AuthFiles {
        AuthFiles::from_option(self.authfile.clone())
    }

    /// Connects to the registry of a reference.
    pub(super) fn connect(&self, reference: &RegistryRef, access: &Access) -> Result<Client> {
        Client::connect(reference, access, (&self.trust.trust(), &self.auth_files()))
    }

    /// Opens the image with a reference. Its layers will be downloaded to the directory `transfers`.
    pub(super) fn open(&self, reference: &RegistryRef, transfers: &Path) -> Result<RegistryImage> {
        let client = self.connect(reference, &Access::Pull)?;
        RegistryImage::open(client, reference, transfers)
    }
}

/// Parses a reference to an image in a registry.
pub(super) fn parse_reference(text: &OsString) -> Result<RegistryRef> {
    match text.to_str() {
        Some(text) => RegistryRef::parse(text),
        None => Err(Error::usage(format!(
            "invalid image reference \"{}\": it is not valid UTF-8",
            text.shown()
        ))),
    }
}

fn parse_registry(text: &OsString) -> Result<RegistryName> {
    let shown = text.shown().to_string();
    RegistryName::parse(text.to_str().unwrap_or(&shown))
}

/// Log in to a registry of container images
///
/// Verifies the name and the password, and stores them where podman and skopeo find them: in --authfile,
/// $REGISTRY_AUTH_FILE, or $XDG_RUNTIME_DIR/containers/auth.json, which is removed at a reboot. If that file
/// names a credential helper, the helper stores them.
#[derive(Debug, clap::Args)]
pub(super) struct LoginArgs {
    /// The registry: HOST or HOST:PORT
    registry: OsString,
    /// The name of the user [default: ask]
    #[arg(short, long, value_name = "USER")]
    username: Option<String>,
    /// Read the password from standard input; otherwise it is requested at the terminal
    #[arg(long)]
    password_stdin: bool,
    #[command(flatten)]
    registry_args: RegistryArgs,
}

impl CliCommand for LoginArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let registry = parse_registry(&self.registry)?;
        let user = match &self.username {
            Some(user) => user.clone(),
            None if self.password_stdin => {
                return Err(Error::usage("--password-stdin needs --username"));
            }
            None => ask("Username: ", Echo::On)?,
        };
        let password = match self.password_stdin {
            true => read_password()?,
            false => ask("Password: ", Echo::Off)?,
        };
        let args = &self.registry_args;
        let with = (&args.trust.trust(), &args.auth_files());
        match log_in(
            &registry,
            (&user, &password),
            with,
            context.session.patience,
        )? {
            Some(file) => output::print_note(&format!(
                "logged in to {registry}; the password is in {}, readable by you",
                file.shown()
            )),
            None => output::print_note(&format!(
                "logged in to {registry}; a credential helper stores the password"
            )),
        }
        Ok(0)
    }

    fn namespace(&self) -> Namespace {
        Namespace::Unused
    }
}

/// Remove the stored credentials of a registry
#[derive(Debug, clap::Args)]
pub(super) struct LogoutArgs {
    /// The registry: HOST or HOST:PORT
    registry: OsString,
    /// Remove them from this file [default: as for `cowl login`]
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
}

impl CliCommand for LogoutArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let registry = parse_registry(&self.registry)?;
        let files = AuthFiles::from_option(self.authfile.clone());
        match log_out(&registry, &files, context.session.patience)? {
            true => Ok(0),
            false => Err(
                Error::not_found(format!("there are no credentials for {registry}"))
                    .hint("cowl login REGISTRY stores some; those of another file: --authfile"),
            ),
        }
    }

    fn namespace(&self) -> Namespace {
        Namespace::Unused
    }
}

/// Reads a password from standard input, without the line break at its end.
fn read_password() -> Result<String> {
    let mut text = String::new();
    let mut input = std::io::stdin().lock().take(MAX_PASSWORD);
    let read = input.read_to_string(&mut text);
    read.map_err(|error| Error::failed("cannot read the password").because(error))?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    check_password(text.strip_suffix('\r').unwrap_or(text))
}

fn check_password(text: &str) -> Result<String> {
    match text.is_empty() || text.len() as u64 >= MAX_PASSWORD {
        true => Err(Error::usage("the password is empty or too long")),
        false => Ok(text.to_owned()),
    }
}

/// Whether the terminal shows what is typed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Echo {
    On,
    Off,
}

/// Asks for a line at the terminal.
fn ask(prompt: &str, echo: Echo) -> Result<String> {
    let failed = |error: std::io::Error| Error::failed("cannot ask at the terminal").because(error);
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(
            Error::usage("cannot ask for a password without a terminal").hint(
                "specify --username, and pass the password on standard input: --password-stdin",
            ),
        );
    }
    let show = |text: &str| {
        let mut err = std::io::stderr();
        err.write_all(text.as_bytes()).and_then(|()| err.flush())
    };
    let read = match echo {
        Echo::On => show(prompt).and_then(|()| {
            let mut line = String::new();
            let read = stdin.lock().take(MAX_PASSWORD).read_line(&mut line);
            read.map(|_| line)
        }),
        Echo::Off => {
            let read = read_hidden(|| show(prompt));
            // The line break was not shown.
            show("\n").and(read)
        }
    };
    let line = read.map_err(failed)?;
    check_password(line.trim_end_matches(['\n', '\r']))
}

/// Reads a line from the terminal without showing it, after `prompt`.
///
/// The terminal sends no signals meanwhile: one that ended the process would leave it in this mode.
fn read_hidden(prompt: impl FnOnce() -> std::io::Result<()>) -> std::io::Result<String> {
    let stdin = std::io::stdin();
    let before = rustix::termios::tcgetattr(&stdin)?;
    let mut hidden = before.clone();
    hidden.local_modes -= LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG;
    rustix::termios::tcsetattr(&stdin, OptionalActions::Flush, &hidden)?;
    // After the change of the mode, which discards what was typed before it.
    let line = prompt().and_then(|()| read_typed(&mut stdin.lock()));
    rustix::termios::tcsetattr(&stdin, OptionalActions::Flush, &before)?;
    line
}

/// Reads a line whose editing keys the terminal does not interpret.
fn read_typed(input: &mut impl BufRead) -> std::io::Result<String> {
    const INTERRUPT: u8 = 0x03;
    const END: u8 = 0x04;
    const ERASE: [u8; 2] = [0x08, 0x7f];
    const ERASE_LINE: u8 = 0x15;
    let mut line = Vec::new();
    for byte in input.bytes() {
        match byte? {
            b'\n' | b'\r' | END => break,
            INTERRUPT => return Err(std::io::Error::other("interrupted")),
            ERASE_LINE => line.clear(),
            byte if ERASE.contains(&byte) => {
                // All bytes of the last character.
                while line.pop().is_some_and(|byte: u8| byte & 0xc0 == 0x80) {}
            }
            _ if line.len() as u64 >= MAX_PASSWORD => {
                return Err(std::io::Error::other("the line is too long"));
            }
            byte => line.push(byte),
        }
    }
    String::from_utf8(line).map_err(std::io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typed_lines_can_be_edited() {
        let read = |mut input: &[u8]| read_typed(&mut input);
        for (input, expected) in [
            (&b"p:w d\nrest"[..], "p:w d"),
            (b"ab\x7fc\r", "ac"),
            ("a\u{e9}\u{7f}b\n".as_bytes(), "ab"),
            (b"\x7f\x7fx\n", "x"),
            (b"wrong\x15right\x04", "right"),
        ] {
            assert_eq!(read(input).unwrap(), expected);
        }
        assert!(read(b"ab\x03").is_err());
        assert!(read(b"\xff\n").is_err());
    }
}
