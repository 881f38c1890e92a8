//! Translation between the user and group ids visible on the mount and those on disk. Pure functions.

use serde::{Deserialize, Serialize};

/// A range of `count` ids, which begins at `mount` on the mount and at `disk` on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// The first id visible on the mount.
    pub mount: u32,
    /// The first id on disk.
    pub disk: u32,
    /// The number of ids.
    pub count: u32,
}

/// The kernel's overflow id. It is visible in place of every id that no range covers, and owns what such ids create.
pub const OVERFLOW: u32 = 65534;

/// An id map. Without ranges it maps each id to itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    ranges: Vec<IdRange>,
    /// The id visible in place of every id (`squash_to_root`, `squash_to_uid`).
    squash: Option<u32>,
}

impl IdMap {
    /// Creates a map of these ranges. With `squash`, every id on disk is visible as that id.
    pub fn new(ranges: Vec<IdRange>, squash: Option<u32>) -> Self {
        Self { ranges, squash }
    }

    /// Parses ranges in the syntax of fuse-overlayfs: `disk:mount:count`, repeated with colons between them. Ignores
    /// leading colons, because podman writes one.
    pub fn parse(text: &str) -> Result<Vec<IdRange>, String> {
        let numbers: Result<Vec<u32>, _> = text
            .trim_start_matches(':')
            .split(':')
            .map(str::parse)
            .collect();
        let numbers = numbers
            .map_err(|_| format!("'{text}' is not a list of numbers separated by colons"))?;
        let ranges = numbers.chunks(3).map(|chunk| match *chunk {
            [disk, mount, count] if count > 0 => {
                let fits = |first: u32| first.checked_add(count - 1).is_some();
                if fits(mount) && fits(disk) {
                    Ok(IdRange { mount, disk, count })
                } else {
                    Err(format!("'{text}': a range exceeds the largest id"))
                }
            }
            _ => Err(format!("'{text}' is not of the form disk:mount:count")),
        });
        ranges.collect()
    }

    /// Returns the id visible on the mount for an id on disk.
    pub fn to_mount(&self, disk: u32) -> u32 {
        if let Some(id) = self.squash {
            return id;
        }
        self.translate(disk, |range| (range.disk, range.mount))
            .unwrap_or(OVERFLOW)
    }

    /// Returns the id on disk for an id on the mount; `None` if no range covers it.
    pub fn to_disk(&self, mount: u32) -> Option<u32> {
        self.translate(mount, |range| (range.mount, range.disk))
    }

    /// Returns the id on disk of an object that `mount` creates: the overflow id if no range covers `mount`.
    ///
    /// Programs outside of a container create objects in its id-mapped root filesystem before it starts; fuse-overlayfs
    /// stores the overflow id as well.
    pub fn creator_to_disk(&self, mount: u32) -> u32 {
        self.to_disk(mount).unwrap_or(OVERFLOW)
    }

    fn translate(&self, id: u32, endpoints: impl Fn(&IdRange) -> (u32, u32)) -> Option<u32> {
        if self.ranges.is_empty() {
            return Some(id);
        }
        self.ranges.iter().find_map(|range| {
            let (from, to) = endpoints(range);
            let offset = id.checked_sub(from)?;
            (offset < range.count).then(|| to + offset)
        })
    }

    /// Whether there are ranges, so that ids differ between the mount and the disk.
    pub fn has_ranges(&self) -> bool {
        !self.ranges.is_empty()
    }

    /// Whether each id is visible as it is on disk.
    pub fn is_identity(&self) -> bool {
        self.ranges.is_empty() && self.squash.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_map_both_ways() {
        let map = IdMap::new(IdMap::parse(":100000:0:65536:5:70000:1").unwrap(), None);
        assert_eq!(map.to_mount(100_000), 0);
        assert_eq!(map.to_mount(165_535), 65_535);
        assert_eq!(map.to_mount(165_536), OVERFLOW);
        assert_eq!(map.to_mount(5), 70_000);
        assert_eq!(map.to_disk(0), Some(100_000));
        assert_eq!(map.to_disk(65_536), None);
        assert_eq!(map.creator_to_disk(65_536), OVERFLOW);
        assert_eq!(map.creator_to_disk(1), 100_001);
        assert_eq!(map.to_disk(70_000), Some(5));
    }

    #[test]
    fn without_ranges_ids_are_unchanged_and_squash_maps_all_to_one() {
        assert_eq!(IdMap::default().to_mount(7), 7);
        assert_eq!(IdMap::default().to_disk(7), Some(7));
        let squashed = IdMap::new(Vec::new(), Some(0));
        assert_eq!(squashed.to_mount(7), 0);
        assert_eq!(squashed.to_disk(7), Some(7));
    }

    #[test]
    fn parse_rejects_invalid_ranges() {
        for bad in [
            "",
            "1",
            "1:2",
            "1:2:0",
            "a:b:c",
            "1:2:3:4",
            "4294967295:0:2",
            "0:-1:3",
        ] {
            assert!(IdMap::parse(bad).is_err(), "{bad}");
        }
    }
}
