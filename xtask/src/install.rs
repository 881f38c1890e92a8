//! Installs, uninstalls and packs cowl: programs, manual, completions, units, the APT hook, directories for
//! hooks.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::run::{Result, Run, failure, note, root, target, title};
use crate::symbols::separate;

/// The options of `cargo xtask install`.
#[derive(Debug, clap::Args)]
pub(crate) struct InstallOptions {
    /// Install programs, manual and units below this directory
    #[arg(long, default_value = "/usr/local", value_name = "DIR")]
    pub(crate) prefix: PathBuf,
    /// Use this directory as the root of the system
    #[arg(long, default_value = "/", value_name = "DIR")]
    pub(crate) destdir: PathBuf,
    /// Make `lxc-snapshot` a link to cowl, which then behaves like it
    #[arg(long)]
    pub(crate) lxc_snapshot: bool,
    /// Install the debug symbols too, in .debug next to the programs
    #[arg(long)]
    pub(crate) debug_symbols: bool,
    /// Install the programs from this directory instead of building them
    #[arg(long, value_name = "DIR")]
    pub(crate) programs: Option<PathBuf>,
}

/// The options of `cargo xtask uninstall`.
#[derive(Debug, clap::Args)]
pub(crate) struct UninstallOptions {
    /// The prefix of the installation
    #[arg(long, default_value = "/usr/local", value_name = "DIR")]
    prefix: PathBuf,
    /// Use this directory as the root of the system
    #[arg(long, default_value = "/", value_name = "DIR")]
    destdir: PathBuf,
}

/// Where the files of an installation belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// An installation that `uninstall` can remove.
    Local,
    /// The content of a Debian package: dpkg knows the files, and a script creates the empty directories.
    Debian,
}

/// The programs.
pub(crate) const PROGRAMS: [&str; 3] = ["cowl", "cowlfs", "cowl-snapshotter"];

/// The events that have hooks.
const EVENTS: [&str; 4] = ["snapshot", "restore", "rm", "destroy"];

/// The directory of root's store, which units wait for.
const STATE_DIR: &str = "/var/lib/cowl";

/// Regenerates docs/man.
pub(crate) fn man() -> Result<()> {
    let programs = build_programs("dev")?;
    let dir = root()?.join("docs/man");
    if dir.is_dir() {
        std::fs::remove_dir_all(&dir)?;
    }
    std::fs::create_dir_all(&dir)?;
    Run::new(programs.join("cowl"))
        .args(["man", "--quiet"])
        .arg(&dir)
        .run()?;
    let page = Run::new(programs.join("cowl-snapshotter"))
        .arg("--man-page")
        .output()?;
    write_file(&dir.join("cowl-snapshotter.1"), format!("{page}\n"), 0o644)
}

/// Writes the completion scripts to the target directory.
pub(crate) fn completions() -> Result<()> {
    let programs = build_programs("dev")?;
    let dir = target()?.join("dist/completions");
    for (shell, name) in COMPLETIONS {
        write_file(
            &dir.join(name),
            &completion_script(&programs, shell)?,
            0o644,
        )?;
    }
    note(&format!("the scripts are in {}", dir.display()));
    Ok(())
}

/// The shells with completions, each with the name of its script.
const COMPLETIONS: [(&str, &str); 3] = [("bash", "cowl"), ("zsh", "_cowl"), ("fish", "cowl.fish")];

/// Returns the completion script for a shell.
fn completion_script(programs: &Path, shell: &str) -> Result<String> {
    let output = std::process::Command::new(programs.join("cowl"))
        .args(["completions", shell])
        .stderr(std::process::Stdio::inherit())
        .output()?;
    match String::from_utf8(output.stdout) {
        Ok(text) if output.status.success() => Ok(text),
        _ => failure(format!("`cowl completions {shell}` failed")),
    }
}

/// Builds the programs, and returns their directory.
pub(crate) fn build_programs(profile: &str) -> Result<PathBuf> {
    Run::cargo()?
        .args(["build", "--locked", "-p", "cowl", "-p", "cowlfs"])
        .args(["-p", "cowl-snapshotter", "--bins"])
        .args(["--profile", profile])
        .run()?;
    let dir = if profile == "dev" { "debug" } else { profile };
    Ok(target()?.join(dir))
}

/// Installs everything.
pub(crate) fn install(options: &InstallOptions) -> Result<()> {
    title("install");
    let programs = match &options.programs {
        Some(dir) => std::path::absolute(dir)?,
        None => build_programs("release")?,
    };
    let separated = target()?.join("dist/programs");
    place(options, &programs, &separated, Layout::Local)?;
    note(&format!("debug symbols are in {}", separated.display()));
    Ok(())
}

