//! Tests of records: their encoding, when they apply, and hostile values.

use super::recorded::{RecordedAttributes, StoredAttributes};
use crate::format::{ACL_ACCESS, CAPABILITY};
use crate::sys::stat::{Stat, Time};

fn file() -> Stat {
    Stat {
        mode: 0o100_755,
        size: 5,
        mtime: Time { secs: -7, nanos: 9 },
        ..Stat::default()
    }
}

/// Returns the record of a program with setuid, a foreign owner and three xattrs.
fn program() -> RecordedAttributes {
    let mut record = RecordedAttributes::of(&file());
    record.mode = 0o104_755;
    (record.uid, record.gid) = (33, 34);
    record.set_xattr(b"trusted.x", b"old");
    record.set_xattr(CAPABILITY, b"c");
    record.set_xattr(ACL_ACCESS, b"");
    record.set_xattr(b"trusted.x", b"t");
    record
}

fn device() -> RecordedAttributes {
    let stored = Stat {
        mode: 0o100_000,
        size: 0,
        ..file()
    };
    RecordedAttributes {
        mode: 0o020_666,
        uid: 7,
        rdev: rustix::fs::makedev(1, 3),
        ..RecordedAttributes::of(&stored)
    }
}

fn now(record: &RecordedAttributes) -> Stat {
    let StoredAttributes {
        mode,
        uid,
        gid,
        size,
        mtime,
    } = record.stored;
    Stat {
        mode,
        uid,
        gid,
        size,
        mtime,
        ..Stat::default()
    }
}

#[test]
fn values_round_trip() {
    for record in [program(), device()] {
        let value = record.to_value().unwrap();
        assert_eq!(RecordedAttributes::parse(&value), Ok(record));
    }
    let names: Vec<_> = program().xattrs.into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, [CAPABILITY, ACL_ACCESS, b"trusted.x"]);
    let mut large = program();
    large.set_xattr(b"trusted.large", &vec![0; 1 << 16]);
    assert_eq!(large.to_value(), None);
}

#[test]
fn each_attribute_applies_until_it_is_changed() {
    let record = program();
    let names = |stat: &Stat| {
        let found = record.apply(stat).xattrs.into_iter();
        found.map(|(name, _)| name).collect::<Vec<_>>()
    };
    let get = |stat: &Stat| {
        let found = record.apply(stat).stat;
        (found.mode, found.uid, found.gid)
    };
    let same = now(&record);
    assert_eq!(get(&same), (0o104_755, 33, 34));
    assert_eq!(names(&same), [CAPABILITY, ACL_ACCESS, b"trusted.x"]);
    let changed_mode = Stat {
        mode: 0o100_700,
        ..same
    };
    assert_eq!(get(&changed_mode), (0o100_700, 33, 34));
    assert_eq!(names(&changed_mode), [CAPABILITY, b"trusted.x"]);
    // Setuid and capabilities would apply to another owner or another content.
    let owned = Stat { gid: 5, ..same };
    assert_eq!(get(&owned), (0o100_755, 0, 5));
    assert_eq!(names(&owned), [ACL_ACCESS, b"trusted.x"]);
    for written in [
        Stat { size: 6, ..same },
        Stat {
            mtime: Time::default(),
            ..same
        },
    ] {
        assert_eq!(get(&written), (0o100_755, 33, 34));
        assert_eq!(names(&written), [ACL_ACCESS, b"trusted.x"]);
    }
    let of_other_type = Stat {
        mode: 0o040_755,
        ..same
    };
    assert_eq!(get(&of_other_type), (0o040_755, 0, 0));
    assert!(names(&of_other_type).is_empty());
}

#[test]
fn device_remains_one_while_it_is_empty() {
    let record = device();
    let get = |stat: &Stat| {
        let found = record.apply(stat).stat;
        (found.mode, found.uid, found.rdev)
    };
    let (same, null) = (now(&record), rustix::fs::makedev(1, 3));
    assert_eq!(get(&same), (0o020_666, 7, null));
    let touched = Stat {
        mtime: Time::default(),
        ..same
    };
    assert_eq!(get(&touched), (0o020_666, 7, null));
    let changed_mode = Stat {
        mode: 0o100_640,
        ..same
    };
    assert_eq!(get(&changed_mode), (0o020_640, 7, null));
    let owned = Stat { uid: 9, ..same };
    assert_eq!(get(&owned), (0o020_666, 9, null));
    let written = Stat { size: 1, ..same };
    assert_eq!(get(&written), (0o100_000, 7, 0));
}

#[test]
fn hostile_values_are_invalid() {
    let value = program().to_value().unwrap();
    for length in 0..value.len() {
        // The record ends after its fixed part or after any of its xattrs.
        let is_complete = RecordedAttributes::parse(&value[..length]).is_ok();
        let ends = [53, 53 + 4 + CAPABILITY.len() + 1];
        let ends = [ends[0], ends[1], ends[1] + 4 + ACL_ACCESS.len()];
        assert_eq!(is_complete, ends.contains(&length), "{length}");
    }
    let change = |change: &dyn Fn(&mut RecordedAttributes)| {
        let mut record = device();
        change(&mut record);
        RecordedAttributes::parse(&record.to_value().unwrap())
    };
    assert!(change(&|_| {}).is_ok());
    let changes: [&dyn Fn(&mut RecordedAttributes); 16] = [
        &|record| record.rdev = 0,
        &|record| record.rdev = rustix::fs::makedev(0x1000, 0),
        &|record| record.rdev = rustix::fs::makedev(0, 0x10_0000),
        &|record| record.rdev = u64::MAX,
        &|record| record.mode = 0o666,
        &|record| record.mode = 0o100_666,
        &|record| record.mode = 0o170_666,
        &|record| record.mode |= 1 << 16,
        &|record| record.stored.mode = 0o020_000,
        &|record| record.stored.mode = 0o040_000,
        &|record| record.stored.size = 1,
        &|record| record.stored.mtime.nanos = 1_000_000_000,
        &|record| record.uid = u32::MAX,
        &|record| record.stored.gid = u32::MAX,
        &|record| record.set_xattr(b"other.x", b""),
        &|record| record.set_xattr(b"user.", b""),
    ];
    for (index, hostile) in changes.iter().enumerate() {
        assert!(change(hostile).is_err(), "{index}");
    }
    for name in [
        &b"user.\0"[..],
        &[b"user.", &[b'n'; 251][..]].concat(),
        b"system.x",
    ] {
        assert!(change(&|record| record.set_xattr(name, b"")).is_err());
    }
    let unsorted = |record: &mut RecordedAttributes| {
        record.xattrs = vec![
            (b"user.b".into(), b"".into()),
            (b"user.b".into(), b"".into()),
        ];
    };
    assert!(change(&unsorted).is_err());
    assert!(RecordedAttributes::parse(&[&value[..], &vec![0; 1 << 16]].concat()).is_err());
    assert!(RecordedAttributes::parse(&[&[2], &value[1..]].concat()).is_err());
}
