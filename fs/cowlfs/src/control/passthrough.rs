//! The passthrough that a mount has, and the reason.

use serde::{Deserialize, Serialize};

use crate::config::{Config, Passthrough};
use crate::fuse::PassthroughRefusal;
use cowl_layers::error::Result;
use cowl_layers::sys::{filesystem, kernel, process};
use cowl_overlay::Overlay;

/// The files that the kernel reads and writes without the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassthroughStatus {
    /// The option of the mount.
    pub option: Passthrough,
    /// The choice in effect, which is never [`Passthrough::Auto`].
    pub mode: Passthrough,
    /// The reason, for a message.
    pub reason: String,
}

/// The properties of a mount on which its passthrough depends.
#[derive(Clone, Debug)]
struct Facts {
    option: Passthrough,
    is_privileged: bool,
    refusal: Option<PassthroughRefusal>,
    is_sync: bool,
    /// Whether snapshots can be taken of it.
    has_snapshots: bool,
    /// The name of the file system of the upper layer; `None` if there is no such layer.
    filesystem: Option<&'static str>,
    /// Whether files of the upper layer can share blocks.
    shares_blocks: Result<bool>,
}

/// Returns the passthrough of a mount.
pub(super) fn query(
    overlay: &Overlay,
    config: &Config,
    refusal: Option<PassthroughRefusal>,
) -> PassthroughStatus {
    let upper = overlay.layers().0;
    let name = |fd| filesystem::name(fd).unwrap_or("its file system");
    let facts = Facts {
        option: config.passthrough,
        is_privileged: process::is_initial_admin(),
        refusal,
        is_sync: config.mount.sync,
        has_snapshots: config.snapshots,
        filesystem: upper.as_ref().map(|upper| name(upper.layer.root_fd())),
        shares_blocks: match &upper {
            Some(upper) if config.snapshots => upper.can_share_blocks(),
            _ => Ok(false),
        },
    };
    let (mode, reason) = explain(&facts);
    PassthroughStatus {
        option: facts.option,
        mode,
        reason,
    }
}

/// Returns the choice in effect, and the reason.
fn explain(facts: &Facts) -> (Passthrough, String) {
    use Passthrough::{All, Auto, Off, Read};
    const CHOSEN: &str = "the option of the mount";
    if facts.option == Off {
        return (Off, CHOSEN.to_owned());
    }
    if let Some(why) = impossible(facts) {
        return (Off, why);
    }
    if facts.option == Read {
        return (Read, CHOSEN.to_owned());
    }
    if facts.is_sync {
        let why = "the mount has the option sync, and by passthrough the kernel would not sync each write";
        return (Read, why.to_owned());
    }
    let Some(filesystem) = facts.filesystem else {
        return (Read, "the mount has no upper layer".to_owned());
    };
    match (facts.option, facts.has_snapshots) {
        (Auto, false) => (All, "no snapshot can be taken of this mount".to_owned()),
        (Auto, true) => (
            Read,
            format!(
                "by default, the daemon reads and writes files in the upper layer, so that snapshots never wait for \
                 programs; {}",
                match &facts.shares_blocks {
                    Ok(true) =>
                        format!("{filesystem} shares blocks, so passthrough=all is possible"),
                    Ok(false) =>
                        format!("{filesystem} cannot share blocks, which passthrough=all needs"),
                    Err(error) => format!("whether {filesystem} shares blocks is unknown: {error}"),
                }
            ),
        ),
        (_, false) => (All, CHOSEN.to_owned()),
        (_, true) => (
            All,
            format!(
                "{CHOSEN}; {}",
                match &facts.shares_blocks {
                    Ok(true) =>
                        format!("a snapshot copies open files, and {filesystem} shares blocks"),
                    Ok(false) => format!(
                        "{filesystem} cannot share blocks, so a snapshot fails while files are open for writing, unless \
                         the programs of an LXC container can be stopped"
                    ),
                    Err(error) => format!("whether {filesystem} shares blocks is unknown: {error}"),
                }
            ),
        ),
    }
}

/// Returns why the kernel uses no passthrough on the mount; `None` if it does.
fn impossible(facts: &Facts) -> Option<String> {
    if !facts.is_privileged {
        return Some("the daemon lacks CAP_SYS_ADMIN in the initial user namespace".to_owned());
    }
    Some(match facts.refusal? {
        PassthroughRefusal::Absent => {
            let (major, minor, _) = kernel::version();
            format!(
                "Linux {major}.{minor} does not offer it: Linux 6.9 and later do, with CONFIG_FUSE_PASSTHROUGH"
            )
        }
        PassthroughRefusal::Unsupported => "the kernel refused to register a file".to_owned(),
        PassthroughRefusal::Stacked => {
            "the layers are on a file system that is stacked on another one".to_owned()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cowl_layers::error::{Errno, Error};

    type Change<'a> = &'a dyn Fn(&mut Facts);

    #[test]
    fn the_reason_names_the_property_that_decides() {
        use Passthrough::{All, Auto, Off, Read};
        let usual = Facts {
            option: Auto,
            is_privileged: true,
            refusal: None,
            is_sync: false,
            has_snapshots: true,
            filesystem: Some("ext4"),
            shares_blocks: Ok(false),
        };
        let with = |change: &dyn Fn(&mut Facts)| {
            let mut facts = usual.clone();
            change(&mut facts);
            explain(&facts)
        };
        let cases: [(Change<'_>, Passthrough, &str); 13] = [
            (&|_| {}, Read, "ext4 cannot share blocks"),
            (
                &|f| f.shares_blocks = Ok(true),
                Read,
                "passthrough=all is possible",
            ),
            (
                &|f| f.shares_blocks = Err(Error::Errno(Errno::NOSPC)),
                Read,
                "unknown: ",
            ),
            (
                &|f| f.has_snapshots = false,
                All,
                "no snapshot can be taken",
            ),
            (&|f| f.filesystem = None, Read, "no upper layer"),
            (
                &|f| f.option = All,
                All,
                "unless the programs of an LXC container",
            ),
            (
                &|f| (f.option, f.shares_blocks) = (All, Ok(true)),
                All,
                "ext4 shares blocks",
            ),
            (&|f| (f.option, f.is_sync) = (All, true), Read, "sync"),
            (&|f| f.option = Read, Read, "the option of the mount"),
            (
                &|f| (f.option, f.is_privileged) = (Off, false),
                Off,
                "the option",
            ),
            (&|f| f.is_privileged = false, Off, "CAP_SYS_ADMIN"),
            (
                &|f| f.refusal = Some(PassthroughRefusal::Absent),
                Off,
                "does not offer it",
            ),
            (
                &|f| f.refusal = Some(PassthroughRefusal::Stacked),
                Off,
                "stacked on another",
            ),
        ];
        for (number, (change, mode, words)) in cases.iter().enumerate() {
            let (found, reason) = with(change);
            assert_eq!(found, *mode, "{number}: {reason}");
            assert!(reason.contains(words), "{number}: {reason}");
        }
    }
}
