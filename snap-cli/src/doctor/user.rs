//! What a plain user needs: user namespaces, ranges of ids, and the programs that map them.

use std::process::{Command, Stdio};

use super::Finding;
use crate::error::{Error, Result};
use crate::host::programs::find;
use crate::host::rootless::{self, Caller};

pub(super) fn examine(entered: &Result<()>) -> Vec<Finding> {
    let namespace = match entered {
        Err(error) => refused(error),
        Ok(()) if rootless::has_entered() => entered_namespace(),
        Ok(()) => namespaces(),
    };
    vec![namespace, ranges(), fusermount()]
}

/// Describes the namespace that the commands of a plain user enter.
fn entered_namespace() -> Finding {
    let ids = rootless::describe_ids();
    let ids = ids.unwrap_or_else(|error| error.to_string());
    Finding::works(
        "user-namespaces",
        format!("commands run in a namespace with {ids}"),
    )
}

fn refused(error: &Error) -> Finding {
    let finding = Finding::broken("user-namespaces", error.to_string());
    match &error.hint {
        Some(hint) => finding.remedy(hint.clone()),
        None => finding,
    }
}

fn namespaces() -> Finding {
    let Some(unshare) = find("unshare") else {
        return Finding::absent("user-namespaces", "unshare(1) is not installed")
            .remedy("apt install util-linux");
    };
    let tried = Command::new(unshare)
        .args(["--user", "--map-root-user", "--mount", "true"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match tried {
        Ok(status) if status.success() => {
            Finding::works("user-namespaces", "user namespaces can be created")
        }
        _ => Finding::limited(
            "user-namespaces",
            "no user namespace can be created",
            "plain users cannot mount containers",
        )
        .remedy(
            "as root: sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000 \
             kernel.apparmor_restrict_unprivileged_userns=0 (those that exist)",
        ),
    }
}

fn ranges() -> Finding {
    let caller = Caller::get();
    let (uid, name) = (caller.uid, caller.name());
    let has_range = |file: &str| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        text.lines().any(|line| {
            let owner = line.split(':').next().unwrap_or_default();
            owner == uid.to_string() || name.as_deref() == Some(owner)
        })
    };
    let shown = name.clone().unwrap_or_else(|| uid.to_string());
    let cost = "unprivileged containers have one user id only";
    if !has_range("/etc/subuid") || !has_range("/etc/subgid") {
        let remedy = format!(
            "as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {shown}"
        );
        let detail = format!("{shown} has no range in /etc/subuid and /etc/subgid");
        return Finding::limited("id-ranges", detail, cost).remedy(remedy);
    }
    if find("newuidmap").is_none() || find("newgidmap").is_none() {
        let detail = "newuidmap and newgidmap are not installed";
        return Finding::limited("id-ranges", detail, cost).remedy("apt install uidmap");
    }
    Finding::works(
        "id-ranges",
        format!("{shown} has ranges of user and group ids"),
    )
}

fn fusermount() -> Finding {
    match find("fusermount3") {
        Some(_) => Finding::works("fusermount3", "installed"),
        None => Finding::absent(
            "fusermount3",
            "not installed; only other FUSE programs need it",
        )
        .remedy("apt install fuse3"),
    }
}
