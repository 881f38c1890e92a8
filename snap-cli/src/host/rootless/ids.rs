//! The ids of a user's namespace: its own, and the ranges that /etc/subuid and /etc/subgid assign to it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cowl_layers::shown::Show as _;

use super::Caller;
use crate::error::{Error, Result};
use crate::host::programs::find;

/// The maximum number of ranges in a map of the kernel.
const MOST: usize = 340;

/// A range of ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct IdRange {
    /// The first id in the namespace.
    inside: u32,
    /// The first id outside.
    outside: u32,
    count: u32,
}

/// A first id in a container, the first id outside of it, and the number of ids.
pub(super) type Range = [u32; 3];

/// The user ids or the group ids of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct IdRanges(Vec<IdRange>);

/// The ids of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct IdMap {
    uids: IdRanges,
    gids: IdRanges,
}

impl IdRanges {
    /// Maps 0 to `own`, and the ids from 1 on to the ranges that `table` assigns to one of `owners`.
    fn new(own: u32, table: &str, owners: &[String]) -> Self {
        let mut ranges = vec![IdRange {
            inside: 0,
            outside: own,
            count: 1,
        }];
        let mut next = 1_u32;
        for (first, count) in table.lines().filter_map(|line| parse(line, owners)) {
            let end = first.saturating_add(count);
            let is_taken = |range: &IdRange| {
                first < range.outside.saturating_add(range.count) && range.outside < end
            };
            // The kernel refuses a map with an id that occurs twice, or that does not exist.
            let Some(after) = next.checked_add(count) else {
                break;
            };
            if count == 0 || end == u32::MAX || ranges.iter().any(is_taken) || ranges.len() == MOST
            {
                continue;
            }
            ranges.push(IdRange {
                inside: next,
                outside: first,
                count,
            });
            next = after;
        }
        Self(ranges)
    }

    /// Reads a map of the kernel.
    fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::at("read", path, e))?;
        let range = |line: &str| {
            let mut numbers = line.split_ascii_whitespace().map(str::parse);
            let mut next = || numbers.next()?.ok();
            Some(IdRange {
                inside: next()?,
                outside: next()?,
                count: next()?,
            })
        };
        Ok(Self(text.lines().filter_map(range).collect()))
    }

    /// Returns the ids inside for `count` ids outside from `first` on, as ranges of the first id inside and a count;
    /// `None` if one of them is not in the namespace.
    fn inside(&self, mut first: u32, mut count: u32) -> Option<Vec<(u32, u32)>> {
        let mut found = Vec::new();
        while count > 0 {
            let (inside, part) = self.0.iter().find_map(|range| {
                let offset = first.checked_sub(range.outside)?;
                let left = range.count.checked_sub(offset).filter(|left| *left > 0)?;
                Some((range.inside.checked_add(offset)?, left.min(count)))
            })?;
            found.push((inside, part));
            count -= part;
            first = first.checked_add(part).or((count == 0).then_some(0))?;
        }
        Some(found)
    }

    fn has_more_than_one(&self) -> bool {
        self.0.len() > 1
    }

    fn count(&self) -> u64 {
        self.0.iter().map(|range| u64::from(range.count)).sum()
    }

    /// Returns the ranges as arguments of newuidmap(1).
    fn words(&self) -> Vec<String> {
        let numbers = self.0.iter();
        let numbers = numbers.flat_map(|range| [range.inside, range.outside, range.count]);
        numbers.map(|number| number.to_string()).collect()
    }

    /// Returns these ranges without those after the first, which consists of the user's own id.
    fn own_only(&self) -> Self {
        Self(self.0.iter().take(1).copied().collect())
    }
}

/// Parses a line of /etc/subuid that belongs to one of `owners`: the first id and the number of ids.
fn parse(line: &str, owners: &[String]) -> Option<(u32, u32)> {
    let mut fields = line.split(':');
    let owner = fields.next()?;
    let first = fields.next()?.trim().parse().ok()?;
    let count = fields.next()?.trim().parse().ok()?;
    owners
        .iter()
        .any(|one| one == owner)
        .then_some((first, count))
}

impl IdMap {
    /// Returns the map that the user's namespace should have.
    pub(super) fn of(caller: &Caller) -> Self {
        let mut owners = vec![caller.uid.to_string()];
        owners.extend(caller.name());
        let ranges = |own, file: &str| {
            // Without the file there are no ranges.
            let text = std::fs::read_to_string(file).unwrap_or_default();
            IdRanges::new(own, &text, &owners)
        };
        Self {
            uids: ranges(caller.uid, "/etc/subuid"),
            gids: ranges(caller.gid, "/etc/subgid"),
        }
    }

    /// Returns the map of the namespace of this process.
    pub(super) fn current() -> Result<Self> {
        Ok(Self {
            uids: IdRanges::read(Path::new("/proc/self/uid_map"))?,
            gids: IdRanges::read(Path::new("/proc/self/gid_map"))?,
        })
    }

