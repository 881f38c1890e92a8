//! The user and the groups of a process, from the files `etc/passwd` and `etc/group` of a container.
//!
//! The files are opened within the container's root, so that nothing in these paths leads out of it.

use std::io::Read as _;
use std::os::fd::BorrowedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, getegid, geteuid, setgroups, setresgid, setresuid};
use rustix::fs::OFlags;

use cowl_layers::shown::Show as _;
use cowl_layers::sys::within::{self, OpenedObject, SymlinkPolicy};

use super::terminal::standard_terminal;

use crate::error::{Error, Result};

/// A user with its groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    /// Its home directory.
    pub(super) home: String,
    /// Its name, if it has one.
    pub(super) name: Option<String>,
}

/// Bytes of `etc/passwd`, and of `etc/group`, that are read.
const MOST: u64 = 1 << 20;

/// The id that the system calls take for "unchanged".
const NO_ID: u32 = u32::MAX;

impl Identity {
    /// Resolves `USER[:GROUP]`, which are names or numbers, in the container with this root.
    pub(super) fn resolve(root: BorrowedFd<'_>, text: &str) -> Result<Self> {
        let users = read(root, "/etc/passwd")?;
        let groups = read(root, "/etc/group")?;
        find(text, &users, &groups)
    }

    /// Makes the terminal of this process one of the user. It was created for the command.
    pub(super) fn own_terminal(&self) -> Result<()> {
        let Some(terminal) = standard_terminal() else {
            return Ok(());
        };
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        match nix::unistd::fchown(terminal, Some(uid), Some(gid)) {
            // The namespace has no other ids, which is an error of `take`.
            Ok(()) | Err(Errno::EPERM | Errno::EINVAL) => Ok(()),
            Err(error) => {
                let what = "cannot give the terminal to the user of the image";
                Err(Error::failed(what).because(error))
            }
        }
    }

    /// Gives this process the ids. A user that is not root has no capabilities afterwards.
    pub(super) fn take(&self) -> Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        let groups: Vec<_> = self.groups.iter().copied().map(Gid::from_raw).collect();
        let has_ids = (geteuid(), getegid()) == (uid, gid);
        let set = match setgroups(&groups) {
            // A user without subordinate ids has one user and one group in the namespace, and cannot change the groups.
            Err(Errno::EPERM) if has_ids => return Ok(()),
            other => other,
        };
        set.and_then(|()| setresgid(gid, gid, gid))
            .and_then(|()| setresuid(uid, uid, uid))
            .map_err(|error| {
                let what = format!("cannot become the user {} of the image", self.uid);
                match error {
                    Errno::EPERM | Errno::EINVAL => Error::failed(what).because(error).hint(
                        "this needs ids that the caller or the id map of the container does not have: run as \
                         root, add ranges to /etc/subuid and /etc/subgid, or run a command as root of the \
                         container: cowl exec NAME -- CMD",
                    ),
                    other => Error::failed(what).because(other),
                }
            })
    }
}

/// Reads a file of the container; empty if it does not exist.
fn read(root: BorrowedFd<'_>, path: &str) -> Result<String> {
    let at = |error: std::io::Error| Error::at("read", Path::new(path), error);
    let inner = path.trim_start_matches('/').as_bytes();
    let file = match within::open(root, inner, SymlinkPolicy::InTree, OFlags::RDONLY) {
        Ok(OpenedObject::File(file)) => std::fs::File::from(file),
        Ok(OpenedObject::Nothing) => return Ok(String::new()),
        Ok(OpenedObject::Other(_)) => {
            let what = format!("{path} of the container is not a regular file");
            return Err(Error::failed(what));
        }
        Err(error) => return Err(at(error.errno().into())),
    };
    let mut data = Vec::new();
    file.take(MOST + 1).read_to_end(&mut data).map_err(at)?;
    if data.len() as u64 > MOST {
        let what = format!("{path} of the container has more than {MOST} bytes");
        return Err(Error::failed(what).hint("run a command as root: cowl exec NAME -- CMD"));
    }
    // A line that is not UTF-8 does not match a name of the image.
    let lines = data.split(|&byte| byte == b'\n');
    let lines: Vec<_> = lines
        .filter_map(|line| std::str::from_utf8(line).ok())
        .collect();
    Ok(lines.join("\n"))
}

