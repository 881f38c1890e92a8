//! Mounts of kernel overlayfs, and whether one writes to a directory.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags};

use super::mount::attach;
use super::proc_path;
use super::users::Device;
use crate::error::{Errno, Error, Result};

/// The size from which the kernel rejects a list of lower layers: one page.
const PAGE: usize = 4096;

/// The namespace of the marker xattrs of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MarkerNames {
    /// `trusted.overlay.`: redirects and metacopies are followed.
    Trusted,
    /// `user.overlay.`: the kernel follows neither.
    User,
}

/// The layers and options of a mount of kernel overlayfs. All layers are directories that are open for reading.
#[derive(Clone, Copy, Debug)]
pub struct OverlayLayers<'a> {
    /// The source in the mount table.
    pub source: &'a str,
    /// The lower layers, topmost first.
    pub lowers: &'a [OwnedFd],
    /// The upper layer.
    pub upper: BorrowedFd<'a>,
    /// The work directory.
    pub work: BorrowedFd<'a>,
    /// The namespace of the marker xattrs.
    pub markers: MarkerNames,
}

/// Whether set-user-ID programs and device nodes have an effect in a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privileges {
    /// They have.
    Honored,
    /// They have not.
    Denied,
}

/// The reason why a mount failed.
#[derive(Debug)]
pub struct Refusal {
    /// The error.
    pub error: Error,
    /// The kernel's message; empty if it sent none.
    pub message: Vec<u8>,
}

/// The way in which layers are passed to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LayerForm {
    /// As descriptors (Linux 6.13). The mount table shows their paths.
    Descriptors,
    /// As paths in /proc, one at a time (Linux 6.7).
    Paths,
    /// The lower layers as one list of paths in /proc, which is limited to a page.
    List,
}

/// The step that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Setting the options.
    Options,
    /// Creating the file system from them.
    Creation,
}

/// Whether an error shows that the kernel does not know a form. Before Linux 6.5, it examined the names of options only
/// when it created the file system, and sent no message.
fn is_unknown(form: LayerForm, stage: Stage, refusal: &Refusal) -> bool {
    const MESSAGES: [&[u8]; 3] = [b"Bad value", b"Unknown parameter", b"Parameter type"];
    let has = |words: &&[u8]| {
        let mut parts = refusal.message.windows(words.len());
        parts.any(|part| part == *words)
    };
    refusal.error.errno() == Errno::INVAL
        && match stage {
            Stage::Options => refusal.message.is_empty() || MESSAGES.iter().any(has),
            Stage::Creation => form == LayerForm::Paths && refusal.message.is_empty(),
        }
}

/// A mount of kernel overlayfs that is not attached to the tree yet.
#[derive(Debug)]
pub struct PreparedOverlay {
    mount: OwnedFd,
}

impl PreparedOverlay {
    /// Creates the file system. From now on, the kernel considers the upper layer to be in use.
    pub fn new(layers: OverlayLayers<'_>, privileges: Privileges) -> Result<Self, Refusal> {
        let attributes = match privileges {
            Privileges::Honored => MountAttrFlags::empty(),
            Privileges::Denied => {
                MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV
            }
        };
        for form in [LayerForm::Descriptors, LayerForm::Paths] {
            match Self::with_form(layers, attributes, form) {
                Err((stage, refusal)) if is_unknown(form, stage, &refusal) => {}
                done => return done.map_err(|(_, refusal)| refusal),
            }
        }
        Self::with_form(layers, attributes, LayerForm::List).map_err(|(_, refusal)| refusal)
    }

    fn with_form(
        layers: OverlayLayers<'_>,
        attributes: MountAttrFlags,
        form: LayerForm,
    ) -> Result<Self, (Stage, Refusal)> {
        let silent = |error: Error| Refusal {
            error,
            message: Vec::new(),
        };
        let context = open_context().map_err(|error| (Stage::Options, silent(error)))?;
        let explained = |error: Error| Refusal {
            error,
            message: read_message(&context),
        };
        configure(&context, layers, form).map_err(|error| (Stage::Options, explained(error)))?;
        let create = || {
            rustix::mount::fsconfig_create(context.as_fd())?;
            let flags = FsMountFlags::FSMOUNT_CLOEXEC;
            rustix::mount::fsmount(context.as_fd(), flags, attributes)
        };
        match create() {
            Ok(mount) => Ok(Self { mount }),
            Err(error) => Err((Stage::Creation, explained(error.into()))),
        }
    }

