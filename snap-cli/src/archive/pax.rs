//! Parses and writes PAX extended headers. No I/O.
//!
//! A header is a sequence of records `LENGTH KEY=VALUE\n`. Records are delimited by their length, because a value can
//! contain any byte, including newlines, as the values of binary xattrs do.

use std::num::IntErrorKind;

use cowl_layers::sys::stat::Time;

/// The records of a header to write, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Records(pub(super) Vec<(Vec<u8>, Vec<u8>)>);

/// The key prefix of xattrs.
pub(super) const XATTR: &[u8] = b"SCHILY.xattr.";
/// The key prefix of ACLs in text form; `access` or `default` follows.
pub(super) const ACL: &[u8] = b"SCHILY.acl.";
/// The key that declares an empty file to be a socket. cowl defines it, and uses it only in archives of whole
/// containers.
pub(super) const SOCKET: &str = "COWL.socket";
/// The key, on the root of a layer, of the layer id to which marker xattrs in other layers refer.
pub(super) const LAYER: &str = "COWL.layer";
/// The key of the inode number, on objects to whose number a marker xattr refers.
pub(super) const INO: &str = "COWL.ino";

impl Records {
    /// Appends a record.
    pub(super) fn push(&mut self, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.0.push((key.into(), value.into()));
    }

    /// Returns the data of the header.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut data = Vec::new();
        for (key, value) in &self.0 {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            // The length includes its own digits.
            while length != rest + digits(length) {
                length = rest + digits(length);
            }
            data.extend_from_slice(format!("{length} ").as_bytes());
            data.extend_from_slice(key);
            data.push(b'=');
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        data
    }
}

/// The number of digits of the longest accepted record length. No header is longer.
const LENGTH_DIGITS: usize = 20;

/// Calls `record` with each key and value of a header's data, in order.
///
/// A key can occur more than once, as GNU.sparse.offset does. The error describes the syntax error.
pub(super) fn for_each_record(
    mut data: &[u8],
    record: &mut dyn FnMut(&[u8], &[u8]),
) -> Result<(), &'static str> {
    // Some writers pad with NULs.
    while !data.is_empty() && !data.starts_with(&[0]) {
        let space = data
            .iter()
            .take(LENGTH_DIGITS + 1)
            .position(|&byte| byte == b' ')
            .ok_or("no length")?;
        let length: usize = data
            .get(..space)
            .and_then(|digits| str::from_utf8(digits).ok())
            .and_then(|digits| digits.parse().ok())
            .ok_or("a length that is not a number")?;
        let body = data
            .get(space + 1..length)
            .ok_or("a length beyond the end")?
            .strip_suffix(b"\n")
            .ok_or("a record without a final newline")?;
        let equals = body.iter().position(|&byte| byte == b'=').ok_or("no '='")?;
        let (key, value) = body.split_at(equals);
        record(key, value.get(1..).unwrap_or_default());
        data = data.get(length..).unwrap_or_default();
    }
    Ok(())
}

fn digits(number: usize) -> usize {
    number.checked_ilog10().map_or(1, |log| log as usize + 1)
}

/// Parses an id, which some archivers write as a negative number. A number that is not an id is `Some`, too.
pub(super) fn id(text: &[u8]) -> Option<i128> {
    match text.strip_prefix(b"-") {
        Some(digits) => decimal(digits).map(|number| -i128::from(number)),
        None => decimal(text).map(i128::from),
    }
}

/// Parses a number that consists of decimal digits only.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if !text.first()?.is_ascii_digit() {
        return None;
    }
    str::from_utf8(text).ok()?.parse().ok()
}

/// The first and the last time, to which others are clamped. The file system clamps them to its own range.
pub(super) const FIRST_TIME: Time = Time {
    secs: i64::MIN,
    nanos: 0,
};
pub(super) const LAST_TIME: Time = Time {
    secs: i64::MAX,
    nanos: 0,
};

/// Parses seconds since 1970 with an optional fraction, which is truncated to nanoseconds.
///
/// Python writes a small fraction in exponential notation ("1e-05").
pub(super) fn parse_time(text: &[u8]) -> Option<Time> {
    let text = str::from_utf8(text).ok()?;
    if text.len() < 32 && text.contains(['e', 'E']) {
        let number: f64 = text.parse().ok()?;
        return parse_time(format!("{number:.9}").as_bytes());
    }
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos: u32 = format!("{fraction:0<9.9}").parse().ok()?;
    let digits = whole.strip_prefix('-').unwrap_or(whole);
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let secs: i64 = match whole.parse::<i64>() {
        Ok(secs) => secs,
        Err(error) => {
            return match error.kind() {
                IntErrorKind::PosOverflow => Some(LAST_TIME),
                IntErrorKind::NegOverflow => Some(FIRST_TIME),
                _ => None,
            };
        }
    };
    // "-1.25" is 0.75 s after second -2.
    if whole.starts_with('-') && nanos > 0 {
        return Some(Time {
            secs: secs.saturating_sub(1),
            nanos: 1_000_000_000 - nanos,
        });
    }
    Some(Time { secs, nanos })
}

