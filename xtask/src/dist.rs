//! Packs an installation for other machines: an archive, Debian packages, an archive of static programs.

use std::path::{Path, PathBuf};

use crate::deb::{self, Compression};
use crate::install::{InstallOptions, Layout, PROGRAMS, build_programs, files, place};
use crate::run::{Failure, Result, Run, failure, note, target, title};

/// The options of `cargo xtask dist`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct DistOptions {
    /// Write these formats
    #[arg(long, value_delimiter = ',', default_value = "tar,deb")]
    format: Vec<Format>,
    /// Install programs, manual and units below this directory when an archive is unpacked at /
    #[arg(long, default_value = "/usr/local", value_name = "DIR")]
    prefix: PathBuf,
    /// Pack the programs from this directory instead of building them
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// Write to this directory instead of target/dist
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Compress quickly, not well
    #[arg(long)]
    fast: bool,
    #[command(flatten)]
    deb: deb::DebOptions,
}

/// A form in which programs are distributed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// An archive to unpack at /
    Tar,
    /// The Debian packages cowl and cowl-dbgsym
    Deb,
    /// An archive like `tar`, of programs that need no C library
    Static,
}

/// The crates of a registry. The others belong to the repository only.
const CRATES: [&str; 5] = [
    "cowl-layers",
    "cowl-overlay",
    "cowlfs",
    "cowl",
    "cowl-snapshotter",
];

/// Writes the files of each format, and their checksums.
pub(crate) fn run(options: &DistOptions) -> Result<()> {
    let output = match &options.output {
        Some(dir) => std::path::absolute(dir)?,
        None => target()?.join("dist"),
    };
    std::fs::create_dir_all(&output)?;
    let compression = if options.fast {
        Compression::Fast
    } else {
        Compression::Best
    };
    let mut written = Vec::new();
    for format in &options.format {
        title(match format {
            Format::Tar => "dist: tar",
            Format::Deb => "dist: deb",
            Format::Static => "dist: static",
        });
        let programs = match (&options.programs, format) {
            (Some(dir), _) => std::path::absolute(dir)?,
            (None, Format::Static) => build_static()?,
            (None, _) => build_programs("release")?,
        };
        match format {
            Format::Tar => written.push(archive(options, &programs, "", compression, &output)?),
            Format::Static => {
                check_static(&programs)?;
                written.push(archive(
                    options,
                    &programs,
                    "-static",
                    compression,
                    &output,
                )?);
            }
            Format::Deb => {
                written.extend(deb::build(&options.deb, &programs, compression, &output)?)
            }
        }
    }
    let line = format!(
        "cd '{}' && sha256sum {} > SHA256SUMS",
        output.display(),
        written.join(" ")
    );
    Run::shell(&line).run()?;
    for name in &written {
        note(&format!("packed {}", output.join(name).display()));
    }
    Ok(())
}

/// Packs the crates as for a registry, which fails if a manifest lacks something. Does not build the packed crates:
/// that takes minutes, and the tests have built them.
pub(crate) fn package_crates() -> Result<()> {
    Run::cargo()?
        .args(["package", "--quiet", "--locked", "--offline"])
        .args(["--allow-dirty", "--no-verify"])
        .args(CRATES.iter().flat_map(|name| ["--package", *name]))
        .run()
}

/// Packs the files of an installation, and returns the name of the archive.
fn archive(
    options: &DistOptions,
    programs: &Path,
    suffix: &str,
    compression: Compression,
    output: &Path,
) -> Result<String> {
    let stage = tempfile::tempdir()?;
    let installation = InstallOptions {
        prefix: options.prefix.clone(),
        destdir: stage.path().to_owned(),
        lxc_snapshot: false,
        debug_symbols: false,
        programs: None,
    };
    let separated = output.join(format!("programs{suffix}"));
    place(&installation, programs, &separated, Layout::Local)?;
    note(&format!("debug symbols are in {}", separated.display()));
    // Unpacking on an installed system must not overwrite its configuration file.
    let settings = stage.path().join("etc/cowl/config.toml");
    std::fs::rename(&settings, settings.with_extension("toml.example"))?;
    let name = format!(
        "cowl-{}-{}{suffix}.tar.xz",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH
    );
    let compressor = match compression {
        Compression::Fast => "xz -0",
        Compression::Best => "xz",
    };
    Run::new("tar")
        .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
        .args(["--use-compress-program", compressor, "-C"])
        .arg(stage.path())
        .arg("-cf")
        .arg(output.join(&name))
        .args(
            files(stage.path())?
                .iter()
                .filter_map(|part| part.file_name()),
        )
        .run()?;
    Ok(name)
}

/// Builds the programs for musl, and returns their directory. Reports everything that this machine lacks.
fn build_static() -> Result<PathBuf> {
    let triple = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
    let libraries = Run::new("rustc")
        .args(["--print", "target-libdir", "--target", &triple])
        .unseen()
        .output()?;
    let mut missing = Vec::new();
    if !Path::new(&libraries).is_dir() {
        missing.push(format!(
            "Rust's standard library for {triple}: rustup target add {triple}"
        ));
    }
    // The C parts of two dependencies, zstd and liblzma, are compiled for musl.
    if cowl_tests::programs::in_path("musl-gcc").is_none() {
        missing.push("the program musl-gcc: apt-get install musl-tools".to_owned());
    }
    if !missing.is_empty() {
        return failure(format!(
            "static programs need more than this machine has:\n  {}",
            missing.join("\n  ")
        ));
    }
    Run::cargo()?
        .args(["build", "--locked", "-p", "cowl", "-p", "cowlfs"])
        .args(["-p", "cowl-snapshotter", "--bins"])
        .args(["--release", "--target", &triple])
        .run()?;
    Ok(target()?.join(triple).join("release"))
}

/// Fails if one of the programs needs a program interpreter, and so a C library.
fn check_static(programs: &Path) -> Result<()> {
    for name in PROGRAMS {
        let headers = Run::new("readelf")
            .args(["--program-headers", "--wide"])
            .arg(programs.join(name))
            .unseen()
            .output()?;
        if headers.contains("INTERP") {
            return Err(Failure(format!(
                "{} is not static",
                programs.join(name).display()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "dist_tests.rs"]
mod tests;