    /// Translates ranges of user ids and of group ids, each with a first id in a container, a first id outside of the
    /// namespace, and a count, to ids of the namespace; `None` if it lacks one of them.
    pub(super) fn translate(&self, users: &[Range], groups: &[Range]) -> Option<[Vec<Range>; 2]> {
        let all = |own: &IdRanges, ranges: &[Range]| -> Option<Vec<Range>> {
            let mut all = Vec::new();
            for [mut first, outside, count] in ranges.iter().copied() {
                for (inside, part) in own.inside(outside, count)? {
                    all.push([first, inside, part]);
                    first = first.checked_add(part).unwrap_or_default();
                }
            }
            Some(all)
        };
        Some([all(&self.uids, users)?, all(&self.gids, groups)?])
    }

    /// Returns whether the map has ranges of user ids and of group ids.
    pub(super) fn has_ranges(&self) -> bool {
        self.uids.has_more_than_one() && self.gids.has_more_than_one()
    }

    /// Returns the map with only the user's own ids.
    pub(super) fn own_only(&self) -> Self {
        Self {
            uids: self.uids.own_only(),
            gids: self.gids.own_only(),
        }
    }

    /// Describes the map for a log and for `cowl doctor`.
    pub(super) fn describe(&self) -> String {
        match self.has_ranges() {
            true => format!(
                "{} user ids and {} group ids",
                self.uids.count(),
                self.gids.count()
            ),
            false => "one user id and one group id".to_owned(),
        }
    }

    /// Gives the new user namespace of the process `pid` this map.
    pub(super) fn apply(&self, pid: u32) -> Result<()> {
        let maps = [
            ("newuidmap", "uid_map", &self.uids),
            ("newgidmap", "gid_map", &self.gids),
        ];
        if self.has_ranges() {
            for (program, _, ranges) in maps {
                run(program, pid, ranges)?;
            }
            return Ok(());
        }
        let write = |name: &str, text: &str| {
            let path = PathBuf::from(format!("/proc/{pid}/{name}"));
            std::fs::write(&path, text).map_err(|error| Error::at("write", &path, error))
        };
        // Otherwise the user could give up membership in a group that denies access to a file.
        write("setgroups", "deny")?;
        maps.iter()
            .try_for_each(|(_, name, ranges)| write(name, &ranges.words().join(" ")))
    }
}

/// Runs newuidmap(1) or newgidmap(1), which may map ids of other users.
fn run(program: &str, pid: u32, ranges: &IdRanges) -> Result<()> {
    let path = find(program).ok_or_else(|| {
        Error::failed(format!("{program} is not installed")).hint("as root: apt install uidmap")
    })?;
    let output = Command::new(&path)
        .arg(pid.to_string())
        .args(ranges.words())
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Error::at("run", &path, error))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(Error::failed(format!(
            "{program} failed: {}",
            output.stderr.trim_ascii().shown()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_by_name_and_by_id_without_overlaps() {
        let owners = ["1000".to_owned(), "me".to_owned()];
        let table = "root:1:5\nme:100000:65536\n1000:300000:10\nme:100010:5\n\nother:5:5\nme:x:1\nme:7:0\n\
                     me:4294967290:100\nme:1000:1\n";
        let words = IdRanges::new(1000, table, &owners).words().join(" ");
        assert_eq!(words, "0 1000 1 1 100000 65536 65537 300000 10");
        assert_eq!(
            IdRanges::new(7, "", &owners).words().join(" "),
            "0 7 1",
            "no range"
        );
    }

    #[test]
    fn ids_of_a_container_are_translated_only_if_the_namespace_has_all() {
        let owners = ["me".to_owned()];
        let ids = IdRanges::new(1000, "me:100000:10\nme:100010:10\nme:5000:5\n", &owners);
        assert_eq!(ids.inside(100_000, 20), Some(vec![(1, 10), (11, 10)]));
        assert_eq!(ids.inside(100_015, 5), Some(vec![(16, 5)]));
        assert_eq!(ids.inside(1000, 1), Some(vec![(0, 1)]));
        for (first, count) in [(100_015, 6), (0, 1), (u32::MAX, 2), (1001, 1), (99_999, 2)] {
            assert_eq!(ids.inside(first, count), None, "{first} {count}");
        }
        let map = IdMap {
            uids: ids.clone(),
            gids: ids,
        };
        let [users, groups] = map.translate(&[[0, 100_005, 10]], &[[0, 5000, 5]]).unwrap();
        assert_eq!(users, [[0, 6, 5], [5, 11, 5]]);
        assert_eq!(groups, [[0, 21, 5]]);
        assert_eq!(map.translate(&[[0, 100_005, 10]], &[[0, 0, 1]]), None);
    }
}