    /// Returns the device number, which identifies the file system.
    pub fn device(&self) -> Result<Device> {
        Device::from_fd(&self.mount)
    }

    /// Attaches the mount at a path.
    pub fn attach(&self, at: &Path) -> Result<()> {
        attach(&self.mount, at)
    }
}

/// Whether a kernel overlayfs in any mount namespace writes to `upper`, including one that is unmounted but still in
/// use.
///
/// This asks the kernel to mount the directory as the upper layer and the work directory at once. It rejects that in any
/// case: with EBUSY if the directory is in use, and only then with EINVAL. Nothing is created. A kernel without
/// overlayfs has no such mount.
///
/// Returns `true` as well if the kernel would fail with EINVAL before it looks: if the mount of `upper` is read-only,
/// unbindable or in another mount namespace, so that the kernel cannot clone it.
pub fn is_in_use(upper: BorrowedFd<'_>) -> Result<bool> {
    if super::stat::is_read_only(upper) {
        return Ok(true);
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    match rustix::mount::open_tree(upper, "", flags) {
        Err(Errno::INVAL) => return Ok(true),
        other => drop(other?),
    }
    let context = match open_context() {
        Ok(context) => context,
        Err(error) if error.errno() == Errno::NODEV => return Ok(false),
        Err(error) => return Err(error),
    };
    for key in ["lowerdir", "upperdir", "workdir"] {
        set_path(&context, key, upper)?;
    }
    set(&context, "index", "on")?;
    match rustix::mount::fsconfig_create(context.as_fd()) {
        Err(Errno::BUSY) => Ok(true),
        Ok(()) | Err(Errno::INVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn open_context() -> Result<OwnedFd> {
    Ok(rustix::mount::fsopen(
        "overlay",
        FsOpenFlags::FSOPEN_CLOEXEC,
    )?)
}

fn configure(context: &OwnedFd, layers: OverlayLayers<'_>, form: LayerForm) -> Result<()> {
    set(context, "source", layers.source)?;
    let one = |key: &str, dir: BorrowedFd<'_>| match form {
        LayerForm::Descriptors => Ok(rustix::mount::fsconfig_set_fd(context.as_fd(), key, dir)?),
        LayerForm::Paths | LayerForm::List => set_path(context, key, dir),
    };
    one("upperdir", layers.upper)?;
    one("workdir", layers.work)?;
    if form == LayerForm::List {
        let paths = layers.lowers.iter().map(|dir| proc_path(dir.as_fd()));
        let list = paths.collect::<Vec<_>>().join(&b':');
        if list.len() >= PAGE {
            return Err(Errno::TOOBIG.into());
        }
        set_bytes(context, "lowerdir", list)?;
    } else {
        for dir in layers.lowers {
            one("lowerdir+", dir.as_fd())?;
        }
    }
    // A module parameter may have enabled what the other options exclude.
    set(context, "nfs_export", "off")?;
    set(context, "index", "on")?;
    match layers.markers {
        MarkerNames::Trusted => {
            set(context, "redirect_dir", "on")?;
            set(context, "metacopy", "on")
        }
        MarkerNames::User => Ok(rustix::mount::fsconfig_set_flag(
            context.as_fd(),
            "userxattr",
        )?),
    }
}

fn set(context: &OwnedFd, key: &str, value: &str) -> Result<()> {
    set_bytes(context, key, value.as_bytes().to_vec())
}

fn set_path(context: &OwnedFd, key: &str, dir: BorrowedFd<'_>) -> Result<()> {
    set_bytes(context, key, proc_path(dir).to_vec())
}

fn set_bytes(context: &OwnedFd, key: &str, value: Vec<u8>) -> Result<()> {
    let value = CString::new(value).map_err(|_| Errno::INVAL)?;
    Ok(rustix::mount::fsconfig_set_string(
        context.as_fd(),
        key,
        value,
    )?)
}

/// Returns the first message that the kernel wrote to a file system context, without its severity.
fn read_message(context: &OwnedFd) -> Vec<u8> {
    let mut buffer = [0_u8; 512];
    // ENODATA: there is no message.
    let length = rustix::io::read(context, &mut buffer).unwrap_or(0);
    let text = buffer.get(..length).unwrap_or_default().trim_ascii_end();
    let text = text.strip_prefix(b"e ").unwrap_or(text);
    text.to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::dir::open_dir_to_read;

    struct Dirs {
        _scratch: tempfile::TempDir,
        lowers: Vec<OwnedFd>,
        upper: OwnedFd,
        work: OwnedFd,
    }

    fn dirs() -> Dirs {
        let scratch = tempfile::tempdir().unwrap();
        let open = |name: &str| {
            std::fs::create_dir(scratch.path().join(name)).unwrap();
            let dir = std::fs::File::open(scratch.path()).unwrap();
            open_dir_to_read(dir.as_fd(), name.as_bytes()).unwrap()
        };
        let lowers = vec![open("one,two:three\\"), open("l2")];
        let (upper, work) = (open("u:,"), open("w"));
        Dirs {
            lowers,
            upper,
            work,
            _scratch: scratch,
        }
    }

    #[test]
    fn a_mounted_upper_layer_is_in_use_in_every_form() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        for form in [LayerForm::Descriptors, LayerForm::Paths, LayerForm::List] {
            let dirs = dirs();
            let layers = OverlayLayers {
                source: "test",
                lowers: &dirs.lowers,
                upper: dirs.upper.as_fd(),
                work: dirs.work.as_fd(),
                markers: MarkerNames::Trusted,
            };
            assert!(!is_in_use(layers.upper).unwrap());
            let attributes = MountAttrFlags::empty();
            let mount = match PreparedOverlay::with_form(layers, attributes, form) {
                Ok(mount) => mount,
                // Another kernel, or no privilege.
                Err(_) if form == LayerForm::Descriptors => return,
                Err((_, refusal)) => panic!("{form:?}: {refusal:?}"),
            };
            assert!(is_in_use(layers.upper).unwrap(), "{form:?}");
            assert!(mount.device().unwrap().minor > 0);
            drop(mount);
            assert!(!is_in_use(layers.upper).unwrap(), "{form:?}");
        }
    }

    #[test]
    fn messages_about_options_lead_to_the_next_form() {
        let refused = |error: Errno, message: &[u8]| Refusal {
            error: error.into(),
            message: message.to_vec(),
        };
        let (descriptors, paths) = (LayerForm::Descriptors, LayerForm::Paths);
        let (options, creation) = (Stage::Options, Stage::Creation);
        let bad = b"overlay: Bad value for 'upperdir'";
        let unknown = b"overlay: Unknown parameter 'lowerdir+'";
        let unsuitable = b"overlay: filesystem on /a not supported as upperdir";
        for (form, stage, refusal, expected) in [
            (descriptors, options, refused(Errno::INVAL, bad), true),
            (
                descriptors,
                options,
                refused(Errno::INVAL, unsuitable),
                false,
            ),
            (descriptors, creation, refused(Errno::INVAL, b""), false),
            (descriptors, options, refused(Errno::PERM, b""), false),
            (paths, options, refused(Errno::INVAL, unknown), true),
            (paths, creation, refused(Errno::INVAL, b""), true),
            (paths, creation, refused(Errno::BUSY, b""), false),
        ] {
            assert_eq!(is_unknown(form, stage, &refusal), expected, "{refusal:?}");
        }
    }

    #[test]
    fn a_list_that_is_longer_than_a_page_is_refused() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let mut dirs = dirs();
        let copy = |fd: &OwnedFd| fd.try_clone().unwrap();
        dirs.lowers = (0..300).map(|_| copy(&dirs.work)).collect();
        let context = open_context().unwrap();
        let layers = OverlayLayers {
            source: "test",
            lowers: &dirs.lowers,
            upper: dirs.upper.as_fd(),
            work: dirs.work.as_fd(),
            markers: MarkerNames::Trusted,
        };
        let error = configure(&context, layers, LayerForm::List).unwrap_err();
        assert_eq!(error.errno(), Errno::TOOBIG);
    }
}
