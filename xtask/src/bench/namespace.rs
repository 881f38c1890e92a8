//! Namespaces of a plain user, in which a file system is mounted and used as by rootless podman: without privileges
//! outside of them.
//!
//! The user has 65,536 ids that no user of this machine has. A process holds the namespaces open until its standard
//! input is closed, so everything that is mounted in them disappears with this program, even if it is killed.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::task::{Task, printed_time};
use crate::run::{Failure, Result, Run, failure};

/// First id of the user.
const FIRST_ID: u32 = 1_900_000_000;
/// Number of its ids.
const IDS: u32 = 65_536;

/// Becomes the user `$2` in new namespaces. `$1` is a directory that the user can enter.
///
/// The mounts of other programs are detached: these copies of them would hold their daemons and loop devices in use.
const BECOME: &str = r#"
dir=$1 user=$2
findmnt -rn -o TARGET,FSTYPE,SOURCE | tac | while read -r target type source; do
    case $target in /|"$dir"|"$dir"/*) continue;; esac
    case $type:$source in fuse.*|overlay:*|*:/dev/loop*) umount -l "$target" || :;; esac
done
mknod -m 666 "$dir/fuse" c 10 229
mount --bind "$dir/fuse" /dev/fuse
exec setpriv --reuid "$user" --regid "$user" --clear-groups unshare --user --mount \
    sh -c 'echo ready; read -r line || :'
"#;

/// Namespaces of a plain user, which end when this is dropped.
#[derive(Debug)]
pub(super) struct UserNamespace {
    holder: Child,
    /// Directory of programs that the user can execute.
    programs: PathBuf,
}

impl UserNamespace {
    /// Creates namespaces for a user that can enter the directory `dir`, with copies of these programs.
    pub(super) fn new(dir: &Path, programs: &[&Path]) -> Result<Self> {
        use std::os::unix::fs::PermissionsExt as _;
        let enter = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        };
        enter(dir, 0o711)?;
        let copies = dir.join("programs");
        std::fs::create_dir_all(&copies)?;
        for program in programs {
            let copy = copies.join(name(program)?);
            std::fs::copy(program, &copy)
                .map_err(|error| Failure(format!("cannot copy {}: {error}", program.display())))?;
            enter(&copy, 0o755)?;
        }
        let mut holder = Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-euc",
                BECOME,
                "sh",
            ])
            .arg(dir)
            .arg(FIRST_ID.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| Failure(format!("cannot start unshare: {error}")))?;
        let mut ready = [0; 6];
        let heard = match holder.stdout.as_mut() {
            Some(out) => out.read_exact(&mut ready),
            None => Ok(()),
        };
        // From here on, dropping it ends the process.
        let namespace = Self {
            holder,
            programs: copies,
        };
        if heard.is_err() {
            return failure("a plain user cannot create a user namespace on this machine");
        }
        let map = format!("0 {FIRST_ID} {IDS}");
        for file in ["uid_map", "gid_map"] {
            let path = format!("/proc/{}/{file}", namespace.holder.id());
            std::fs::write(&path, &map)
                .map_err(|error| Failure(format!("cannot write {path}: {error}")))?;
        }
        Ok(namespace)
    }

    /// Makes the user's root the owner of everything at or below `path`.
    pub(super) fn own(path: &Path) -> Result<()> {
        Run::new("chown")
            .args(["-R", "-h", &format!("{FIRST_ID}:{FIRST_ID}")])
            .arg(path)
            .unseen()
            .run()
    }

    /// Returns a command that runs the copy of `program` in the namespaces, in the directory `dir`, as their root. It
    /// ends with this program; a daemon that it starts ends with the namespaces.
    pub(super) fn command(&self, program: &Path, dir: &Path) -> Result<Command> {
        let copy = self.programs.join(name(program)?);
        let mut command = Command::new("nsenter");
        command
            .args([
                "--user",
                "--mount",
                "--target",
                &self.holder.id().to_string(),
            ])
            .args([
                "sh",
                "-c",
                "cd \"$0\" && exec setpriv --pdeathsig KILL \"$@\"",
            ])
            .arg(dir)
            .arg(if copy.is_file() { &copy } else { program });
        Ok(command)
    }

    /// Performs a task in the namespaces. `own` is this program.
    pub(super) fn perform(&self, own: &Path, task: &Task) -> Result<Duration> {
        let mut command = self.command(own, Path::new("/"))?;
        let output = command
            .args(task.arguments()?)
            .stdin(Stdio::null())
            .output()?;
        let text = output
            .stdout
            .escape_ascii()
            .to_string()
            .replace("\\n", "\n");
        match output.status.success() {
            true => printed_time(text.trim_end()),
            false => failure(format!(
                "{}: {text}{}",
                output.status,
                output.stderr.trim_ascii().escape_ascii()
            )),
        }
    }

    /// Unmounts a file system in the namespaces.
    pub(super) fn unmount(&self, mount_point: &Path) -> Result<()> {
        let mut command = self.command(Path::new("umount"), Path::new("/"))?;
        let output = command.arg(mount_point).stdin(Stdio::null()).output()?;
        match output.status.success() {
            true => Ok(()),
            false => failure(output.stderr.trim_ascii().escape_ascii().to_string()),
        }
    }
}

impl Drop for UserNamespace {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        // The holder ends at once, because its input is closed. An error means that it has ended before.
        drop(self.holder.wait());
    }
}

fn name(program: &Path) -> Result<&std::ffi::OsStr> {
    let name = program.file_name();
    name.ok_or_else(|| Failure(format!("{} is no program", program.display())))
}
