//! Creates the lower layers that all variants are mounted over.

use std::fs;
use std::io::Write;
use std::path::Path;

use super::load;
use super::rows::{Layers, Lowers, Sizes};
use crate::run::{Result, Run};

/// Creates all lower layers in `top`, and a tar of the small tree.
pub(super) fn make(top: &Path, sizes: &Sizes) -> Result<()> {
    for (name, files, size) in [
        ("small", sizes.files, 4096),
        ("owned", sizes.owned, 64),
        ("few", 100, 64),
    ] {
        let tree = top.join(name).join("tree");
        fs::create_dir_all(&tree)?;
        load::tree(&tree, files, size)?;
    }
    let flat = top.join("flat/flat");
    fs::create_dir_all(&flat)?;
    for name in 0..sizes.names {
        fs::File::create_new(flat.join(format!("entry-{name:05}")))?;
    }
    big(&top.join("big"), sizes.big_mib)?;
    for lowers in Lowers::ALL {
        if let Lowers::Many(layers) = lowers {
            spread(top, lowers, layers, sizes.files)?;
        }
    }
    Run::new("tar")
        .args(["cf", "small.tar", "-C", "small", "tree"])
        .within(top)
        .unseen()
        .run()?;
    Run::new("sync").arg("-f").arg(top).unseen().run()
}

/// Returns the number of bytes that all layers and the work on them need: an overlay's copies of both big files, the
/// files that are written in addition, and the small files three times.
pub(super) fn bytes(sizes: &Sizes) -> u64 {
    let (big, files) = (sizes.big_mib as u64, sizes.files as u64);
    let small = files * 5 * 3 + (sizes.owned as u64 + sizes.names as u64) * 2;
    // A plain user has layers of its own.
    let own = (big << 20) * 2 + (small << 12);
    (big << 20) * 6 + (small << 12) + (1 << 29) + own
}

/// Creates a file of incompressible bytes, and a shared library with the same content.
fn big(directory: &Path, mib: usize) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::create_dir_all(directory)?;
    let mut file = fs::File::create_new(directory.join("big"))?;
    let mut word = 0x2545_f491_4f6c_dd1d_u64;
    let mut content = Vec::with_capacity(1 << 20);
    for _ in 0..mib {
        content.clear();
        while content.len() < 1 << 20 {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            content.extend_from_slice(&word.to_le_bytes());
        }
        file.write_all(&content)?;
    }
    drop(file);
    // An ELF header and execute permission: the overlay treats such a file as a library, which is mapped and never
    // written.
    let lib = directory.join("lib.so");
    fs::copy(directory.join("big"), &lib)?;
    let mut file = fs::OpenOptions::new().write(true).open(&lib)?;
    file.write_all(b"\x7fELF\x02\x01\x01\0")?;
    drop(file);
    fs::set_permissions(&lib, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Distributes `files` files over `layers` layers, in directories of at most a hundred, so that no layer is empty.
fn spread(top: &Path, lowers: Lowers, layers: usize, files: usize) -> Result<()> {
    let Layers {
        directory: parent,
        names,
    } = lowers.at(top);
    let per_directory = (files / layers).clamp(1, 100);
    for name in &names {
        fs::create_dir_all(parent.join(name).join("tree"))?;
    }
    for number in 0..files.div_ceil(per_directory) {
        let Some(layer) = names.get(number % layers) else {
            continue;
        };
        let directory = parent.join(layer).join(format!("tree/d{number:05}"));
        fs::create_dir(&directory)?;
        for file in 0..per_directory.min(files - number * per_directory) {
            fs::write(directory.join(format!("f{file:02}")), [b'x'; 64])?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn the_number_of_files_does_not_depend_on_the_number_of_layers() {
        let dir = tempfile::tempdir().unwrap();
        for layers in [2, 64, 500] {
            let lowers = Lowers::Many(layers);
            spread(dir.path(), lowers, layers, 1010).unwrap();
            let Layers {
                directory: parent,
                names,
            } = lowers.at(dir.path());
            let mut files = 0;
            for name in names {
                let here = cowl_tests::command::run(
                    "find",
                    [
                        parent.join(name).as_os_str(),
                        "-type".as_ref(),
                        "f".as_ref(),
                    ],
                );
                let here = here.ok().out().lines().count();
                assert!(here > 0);
                files += here;
            }
            assert_eq!(files, 1010);
        }
    }
}
