//! User and group ids as the mount shows them and as they lie on disk. Pure.

/// One run of ids: `count` of them from `mount` on lie on disk from `disk` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first id as the mount shows it.
    pub mount: u32,
    /// The first id on disk.
    pub disk: u32,
    /// How many.
    pub count: u32,
}

/// The id that stands for every id that no range covers (the kernel's overflow id).
pub const OVERFLOW: u32 = 65534;

/// A map of ids. Without ranges nothing is mapped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMap {
    ranges: Vec<Range>,
    /// Everything shows as this id (`squash_to_root`, `squash_to_uid`).
    squash: Option<u32>,
}

impl IdMap {
    /// A map of these ranges.
    pub fn new(ranges: Vec<Range>, squash: Option<u32>) -> Self {
        Self { ranges, squash }
    }

    /// The text form: `disk:mount:count`, as fuse-overlayfs reads it; more of them after further
    /// colons; a leading colon is passed over (podman writes one).
    pub fn parse(text: &str) -> Result<Vec<Range>, String> {
        let numbers: Result<Vec<u32>, _> = text
            .trim_start_matches(':')
            .split(':')
            .map(str::parse)
            .collect();
        let numbers = numbers.map_err(|_| format!("'{text}' is no list of numbers"))?;
        let ranges = numbers.chunks(3).map(|chunk| match *chunk {
            [disk, mount, count] if count > 0 => {
                let fits = |first: u32| first.checked_add(count - 1).is_some();
                if fits(mount) && fits(disk) {
                    Ok(Range { mount, disk, count })
                } else {
                    Err(format!("'{text}': a range ends above the largest id"))
                }
            }
            _ => Err(format!("'{text}' is not of the form disk:mount:count")),
        });
        ranges.collect()
    }

    /// How an id on disk shows.
    pub fn to_mount(&self, disk: u32) -> u32 {
        if let Some(id) = self.squash {
            return id;
        }
        self.translate(disk, |range| (range.disk, range.mount))
            .unwrap_or(OVERFLOW)
    }

    /// Under which id something lies on disk; `None` when the map does not cover it.
    pub fn to_disk(&self, mount: u32) -> Option<u32> {
        self.translate(mount, |range| (range.mount, range.disk))
    }

    fn translate(&self, id: u32, ends: impl Fn(&Range) -> (u32, u32)) -> Option<u32> {
        if self.ranges.is_empty() {
            return Some(id);
        }
        self.ranges.iter().find_map(|range| {
            let (from, to) = ends(range);
            let offset = id.checked_sub(from)?;
            (offset < range.count).then(|| to + offset)
        })
    }

    /// Whether ids show as they lie on disk.
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
        assert_eq!(map.to_disk(70_000), Some(5));
    }

    #[test]
    fn no_ranges_map_nothing_and_squashing_shows_one() {
        assert_eq!(IdMap::default().to_mount(7), 7);
        assert_eq!(IdMap::default().to_disk(7), Some(7));
        let squashed = IdMap::new(Vec::new(), Some(0));
        assert_eq!(squashed.to_mount(7), 0);
        assert_eq!(squashed.to_disk(7), Some(7));
    }

    #[test]
    fn refuses_what_is_no_map() {
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
