//! Putting cowl into a system, taking it out again, and packing it: programs, manual, completions, units,
//! the APT hook, folders for hooks.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::run::{Result, Run, failure, note, root, target, title};
use crate::symbols::separate;

/// How `cargo xtask install` is called.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Below which folder programs, manual and units go
    #[arg(long, default_value = "/usr/local", value_name = "DIR")]
    prefix: PathBuf,
    /// The root of the system to install into
    #[arg(long, default_value = "/", value_name = "DIR")]
    destdir: PathBuf,
    /// Make `lxc-snapshot` a link to cowl, which then behaves like it
    #[arg(long)]
    lxc_snapshot: bool,
    /// Install the debug symbols too, in .debug beside the programs
    #[arg(long)]
    debug_symbols: bool,
    /// Install the programs that lie in this folder, and build none
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
}

/// How `cargo xtask uninstall` is called.
#[derive(Debug, clap::Args)]
pub(crate) struct Where {
    /// The prefix that it was installed with
    #[arg(long, default_value = "/usr/local", value_name = "DIR")]
    prefix: PathBuf,
    /// The root of the system
    #[arg(long, default_value = "/", value_name = "DIR")]
    destdir: PathBuf,
}

/// How `cargo xtask dist` is called.
#[derive(Debug, clap::Args)]
pub(crate) struct Dist {
    /// Below which folder programs, manual and units go when it is unpacked at /
    #[arg(long, default_value = "/usr/local", value_name = "DIR")]
    prefix: PathBuf,
    /// Pack the programs that lie in this folder, and build none
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
}

/// The events that have hooks.
const EVENTS: [&str; 4] = ["snapshot", "restore", "rm", "destroy"];

/// Where the state of root's cowl is; units wait for it.
const STATE: &str = "/var/lib/cowl";

/// Renews docs/man.
pub(crate) fn man() -> Result<()> {
    let programs = built("dev")?;
    let folder = root()?.join("docs/man");
    if folder.is_dir() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    Run::new(programs.join("cowl"))
        .args(["man", "--quiet"])
        .arg(folder)
        .run()
}

/// Writes the completion scripts.
pub(crate) fn completions() -> Result<()> {
    let programs = built("dev")?;
    let folder = target()?.join("dist/completions");
    for (shell, name) in SHELLS {
        put(&folder.join(name), &script(&programs, shell)?, 0o644)?;
    }
    note(&format!("the scripts are in {}", folder.display()));
    Ok(())
}

const SHELLS: [(&str, &str); 3] = [("bash", "cowl"), ("zsh", "_cowl"), ("fish", "cowl.fish")];

fn script(programs: &Path, shell: &str) -> Result<String> {
    let output = std::process::Command::new(programs.join("cowl"))
        .args(["completions", shell])
        .stderr(std::process::Stdio::inherit())
        .output()?;
    match String::from_utf8(output.stdout) {
        Ok(text) if output.status.success() => Ok(text),
        _ => failure(format!("`cowl completions {shell}` failed")),
    }
}

/// Builds the programs and says where they are.
fn built(profile: &str) -> Result<PathBuf> {
    Run::cargo()?
        .args(["build", "--locked", "-p", "cowl", "-p", "cowlfs", "--bins"])
        .args(["--profile", profile])
        .run()?;
    let folder = if profile == "dev" { "debug" } else { profile };
    Ok(target()?.join(folder))
}