/// Installs everything, with the programs of the directory `programs`. Writes the programs and their symbols apart to
/// the directory `separated`.
pub(crate) fn place(
    options: &InstallOptions,
    programs: &Path,
    separated: &Path,
    layout: Layout,
) -> Result<()> {
    let mut system = System::new(&options.prefix, &options.destdir)?;
    // Find the pages before anything is written, so that an incomplete tree installs nothing.
    let pages = files(&root()?.join("docs/man"))?;
    // This fails if LXC's own program exists, so it comes first.
    if options.lxc_snapshot {
        system.link(&options.prefix.join("bin/lxc-snapshot"), "cowl")?;
    }
    let zsh = match layout {
        Layout::Local => "share/zsh/site-functions/_cowl",
        Layout::Debian => "share/zsh/vendor-completions/_cowl",
    };
    for (shell, path) in [
        ("bash", "share/bash-completion/completions/cowl"),
        ("zsh", zsh),
        ("fish", "share/fish/vendor_completions.d/cowl.fish"),
    ] {
        let text = completion_script(programs, shell)?;
        system.install_file(&options.prefix.join(path), text.as_bytes(), 0o644)?;
    }
    let bin = options.prefix.join("bin");
    for program in PROGRAMS {
        let separated = separate(&programs.join(program), separated)?;
        let bytes = std::fs::read(&separated.program)?;
        system.install_file(&bin.join(program), &bytes, 0o755)?;
        if options.debug_symbols {
            let path = bin.join(".debug").join(name(&separated.symbols)?);
            system.install_file(&path, &std::fs::read(&separated.symbols)?, 0o644)?;
        }
    }
    // mount(8) searches helpers in /sbin only, which is a link to /usr/sbin in every release with this package.
    match layout {
        Layout::Local => system.link(
            Path::new("/sbin/mount.cowl"),
            &bin.join("cowl").display().to_string(),
        )?,
        Layout::Debian => system.link(Path::new("/usr/sbin/mount.cowl"), "../bin/cowl")?,
    }
    let template = options.prefix.join("share/lxc/templates/lxc-cowl");
    let text = std::fs::read(root()?.join("snap-cli/dist/lxc/lxc-cowl"))?;
    system.install_file(&template, &text, 0o755)?;
    // lxc-create searches templates there only.
    let searched = Path::new("/usr/share/lxc/templates/lxc-cowl");
    if template != searched {
        system.link(searched, &template.display().to_string())?;
    }
    let manual = options.prefix.join("share/man/man1");
    for page in pages {
        system.install_file(&manual.join(name(&page)?), &std::fs::read(&page)?, 0o644)?;
    }
    let dist = root()?.join("snap-cli/dist");
    let units = options.prefix.join("lib/systemd/system");
    for unit in files(&dist.join("systemd"))? {
        let text = system.fill_template(&unit)?;
        system.install_file(&units.join(name(&unit)?), text.as_bytes(), 0o644)?;
    }
    // Install the script before the file that makes apt run it.
    let apt = system.fill_template(&dist.join("apt/apt-snapshot"))?;
    let path = options.prefix.join("lib/cowl/apt-snapshot");
    system.install_file(&path, apt.as_bytes(), 0o755)?;
    let apt = system.fill_template(&dist.join("apt/80cowl"))?;
    system.install_file(
        Path::new("/etc/apt/apt.conf.d/80cowl"),
        apt.as_bytes(),
        0o644,
    )?;
    system.install_config(&dist.join("config.toml"))?;
    if layout == Layout::Local {
        for event in EVENTS {
            for when in ["pre", "post"] {
                system.create_dir(Path::new(&format!("/etc/cowl/hooks.d/{when}-{event}.d")))?;
            }
        }
        system.write_list()?;
    }
    note(&format!("installed {} files", system.installed.len()));
    Ok(())
}

/// Removes the files of an installation.
pub(crate) fn uninstall(options: &UninstallOptions) -> Result<()> {
    title("uninstall");
    let system = System::new(&options.prefix, &options.destdir)?;
    let list = system.locate(&system.list());
    let text = match std::fs::read_to_string(&list) {
        Ok(text) => text,
        Err(error) => {
            return failure(format!(
                "cowl is not installed there: cannot read {}: {error}",
                list.display()
            ));
        }
    };
    // Remove apt's file first: without the script that it names, apt would fail.
    let mut paths: Vec<&str> = text.lines().collect();
    paths.sort_by_key(|path| !path.starts_with("/etc/apt/"));
    for path in &paths {
        match std::fs::remove_file(system.locate(Path::new(path))) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return failure(format!("cannot remove {path}: {error}"));
            }
            _ => {}
        }
    }
    std::fs::remove_file(&list)?;
    // Remove empty directories, including those of hooks, but none that other packages use.
    for event in EVENTS {
        for when in ["pre", "post"] {
            system.remove_if_empty(&format!("/etc/cowl/hooks.d/{when}-{event}.d"))?;
        }
    }
    for dir in ["/etc/cowl/hooks.d", "/etc/cowl"] {
        system.remove_if_empty(dir)?;
    }
    for dir in ["lib/cowl", "bin/.debug"] {
        system.remove_if_empty(&options.prefix.join(dir).display().to_string())?;
    }
    note(&format!("removed {} files", paths.len()));
    Ok(())
}