/// Formats a time exactly, without trailing zeros.
pub(super) fn format_time(time: Time) -> String {
    match (time.secs, time.nanos) {
        (secs, 0) => secs.to_string(),
        (secs @ ..0, nanos) => {
            let text = format!("-{}.{:09}", -(secs + 1), 1_000_000_000 - nanos);
            text.trim_end_matches('0').to_owned()
        }
        (secs, nanos) => format!("{secs}.{nanos:09}")
            .trim_end_matches('0')
            .to_owned(),
    }
}

/// Escapes '=' and '%' in the name of an xattr, as GNU tar does, so that it can be part of a key.
pub(super) fn escape_xattr(name: &[u8]) -> Vec<u8> {
    let mut key = Vec::new();
    for &byte in name {
        match byte {
            b'%' => key.extend_from_slice(b"%25"),
            b'=' => key.extend_from_slice(b"%3D"),
            _ => key.push(byte),
        }
    }
    key
}

/// Reverses [`escape_xattr`].
pub(super) fn unescape_xattr(key: &[u8]) -> Vec<u8> {
    let mut name = Vec::new();
    let mut rest = key;
    while let Some((&first, tail)) = rest.split_first() {
        if let Some(after) = rest.strip_prefix(b"%25") {
            name.push(b'%');
            rest = after;
        } else if let Some(after) = rest.strip_prefix(b"%3D") {
            name.push(b'=');
            rest = after;
        } else {
            name.push(first);
            rest = tail;
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip_with_any_bytes() {
        let mut records = Records::default();
        records.push(*b"SCHILY.xattr.user.x", *b"a\n12 size=5\n=\0\xff");
        records.push(*b"path", vec![b'p'; 985]);
        records.push(*b"path", vec![b'p'; 90]);
        records.push(*b"empty", *b"");
        let mut read = Records::default();
        for_each_record(&records.to_bytes(), &mut |key, value| read.push(key, value)).unwrap();
        assert_eq!(read, records);
    }

    #[test]
    fn damaged_records_are_refused() {
        for bad in [
            &b"5 a=b"[..],
            b"x a=b\n",
            b"99 a=b\n",
            b"5 ab\n",
            b"3",
            b"6 a=b\nx",
            b"0 a=b\n",
            b"2 a=b\n",
            b"99999999999999999999999 a=b\n",
            b"18446744073709551615 a=b\n",
        ] {
            assert!(
                for_each_record(bad, &mut |_, _| {}).is_err(),
                "{}",
                bad.escape_ascii()
            );
        }
    }

    #[test]
    fn times_are_exact() {
        for (text, secs, nanos) in [
            ("0", 0, 0),
            ("1.5", 1, 500_000_000),
            ("-1.25", -2, 750_000_000),
            ("-0.25", -1, 750_000_000),
            ("-3", -3, 0),
            ("1700000000.123456789", 1_700_000_000, 123_456_789),
        ] {
            let time = Time { secs, nanos };
            assert_eq!(parse_time(text.as_bytes()), Some(time), "{text}");
            assert_eq!(format_time(time), text);
        }
        assert_eq!(
            parse_time(b"1.0000000009"),
            Some(Time { secs: 1, nanos: 0 })
        );
        let small = Time {
            secs: 0,
            nanos: 10_000,
        };
        assert_eq!(parse_time(b"1e-05"), Some(small));
        for (text, clamped) in [
            ("9223372036854775808", LAST_TIME),
            ("99999999999999999999999.5", LAST_TIME),
            ("-9223372036854775809", FIRST_TIME),
            ("-9223372036854775808.25", FIRST_TIME),
            ("1e25", LAST_TIME),
        ] {
            let secs = parse_time(text.as_bytes()).map(|time| time.secs);
            assert_eq!(secs, Some(clamped.secs), "{text}");
        }
        for bad in [
            "", "x", "+1", "-", "--1", "1.x", "1.-5", ".", "e", "1e400", "nane", "-inf",
        ] {
            assert_eq!(parse_time(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn xattr_names_round_trip() {
        for name in [&b"user.a=b"[..], b"user.100%", b"user.%3D", b"user.plain"] {
            let key = escape_xattr(name);
            assert!(!key.contains(&b'='));
            assert_eq!(unescape_xattr(&key), name);
        }
    }
}
