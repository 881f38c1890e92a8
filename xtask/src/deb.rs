//! Builds Debian packages with cargo-deb: `cowl`, and `cowl-dbgsym` with the symbols.
//!
//! cargo-deb takes its metadata from snap-cli/Cargo.toml. Its assets are a staged installation, so that a package
//! contains what `cargo xtask install` installs.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::install::{InstallOptions, Layout, PROGRAMS, files, place, write_file};
use crate::run::{Failure, Result, Run, root, target};

/// The version of cargo-deb.
const CARGO_DEB: &str = "3.8.0";

/// The packages: variants of the metadata in snap-cli/Cargo.toml.
const VARIANTS: [&str; 2] = ["cowl", "cowl-dbgsym"];

/// The options of the Debian packages.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct DebOptions {
    /// The version of the Debian packages, if it is not that of the programs with the revision 1
    #[arg(long, value_name = "VERSION")]
    deb_version: Option<String>,
    /// The maintainer of the Debian packages, `NAME <ADDRESS>`; by default that of snap-cli/Cargo.toml
    #[arg(long, value_name = "NAME")]
    maintainer: Option<String>,
}

/// The compression of what is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Best,
    /// For tests.
    Fast,
}

/// Builds the packages in the directory `output`, and returns the names of their files.
pub(crate) fn build(
    options: &DebOptions,
    programs: &Path,
    compression: Compression,
    output: &Path,
) -> Result<Vec<String>> {
    let cargo_deb = tool()?;
    let maintainer = match &options.maintainer {
        Some(name) => name.clone(),
        None => maintainer()?,
    };
    let version = match &options.deb_version {
        Some(version) => version.clone(),
        None => format!("{}-1", env!("CARGO_PKG_VERSION")),
    };
    let stage = tempfile::tempdir()?;
    // The assets begin with target/release, which cargo-deb replaces by a directory of `CARGO_TARGET_DIR`.
    let dir = stage.path().join("release");
    stage_package(&dir, programs, &version, &maintainer)?;
    let mut names = Vec::new();
    for variant in VARIANTS {
        let name = format!("{variant}_{version}_{}.deb", architecture()?);
        let mut run = Run::new(&cargo_deb)
            .within(&root()?)
            .env("CARGO_TARGET_DIR", stage.path())
            .args(["--package", "cowl", "--variant", variant, "--locked"])
            .args(["--no-build", "--no-strip", "--compress-system"])
            .args(["--deb-version", &version, "--maintainer", &maintainer])
            .arg("--output")
            .arg(output.join(&name));
        // The time of every file, so that equal programs give equal packages.
        if let Some(time) = commit_time("%ct")? {
            run = run.env("SOURCE_DATE_EPOCH", time);
        }
        if compression == Compression::Fast {
            run = run.args(["--fast", "--compress-type", "gz"]);
        }
        run.run()?;
        names.push(name);
    }
    Ok(names)
}

/// Returns the path of cargo-deb, and installs it into target/tools if it is missing or of another version.
pub(crate) fn tool() -> Result<PathBuf> {
    let tools = target()?.join("tools");
    let program = tools.join("bin/cargo-deb");
    let found = Command::new(&program).arg("--version").output();
    let installed = found.is_ok_and(|output| {
        output
            .stdout
            .ends_with(format!(" {CARGO_DEB}\n").as_bytes())
    });
    if !installed {
        // A debug build compiles faster, and xz(1) does the work that takes long.
        Run::cargo()?
            .args(["install", "cargo-deb", "--locked", "--version", CARGO_DEB])
            .args(["--debug", "--no-default-features", "--quiet", "--root"])
            .arg(&tools)
            .run()?;
    }
    Ok(program)
}

/// Writes the files of the packages to `dir`/cowl and `dir`/cowl-dbgsym.
fn stage_package(dir: &Path, programs: &Path, version: &str, maintainer: &str) -> Result<()> {
    let package = dir.join("cowl");
    let installation = InstallOptions {
        prefix: PathBuf::from("/usr"),
        destdir: package.clone(),
        lxc_snapshot: false,
        debug_symbols: false,
        programs: None,
    };
    let separated = dir.join("separated");
    place(&installation, programs, &separated, Layout::Debian)?;
    let root = root()?;
    for variant in VARIANTS {
        let doc = dir.join(variant).join("usr/share/doc").join(variant);
        write_file(
            &doc.join("changelog.Debian"),
            changelog(version, maintainer)?,
            0o644,
        )?;
        compress(&doc.join("changelog.Debian"))?;
        let overrides = format!(
            "# The packages are not part of Debian, where a report would ask for them.\n\
             {variant}: initial-upload-closes-no-bugs\n"
        );
        let lintian = dir.join(variant).join("usr/share/lintian/overrides");
        write_file(&lintian.join(variant), overrides, 0o644)?;
    }
    let manual = package.join("usr/share/man");
    for page in files(&manual.join("man1"))? {
        compress(&page)?;
    }
    // `mount -t cowl` is described with `cowl mount`.
    std::fs::create_dir_all(manual.join("man8"))?;
    symlink(
        "../man1/cowl-mount.1.gz",
        manual.join("man8/mount.cowl.8.gz"),
    )?;
    let doc = package.join("usr/share/doc/cowl");
    write_file(
        &doc.join("changelog"),
        std::fs::read(root.join("CHANGELOG.md"))?,
        0o644,
    )?;
    compress(&doc.join("changelog"))?;
    for name in PROGRAMS {
        // Debuggers search the symbols of /usr/bin/NAME here.
        let symbols = format!("usr/lib/debug/usr/bin/{name}.debug");
        write_file(
            &dir.join("cowl-dbgsym").join(symbols),
            std::fs::read(separated.join(format!("{name}.debug")))?,
            0o644,
        )?;
    }
    Ok(())
}

/// Compresses a file without its name and time, so that equal content gives equal packages.
fn compress(path: &Path) -> Result<()> {
    Run::new("gzip").arg("-9n").arg(path).unseen().run()
}

/// Returns the changelog of the packages, which has one entry. The changes are in the changelog of the project.
fn changelog(version: &str, maintainer: &str) -> Result<String> {
    let date = match commit_time("%cD")? {
        Some(date) => date,
        None => Run::new("date").arg("--rfc-email").unseen().output()?,
    };
    Ok(format!(
        "cowl ({version}) unstable; urgency=medium\n\n  * Release {}.\n\n -- {maintainer}  {date}\n",
        env!("CARGO_PKG_VERSION")
    ))
}

/// Returns the time of the commit that is packed, or none outside a repository.
fn commit_time(format: &str) -> Result<Option<String>> {
    if cowl_tests::programs::in_path("git").is_none() {
        return Ok(None);
    }
    let (code, text) = Run::new("git")
        .within(&root()?)
        .args(["log", "-1", &format!("--format={format}")])
        .unseen()
        .code_and_text()?;
    Ok((code == Some(0)).then(|| text.trim_end().to_owned()))
}

/// Returns the maintainer in snap-cli/Cargo.toml.
fn maintainer() -> Result<String> {
    let path = root()?.join("snap-cli/Cargo.toml");
    let text = std::fs::read_to_string(&path)?;
    text.lines()
        .find_map(|line| line.strip_prefix("maintainer = \"")?.strip_suffix('"'))
        .map(str::to_owned)
        .ok_or_else(|| Failure(format!("{} names no maintainer", path.display())))
}

/// Returns Debian's name of this machine's architecture.
fn architecture() -> Result<String> {
    Run::new("dpkg")
        .arg("--print-architecture")
        .unseen()
        .output()
}
