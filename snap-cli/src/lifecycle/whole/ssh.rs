//! Runs `cowl` on another host over the user's ssh. Pure except for [`SshCommand::spawn`].

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::process::{Child, Command, Stdio};

use crate::error::{Error, Result};
use crate::shell::posix_quoted;
use cowl_layers::shown::Show as _;

/// The address of a store on another host: `ssh://[USER@]HOST[:PORT][/STORE]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshAddress {
    /// `[USER@]HOST`, as ssh expects it.
    destination: OsString,
    port: Option<u16>,
    /// The path of the store; `None` for the default one.
    store: Option<Vec<u8>>,
}

impl SshAddress {
    /// Parses an address. ssh must not take the host for an option.
    pub fn parse(raw: &OsStr) -> Result<Self> {
        let refuse = |reason: &str| {
            Error::usage(format!("invalid address {}: {reason}", raw.shown()))
                .hint("an address is ssh://[USER@]HOST[:PORT][/STORE]")
        };
        let Some(rest) = raw.as_bytes().strip_prefix(b"ssh://") else {
            return Err(refuse("it does not begin with ssh://"));
        };
        let slash = rest.iter().position(|byte| *byte == b'/');
        let (authority, store) = rest.split_at(slash.unwrap_or(rest.len()));
        let Some(authority) = str::from_utf8(authority).ok() else {
            return Err(refuse("the host is not valid UTF-8"));
        };
        let (user, host) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        let (host, port) = match host.strip_prefix('[').and_then(|host| host.split_once(']')) {
            Some((host, port)) => (
                host,
                port.strip_prefix(':').or(port.is_empty().then_some("")),
            ),
            None => match host.split_once(':') {
                Some((host, port)) => (host, Some(port).filter(|port| !port.is_empty())),
                None => (host, Some("")),
            },
        };
        let port = match port {
            Some("") => None,
            Some(port) => Some(port.parse().map_err(|_| refuse("invalid port"))?),
            None => return Err(refuse("invalid port")),
        };
        let is_plain = |text: &str| {
            let valid = |c: char| c.is_alphanumeric() || "._-:%+".contains(c);
            !text.is_empty() && !text.starts_with('-') && text.chars().all(valid)
        };
        if !is_plain(host) {
            return Err(refuse("invalid host"));
        }
        if !user.is_none_or(is_plain) {
            return Err(refuse("invalid user"));
        }
        if store.contains(&0) {
            return Err(refuse("the path of the store contains a NUL"));
        }
        let destination = match user {
            Some(user) => format!("{user}@{host}"),
            None => host.to_owned(),
        };
        Ok(Self {
            destination: destination.into(),
            port,
            store: (store.len() > 1).then(|| store.to_vec()),
        })
    }
}

/// A command of cowl on another host.
#[derive(Clone, Debug)]
pub struct SshCommand<'a> {
    /// The other host and its store.
    pub address: &'a SshAddress,
    /// The local ssh program with options, as words of a shell.
    pub ssh: &'a OsStr,
    /// The cowl program there, as words of a shell, for example `sudo cowl`.
    pub remote: &'a OsStr,
    /// The arguments of cowl.
    pub words: &'a [&'a OsStr],
}

impl SshCommand<'_> {
    /// Returns the command line for the shell on the other host.
    fn remote_line(&self) -> OsString {
        let mut line = self.remote.as_bytes().to_vec();
        let mut add = |word: &[u8]| {
            line.push(b' ');
            line.extend_from_slice(&posix_quoted(word));
        };
        if let Some(store) = &self.address.store {
            add(b"--store");
            add(store);
        }
        self.words.iter().for_each(|word| add(word.as_bytes()));
        OsString::from_vec(line)
    }

    /// Starts ssh, with pipes for input, output and errors.
    pub fn spawn(&self) -> Result<Child> {
        // A shell splits the words of the ssh program, as for GIT_SSH_COMMAND. The others are its arguments.
        let mut script = self.ssh.to_owned();
        script.push(" \"$@\"");
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(&script).arg("ssh");
        if let Some(port) = self.address.port {
            command.arg("-p").arg(port.to_string());
        }
        command
            .arg(&self.address.destination)
            .arg(self.remote_line())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| Error::failed("cannot start ssh").because(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn addresses_are_parsed() {
        for (text, destination, port, store) in [
            ("ssh://host", "host", None, None),
            ("ssh://host/", "host", None, None),
            (
                "ssh://root@host:2222/srv/a b",
                "root@host",
                Some(2222),
                Some("/srv/a b"),
            ),
            (
                "ssh://[fe80::1%eth0]:22/x",
                "fe80::1%eth0",
                Some(22),
                Some("/x"),
            ),
            ("ssh://[::1]", "::1", None, None),
        ] {
            let parsed = SshAddress::parse(OsStr::new(text)).unwrap();
            assert_eq!(parsed.destination, destination);
            assert_eq!(parsed.port, port);
            assert_eq!(parsed.store.as_deref(), store.map(str::as_bytes));
        }
    }

    #[test]
    fn a_host_cannot_be_an_option_or_a_command() {
        for bad in [
            "ssh://",
            "ssh:///store",
            "ssh://-oProxyCommand=x",
            "ssh://-l@host",
            "ssh://user@-host",
            "ssh://[-host]",
            "ssh://host:",
            "ssh://host:x",
            "ssh://host:99999",
            "ssh://[::1]x",
            "ssh://ho st",
            "ssh://host;id",
            "ssh://$(id)",
            "ssh://@host",
            "ssh://a@b@host",
            "ssh://host\n",
            "http://host",
            "host",
        ] {
            let error = SshAddress::parse(OsStr::new(bad)).unwrap_err();
            assert_eq!(error.kind, Kind::Usage, "{bad}");
        }
        assert!(SshAddress::parse(OsStr::from_bytes(b"ssh://\xff")).is_err());
    }

    #[test]
    fn words_are_quoted_for_the_other_shell() {
        let address = SshAddress::parse(OsStr::new("ssh://h/a;b'c")).unwrap();
        let words = [OsStr::new("receive"), OsStr::new("$(id)")];
        let command = SshCommand {
            address: &address,
            ssh: OsStr::new("ssh"),
            remote: OsStr::new("sudo cowl"),
            words: &words,
        };
        assert_eq!(
            command.remote_line(),
            r"sudo cowl --store '/a;b'\''c' receive '$(id)'"
        );
    }
}