fn find(text: &str, users: &str, groups: &str) -> Result<Identity> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    let unknown = |kind: &str, name: &str, file: &str| {
        let what = format!("the {kind} {} of the image is not in {file}", name.shown());
        Error::failed(what).hint("run a command as root: cowl exec NAME -- CMD")
    };
    let number = parse_id(user);
    let entry = entries(users).find(|entry| {
        let id = entry.get(2).and_then(|id| parse_id(id));
        entry.first() == Some(&user) || (number.is_some() && id == number)
    });
    let field = |at: usize| entry.as_ref().and_then(|entry| entry.get(at).copied());
    let uid = match field(2).and_then(parse_id).or(number) {
        Some(uid) => uid,
        None => return Err(unknown("user", user, "/etc/passwd")),
    };
    let name = field(0).filter(|name| !name.is_empty());
    let mut identity = Identity {
        uid,
        gid: field(3).and_then(parse_id).unwrap_or_default(),
        groups: Vec::new(),
        home: field(5)
            .filter(|home| !home.is_empty())
            .unwrap_or("/")
            .to_owned(),
        name: name.map(str::to_owned),
    };
    let group_id = |entry: &[&str]| entry.get(2).and_then(|id| parse_id(id));
    match group {
        Some(group) => {
            let found = entries(groups).find(|entry| entry.first() == Some(&group));
            let id = found.and_then(|entry| group_id(&entry)).or(parse_id(group));
            identity.gid = id.ok_or_else(|| unknown("group", group, "/etc/group"))?;
        }
        None => {
            let is_member = |entry: &Vec<&str>| {
                let mut members = entry.get(3).into_iter().flat_map(|list| list.split(','));
                name.is_some_and(|name| members.any(|member| member == name))
            };
            let own = entries(groups).filter(is_member);
            identity.groups = own.filter_map(|entry| group_id(&entry)).collect();
        }
    }
    Ok(identity)
}

fn entries(file: &str) -> impl Iterator<Item = Vec<&str>> {
    file.lines().map(|line| line.split(':').collect())
}

fn parse_id(text: &str) -> Option<u32> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let id = is_number.then(|| text.parse().ok())??;
    (id != NO_ID).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd as _;

    #[test]
    fn only_regular_files_of_limited_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let root = std::fs::File::open(dir.path()).unwrap();
        let users = |content: Option<&[u8]>| {
            let path = dir.path().join("etc/passwd");
            std::fs::create_dir_all(dir.path().join("etc")).unwrap();
            match content {
                Some(content) => std::fs::write(&path, content).unwrap(),
                None => std::os::unix::fs::symlink("/dev/zero", &path).unwrap(),
            }
            let found = Identity::resolve(root.as_fd(), "web");
            std::fs::remove_dir_all(dir.path().join("etc")).unwrap();
            found
        };
        let line = b"web:x:7:8::/:\n";
        assert_eq!(users(Some(line)).unwrap().uid, 7);
        let most = usize::try_from(MOST).unwrap();
        let mut long = vec![b'\n'; most];
        long[..line.len()].copy_from_slice(line);
        assert_eq!(users(Some(&long)).unwrap().uid, 7);
        long.push(b'1');
        let error = users(Some(&long)).unwrap_err().to_string();
        assert!(error.contains("more than"), "{error}");
        // The link leads to a file of the container, which does not exist.
        assert!(users(None).is_err());
        std::fs::create_dir_all(dir.path().join("etc/passwd")).unwrap();
        let error = Identity::resolve(root.as_fd(), "7").unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
        std::fs::remove_dir(dir.path().join("etc/passwd")).unwrap();
        let fifo = dir.path().join("etc/passwd");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(Identity::resolve(root.as_fd(), "7").is_err());
    }

    const USERS: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/var/www:\nbad:x:-1:x\n";
    const GROUPS: &str = "root:x:0:\nadm:x:4:web,other\nwww:x:34:\nssl:x:99:web\nbad:x:y:web\n";

    #[test]
    fn users_and_groups_are_names_or_numbers() {
        let ids = |text: &str| {
            let found = find(text, USERS, GROUPS).ok()?;
            Some((found.uid, found.gid, found.groups, found.home))
        };
        let of = |uid, gid, groups: &[u32], home: &str| {
            Some((uid, gid, groups.to_vec(), home.to_owned()))
        };
        assert_eq!(ids("web"), of(33, 34, &[4, 99], "/var/www"));
        assert_eq!(ids("33"), of(33, 34, &[4, 99], "/var/www"));
        assert_eq!(ids("web:"), of(33, 34, &[4, 99], "/var/www"));
        assert_eq!(ids("web:ssl"), of(33, 99, &[], "/var/www"));
        assert_eq!(ids("web:7"), of(33, 7, &[], "/var/www"));
        assert_eq!(ids("1000"), of(1000, 0, &[], "/"));
        assert_eq!(ids("0:0"), of(0, 0, &[], "/root"));
        for unknown in [
            "no",
            "",
            "web:no",
            "-1",
            "4294967295",
            "4294967296",
            "bad",
            "+1",
        ] {
            assert_eq!(ids(unknown), None, "{unknown}");
        }
    }
}