/// Installs everything.
pub(crate) fn install(options: &Options) -> Result<()> {
    title("install");
    let programs = match &options.programs {
        Some(folder) => std::path::absolute(folder)?,
        None => built("release")?,
    };
    let mut system = System::new(&options.prefix, &options.destdir)?;
    // Found before anything is written: a half-built tree installs nothing.
    let pages = files(&root()?.join("docs/man"))?;
    // Refused where LXC's own program is, so it comes first.
    if options.lxc_snapshot {
        system.link(&options.prefix.join("bin/lxc-snapshot"), "cowl")?;
    }
    for (shell, place) in [
        ("bash", "share/bash-completion/completions/cowl"),
        ("zsh", "share/zsh/site-functions/_cowl"),
        ("fish", "share/fish/vendor_completions.d/cowl.fish"),
    ] {
        let text = script(&programs, shell)?;
        system.put(&options.prefix.join(place), text.as_bytes(), 0o644)?;
    }
    let bin = options.prefix.join("bin");
    let separated = target()?.join("dist/programs");
    for name in ["cowl", "cowlfs"] {
        let separated = separate(&programs.join(name), &separated)?;
        let program = std::fs::read(&separated.program)?;
        system.put(&bin.join(name), &program, 0o755)?;
        if options.debug_symbols {
            let symbols = std::fs::read(&separated.symbols)?;
            let place = bin.join(".debug").join(format!("{name}.debug"));
            system.put(&place, &symbols, 0o644)?;
        }
    }
    note(&format!("debug symbols are in {}", separated.display()));
    let manual = options.prefix.join("share/man/man1");
    for page in pages {
        system.put(&manual.join(name(&page)?), &std::fs::read(&page)?, 0o644)?;
    }
    let dist = root()?.join("snap-cli/dist");
    let units = options.prefix.join("lib/systemd/system");
    for unit in files(&dist.join("systemd"))? {
        let text = system.filled(&unit)?;
        system.put(&units.join(name(&unit)?), text.as_bytes(), 0o644)?;
    }
    // The script before the file that tells apt to run it.
    let apt = system.filled(&dist.join("apt/apt-snapshot"))?;
    let place = options.prefix.join("lib/cowl/apt-snapshot");
    system.put(&place, apt.as_bytes(), 0o755)?;
    let apt = system.filled(&dist.join("apt/80cowl"))?;
    system.put(
        Path::new("/etc/apt/apt.conf.d/80cowl"),
        apt.as_bytes(),
        0o644,
    )?;
    for event in EVENTS {
        for when in ["pre", "post"] {
            system.folder(Path::new(&format!("/etc/cowl/hooks.d/{when}-{event}.d")))?;
        }
    }
    system.settings(&dist.join("config.toml"))?;
    system.remember()?;
    note(&format!("{} files are installed", system.made.len()));
    Ok(())
}

/// Takes away what an install put there.
pub(crate) fn uninstall(place: &Where) -> Result<()> {
    title("uninstall");
    let system = System::new(&place.prefix, &place.destdir)?;
    let list = system.at(&system.list());
    let text = match std::fs::read_to_string(&list) {
        Ok(text) => text,
        Err(error) => {
            return failure(format!(
                "cowl is not installed there: cannot read {}: {error}",
                list.display()
            ));
        }
    };
    // apt's file first: without the script that it names apt would stop.
    let mut places: Vec<&str> = text.lines().collect();
    places.sort_by_key(|place| !place.starts_with("/etc/apt/"));
    for place in &places {
        match std::fs::remove_file(system.at(Path::new(place))) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return failure(format!("cannot remove {place}: {error}"));
            }
            _ => {}
        }
    }
    std::fs::remove_file(&list)?;
    // Folders that hold nothing any more, hooks' folders among them; never one that others use.
    for event in EVENTS {
        for when in ["pre", "post"] {
            system.drop_empty(&format!("/etc/cowl/hooks.d/{when}-{event}.d"))?;
        }
    }
    for folder in ["/etc/cowl/hooks.d", "/etc/cowl"] {
        system.drop_empty(folder)?;
    }
    for folder in ["lib/cowl", "bin/.debug"] {
        system.drop_empty(&place.prefix.join(folder).display().to_string())?;
    }
    note(&format!("{} files were removed", places.len()));
    Ok(())
}

/// Packs what an install puts into a system, with a checksum beside it.
pub(crate) fn dist(options: &Dist) -> Result<()> {
    let stage = tempfile::tempdir()?;
    install(&Options {
        prefix: options.prefix.clone(),
        destdir: stage.path().to_owned(),
        lxc_snapshot: false,
        debug_symbols: false,
        programs: options.programs.clone(),
    })?;
    // Unpacked over a system that has settings it must leave them.
    let settings = stage.path().join("etc/cowl/config.toml");
    std::fs::rename(&settings, settings.with_extension("toml.example"))?;
    title("dist");
    let folder = target()?.join("dist");
    std::fs::create_dir_all(&folder)?;
    let name = format!(
        "cowl-{}-{}.tar.xz",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH
    );
    Run::new("tar")
        .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
        .arg("-C")
        .arg(stage.path())
        .arg("-cJf")
        .arg(folder.join(&name))
        .args(
            files(stage.path())?
                .iter()
                .filter_map(|part| part.file_name()),
        )
        .run()?;
    let line = format!(
        "cd '{}' && sha256sum '{name}' > SHA256SUMS",
        folder.display()
    );
    Run::shell(&line).run()?;
    note(&format!("{} is packed", folder.join(name).display()));
    Ok(())
}

