//! The file handles of kernel overlayfs, in its `origin` xattrs and in the names of its index entries.
//!
//! A handle identifies the lower inode that an object was copied up from. cowl only reads them.

/// Version and magic byte (`OVL_FH_VERSION` and `OVL_FH_MAGIC` in `struct ovl_fb`).
const HEAD: [u8; 2] = [0x00, 0xfb];
/// The length of the header: version, magic, length, flags, type, and the file system's UUID.
const BEFORE_HANDLE: usize = 21;
/// The flag of a handle that refers to the upper layer (`OVL_FH_FLAG_PATH_UPPER`).
const IN_UPPER: u8 = 1 << 2;

/// Decodes the name of an index entry: hexadecimal digits of the handle of the lower inode.
///
/// Returns the handle's type and bytes, as from name_to_handle_at(2); `None` for any other name.
pub fn handle_of_entry(name: &[u8]) -> Option<(i32, Vec<u8>)> {
    let (digits, rest) = name.as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    let byte = |digits: &[u8; 2]| {
        let text = std::str::from_utf8(digits).ok()?;
        u8::from_str_radix(text, 16).ok()
    };
    let raw = digits.iter().map(byte).collect::<Option<Vec<u8>>>()?;
    let (head, bytes) = raw.split_at_checked(BEFORE_HANDLE)?;
    let [version, magic, length, flags, kind, ..] = *head else {
        return None;
    };
    let whole = [version, magic] == HEAD && usize::from(length) == raw.len();
    if !whole || flags & IN_UPPER != 0 || bytes.is_empty() {
        return None;
    }
    Some((kind.into(), bytes.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_an_index_entry_of_the_kernel() {
        let name = b"00fb1d00010000000000000000000000000000000054e09a007a0f20ed";
        let (kind, bytes) = handle_of_entry(name).unwrap();
        assert_eq!(kind, 1);
        assert_eq!(bytes, b"\x54\xe0\x9a\x00\x7a\x0f\x20\xed");
    }

    #[test]
    fn other_names_are_not_parsed() {
        for name in [
            &b""[..],
            b"#3313",
            b"00fb",
            b"00fb1d0001000000000000000000000000000000005",
            b"00fb1d04010000000000000000000000000000000054e09a007a0f20ed",
            b"00fc1d00010000000000000000000000000000000054e09a007a0f20ed",
            b"00fb1e00010000000000000000000000000000000054e09a007a0f20ed",
            b"00fb1500010000000000000000000000000000000000",
        ] {
            assert_eq!(handle_of_entry(name), None, "{name:?}");
        }
    }
}