/// The system of an installation.
struct System {
    prefix: PathBuf,
    destdir: PathBuf,
    installed: Vec<PathBuf>,
}

impl System {
    fn new(prefix: &Path, destdir: &Path) -> Result<System> {
        if !prefix.is_absolute() {
            return failure("--prefix must be an absolute path");
        }
        Ok(System {
            prefix: prefix.to_owned(),
            destdir: std::path::absolute(destdir)?,
            installed: Vec::new(),
        })
    }

    /// Returns the path of the list of installed files.
    fn list(&self) -> PathBuf {
        self.prefix.join("lib/cowl/installed")
    }

    /// Returns the path below destdir for a path of the system.
    fn locate(&self, path: &Path) -> PathBuf {
        self.destdir.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn install_file(&mut self, path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
        write_file(&self.locate(path), bytes, mode)?;
        self.installed.push(path.to_owned());
        Ok(())
    }

    fn link(&mut self, path: &Path, target: &str) -> Result<()> {
        let at = self.locate(path);
        match at.symlink_metadata() {
            Ok(meta) if !meta.is_symlink() => {
                return failure(format!(
                    "{} exists and is not a symbolic link, it may belong to a package: remove that, or choose another --prefix",
                    at.display()
                ));
            }
            Ok(_) => std::fs::remove_file(&at)?,
            Err(_) => self.create_dir(path.parent().unwrap_or(path))?,
        }
        symlink(target, at)?;
        self.installed.push(path.to_owned());
        Ok(())
    }

    fn create_dir(&self, path: &Path) -> Result<()> {
        Ok(std::fs::create_dir_all(self.locate(path))?)
    }

    /// Installs the configuration file.
    ///
    /// An existing one that differs is not changed.
    fn install_config(&mut self, sample: &Path) -> Result<()> {
        let path = Path::new("/etc/cowl/config.toml");
        let bytes = std::fs::read(sample)?;
        match std::fs::read(self.locate(path)) {
            Ok(existing) if existing != bytes => {
                note("/etc/cowl/config.toml is not changed");
                Ok(())
            }
            _ => self.install_file(path, &bytes, 0o644),
        }
    }

    /// Returns a file of snap-cli/dist with its placeholders replaced.
    fn fill_template(&self, file: &Path) -> Result<String> {
        Ok(std::fs::read_to_string(file)?
            .replace("@bindir@", &self.prefix.join("bin").display().to_string())
            .replace("@libdir@", &self.prefix.join("lib").display().to_string())
            .replace("@statedir@", STATE_DIR))
    }

    /// Writes the list of installed files.
    fn write_list(&mut self) -> Result<()> {
        let mut text = String::new();
        for path in &self.installed {
            // The configuration file belongs to the user, and is not removed.
            if path != Path::new("/etc/cowl/config.toml") {
                text.push_str(&format!("{}\n", path.display()));
            }
        }
        write_file(&self.locate(&self.list()), text.as_bytes(), 0o644)
    }

    fn remove_if_empty(&self, dir: &str) -> Result<()> {
        use std::io::ErrorKind::{DirectoryNotEmpty, NotFound};
        match std::fs::remove_dir(self.locate(Path::new(dir))) {
            Err(error) if !matches!(error.kind(), NotFound | DirectoryNotEmpty) => {
                failure(format!("cannot remove {dir}: {error}"))
            }
            _ => Ok(()),
        }
    }
}

/// Writes a file atomically, so that a running program is never half replaced.
pub(crate) fn write_file(path: &Path, bytes: impl AsRef<[u8]>, mode: u32) -> Result<()> {
    let dir = path.parent().unwrap_or(path);
    std::fs::create_dir_all(dir)?;
    let file = tempfile::NamedTempFile::new_in(dir)?;
    std::fs::write(file.path(), bytes)?;
    std::fs::set_permissions(file.path(), PermissionsExt::from_mode(mode))?;
    file.persist(path).map_err(|error| {
        crate::run::Failure(format!("cannot write {}: {error}", path.display()))
    })?;
    Ok(())
}

/// Returns the paths in a directory, sorted.
///
/// Fails if there are none.
pub(crate) fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        found.push(entry?.path());
    }
    found.sort();
    if found.is_empty() {
        return failure(format!("{} is empty", dir.display()));
    }
    Ok(found)
}

fn name(path: &Path) -> Result<&std::ffi::OsStr> {
    path.file_name()
        .ok_or_else(|| crate::run::Failure(format!("{} has no file name", path.display())))
}

#[cfg(test)]
#[path = "install_tests.rs"]
mod tests;