/// A system that is installed into.
struct System {
    prefix: PathBuf,
    destdir: PathBuf,
    made: Vec<PathBuf>,
}

impl System {
    fn new(prefix: &Path, destdir: &Path) -> Result<System> {
        if !prefix.is_absolute() {
            return failure("--prefix must be a path from the root on");
        }
        Ok(System {
            prefix: prefix.to_owned(),
            destdir: std::path::absolute(destdir)?,
            made: Vec::new(),
        })
    }

    /// The list of what was installed.
    fn list(&self) -> PathBuf {
        self.prefix.join("lib/cowl/installed")
    }

    /// Where a path of the system lies now.
    fn at(&self, place: &Path) -> PathBuf {
        self.destdir.join(place.strip_prefix("/").unwrap_or(place))
    }

    fn put(&mut self, place: &Path, bytes: &[u8], mode: u32) -> Result<()> {
        put(&self.at(place), bytes, mode)?;
        self.made.push(place.to_owned());
        Ok(())
    }

    fn link(&mut self, place: &Path, to: &str) -> Result<()> {
        let at = self.at(place);
        match at.symlink_metadata() {
            Ok(meta) if !meta.is_symlink() => {
                return failure(format!(
                    "{} is there and no link: LXC's own? Choose another --prefix",
                    at.display()
                ));
            }
            Ok(_) => std::fs::remove_file(&at)?,
            Err(_) => self.folder(place.parent().unwrap_or(place))?,
        }
        symlink(to, at)?;
        self.made.push(place.to_owned());
        Ok(())
    }

    fn folder(&self, place: &Path) -> Result<()> {
        Ok(std::fs::create_dir_all(self.at(place))?)
    }

    /// The configuration file is the owner's: one that is there stays.
    fn settings(&mut self, sample: &Path) -> Result<()> {
        let place = Path::new("/etc/cowl/config.toml");
        let bytes = std::fs::read(sample)?;
        match std::fs::read(self.at(place)) {
            Ok(there) if there != bytes => {
                note("/etc/cowl/config.toml stays as it is");
                Ok(())
            }
            _ => self.put(place, &bytes, 0o644),
        }
    }

    /// A file of snap-cli/dist with its places filled in.
    fn filled(&self, file: &Path) -> Result<String> {
        Ok(std::fs::read_to_string(file)?
            .replace("@bindir@", &self.prefix.join("bin").display().to_string())
            .replace("@libdir@", &self.prefix.join("lib").display().to_string())
            .replace("@statedir@", STATE))
    }

    fn remember(&mut self) -> Result<()> {
        let mut text = String::new();
        for place in &self.made {
            // One that its owner changes stays when cowl goes.
            if place != Path::new("/etc/cowl/config.toml") {
                text.push_str(&format!("{}\n", place.display()));
            }
        }
        put(&self.at(&self.list()), text.as_bytes(), 0o644)
    }

    fn drop_empty(&self, folder: &str) -> Result<()> {
        use std::io::ErrorKind::{DirectoryNotEmpty, NotFound};
        match std::fs::remove_dir(self.at(Path::new(folder))) {
            Err(error) if !matches!(error.kind(), NotFound | DirectoryNotEmpty) => {
                failure(format!("cannot remove {folder}: {error}"))
            }
            _ => Ok(()),
        }
    }
}

/// Writes a file that replaces another one at once, so that a program that runs is never half-new.
fn put(path: &Path, bytes: impl AsRef<[u8]>, mode: u32) -> Result<()> {
    let folder = path.parent().unwrap_or(path);
    std::fs::create_dir_all(folder)?;
    let file = tempfile::NamedTempFile::new_in(folder)?;
    std::fs::write(file.path(), bytes)?;
    std::fs::set_permissions(file.path(), PermissionsExt::from_mode(mode))?;
    file.persist(path)
        .map_err(|error| crate::run::Failure(format!("{}: {error}", path.display())))?;
    Ok(())
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        found.push(entry?.path());
    }
    found.sort();
    if found.is_empty() {
        return failure(format!("there is nothing in {}", folder.display()));
    }
    Ok(found)
}

fn name(path: &Path) -> Result<&std::ffi::OsStr> {
    path.file_name()
        .ok_or_else(|| crate::run::Failure(format!("{} has no name", path.display())))
}

#[cfg(test)]
#[path = "install_tests.rs"]
mod tests;
