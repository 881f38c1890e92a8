//! The names of file systems, for messages.

use std::os::fd::AsFd;

use super::order::{BTRFS, EXT4, XFS};

/// Returns the name of the file system that contains a file, if it is known.
pub fn name(file: impl AsFd) -> Option<&'static str> {
    let kind = rustix::fs::fstatfs(file).ok()?.f_type;
    Some(match u64::try_from(kind).ok()? {
        EXT4 => "ext4",
        XFS => "XFS",
        BTRFS => "btrfs",
        0x0102_1994 => "tmpfs",
        0x794c_7630 => "overlayfs",
        0x2fc1_2fc1 => "ZFS",
        0xf2f5_2010 => "F2FS",
        0xca45_1a4e => "bcachefs",
        0x6969 => "NFS",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_known_file_systems_have_a_name() {
        let shm = std::fs::File::open("/dev/shm").unwrap();
        assert_eq!(super::name(&shm), Some("tmpfs"));
        let proc = std::fs::File::open("/proc").unwrap();
        assert_eq!(super::name(&proc), None);
    }
}
