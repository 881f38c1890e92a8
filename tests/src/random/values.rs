//! Values for operations, and the operations that are portable.

use rustix::fs::FallocateFlags;

use super::operation::Op;

/// Returns whether all file systems that can contain layers give the same result for an operation.
pub(super) fn is_portable(op: &Op) -> bool {
    match op {
        Op::FdSeek { .. }
        | Op::FdReopen { .. }
        | Op::FdLink { .. }
        | Op::FdDropPages { .. }
        | Op::Map { .. }
        | Op::Unmap { .. }
        | Op::MapRead { .. }
        | Op::MapWrite { .. }
        | Op::MapSync { .. }
        | Op::ListWhile { .. } => false,
        Op::FdAllocate { mode, .. } => {
            *mode != FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE)
        }
        Op::Setxattr { name, .. }
        | Op::Getxattr { name, .. }
        | Op::Removexattr { name, .. }
        | Op::FdSetxattr { name, .. }
        | Op::FdRemovexattr { name, .. } => !name.starts_with("trusted.overlay."),
        _ => true,
    }
}

/// Returns `cap_net_bind_service=p` in the kernel's format (revision 2).
pub(super) fn capability() -> Vec<u8> {
    [0x0200_0000u32, 1 << 10, 0, 0, 0]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

/// Returns an ACL with an entry for user 1000, in the kernel's format.
#[must_use]
pub fn acl(permissions: u64) -> Vec<u8> {
    let named = u16::try_from(permissions).unwrap_or_default();
    let none = u32::MAX;
    let entries: [(u16, u16, u32); 5] = [
        (0x01, 7, none),
        (0x02, named, 1000),
        (0x04, 5, none),
        (0x10, 7, none),
        (0x20, 1, none),
    ];
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permission, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permission.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}
