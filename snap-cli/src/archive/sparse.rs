//! Parses the maps of sparse files, in the five formats that archives use.
//!
//! Each format is parsed incrementally, into at most [`limits::SEGMENTS`] segments. No I/O.

use super::limits;
use super::pax;
use crate::tree::error::{ErrorKind, Result, TreeError};

/// A sparse file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sparse {
    /// The size, including holes.
    pub(super) size: u64,
    /// The segments that are stored. Empty with `map_in_data`.
    pub(super) map: Map,
    /// PAX format 1.0: the map is at the start of the data.
    pub(super) map_in_data: bool,
}

/// The data segments: offset and length, in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Map(pub(super) Vec<(u64, u64)>);

const NOT_NUMBERS: &str = "its sparse map is not a list of numbers";
const NO_SIZE: &str = "its sparse map has no size";

fn damaged(what: &str) -> TreeError {
    TreeError::new(ErrorKind::Damaged, format!("damaged entry: {what}"))
}

impl Map {
    /// Appends a segment. The error has no path yet.
    pub(super) fn push(&mut self, offset: u64, length: u64) -> Result<()> {
        refuse_more(self.0.len() as u64 + 1)?;
        self.0.push((offset, length));
        Ok(())
    }
}

fn refuse_more(segments: u64) -> Result<()> {
    if segments <= limits::SEGMENTS as u64 {
        return Ok(());
    }
    let limit = limits::SEGMENTS;
    let what = format!("the sparse map exceeds the limit of {limit} segments");
    Err(TreeError::new(ErrorKind::Limit, what))
}

impl Sparse {
    /// Refuses a map whose segments overlap, are out of order, or exceed the file size.
    pub(super) fn check(&self, stored: u64) -> Result<(), &'static str> {
        let (mut end, mut sum) = (0_u64, 0_u64);
        for &(offset, length) in &self.map.0 {
            if offset < end {
                return Err("its sparse map overlaps");
            }
            end = offset
                .checked_add(length)
                .ok_or("its sparse map is too large")?;
            sum = sum
                .checked_add(length)
                .ok_or("its sparse map is too large")?;
        }
        if end > self.size {
            return Err("its sparse map extends beyond the end of the file");
        }
        if sum != stored {
            return Err("its sparse map and its data differ in length");
        }
        Ok(())
    }
}

/// The map that precedes the data in PAX format 1.0: decimal numbers, one per line. The first is the number of pairs
/// that follow.
#[derive(Debug, Default)]
pub(super) struct MapInData {
    line: Vec<u8>,
    count: Option<u64>,
    offset: Option<u64>,
    map: Map,
}

/// The digits of the largest 64-bit number.
const LONGEST_NUMBER: usize = 20;

impl MapInData {
    /// Parses the next block. Returns the map when it is complete; the rest of the block is padding.
    pub(super) fn block(&mut self, block: &[u8]) -> Result<Option<Map>> {
        for &byte in block {
            if byte != b'\n' {
                self.line.push(byte);
                if self.line.len() > LONGEST_NUMBER {
                    return Err(damaged(NOT_NUMBERS));
                }
                continue;
            }
            let number = pax::decimal(&self.line).ok_or_else(|| damaged(NOT_NUMBERS))?;
            self.line.clear();
            match (self.count, self.offset.take()) {
                (None, _) => {
                    refuse_more(number)?;
                    self.count = Some(number);
                }
                (Some(_), None) => self.offset = Some(number),
                (Some(_), Some(offset)) => self.map.push(offset, number)?,
            }
            if self.count == Some(self.map.0.len() as u64) {
                return Ok(Some(std::mem::take(&mut self.map)));
            }
        }
        Ok(None)
    }
}

/// The PAX records of a sparse file.
#[derive(Debug, Default)]
pub(super) struct Records {
    major: Option<u64>,
    minor: Option<u64>,
    real_size: Option<u64>,
    size: Option<u64>,
    /// Format 0.0: one record after another, alternately an offset and a length.
    offset: Option<u64>,
    pairs: Map,
    /// Format 0.1: all segments in one record.
    map: Option<Map>,
}

impl Records {
    /// Parses a record whose key begins with `GNU.sparse.`. The error has no path yet.
    pub(super) fn record(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let number = || pax::decimal(value).ok_or_else(|| damaged(NOT_NUMBERS));
        match key {
            b"major" => self.major = Some(number()?),
            b"minor" => self.minor = Some(number()?),
            b"realsize" => self.real_size = Some(number()?),
            b"size" => self.size = Some(number()?),
            b"offset" if self.offset.is_none() => self.offset = Some(number()?),
            b"numbytes" => {
                let offset = self.offset.take().ok_or_else(|| damaged(NOT_NUMBERS))?;
                self.pairs.push(offset, number()?)?;
            }
            b"offset" => return Err(damaged(NOT_NUMBERS)),
            b"map" => self.map = Some(one_record(value)?),
            // `numblocks` repeats the number of segments.
            _ => {}
        }
        Ok(())
    }

    /// Returns the map that the records describe, if any.
    pub(super) fn sparse(self) -> Result<Option<Sparse>> {
        match (self.major, self.minor) {
            (None, _) if self.size.is_none() => Ok(None),
            (None | Some(0), _) => {
                if self.offset.is_some() {
                    return Err(damaged(NOT_NUMBERS));
                }
                Ok(Some(Sparse {
                    size: self.size.ok_or_else(|| damaged(NO_SIZE))?,
                    map: self.map.unwrap_or(self.pairs),
                    map_in_data: false,
                }))
            }
            (Some(1), Some(0)) => Ok(Some(Sparse {
                size: self.real_size.ok_or_else(|| damaged(NO_SIZE))?,
                map: Map::default(),
                map_in_data: true,
            })),
            _ => Err(damaged("its sparse map has an unknown format")),
        }
    }
}

fn one_record(value: &[u8]) -> Result<Map> {
    let mut map = Map::default();
    let mut numbers = value.split(|&byte| byte == b',').map(pax::decimal);
    while let Some(offset) = numbers.next() {
        let length = numbers.next().flatten();
        let pair = offset.zip(length).ok_or_else(|| damaged(NOT_NUMBERS))?;
        map.push(pair.0, pair.1)?;
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_maps_are_refused() {
        let sparse = |segments| Sparse {
            size: 100,
            map: Map(segments),
            map_in_data: false,
        };
        assert!(sparse(vec![(0, 10), (50, 10)]).check(20).is_ok());
        assert!(sparse(vec![(0, 10), (5, 10)]).check(20).is_err());
        assert!(sparse(vec![(95, 10)]).check(10).is_err());
        assert!(sparse(vec![(u64::MAX, 10)]).check(10).is_err());
        assert!(sparse(vec![(0, 10)]).check(11).is_err());
    }

    #[test]
    fn all_formats_result_in_the_same_map() {
        let read = |records: &[(&str, &str)]| {
            let mut all = Records::default();
            for (key, value) in records {
                all.record(key.as_bytes(), value.as_bytes())?;
            }
            all.sparse()
        };
        let want = Map(vec![(1, 2), (30, 4)]);
        let zero = read(&[
            ("size", "40"),
            ("numblocks", "2"),
            ("offset", "1"),
            ("numbytes", "2"),
            ("offset", "30"),
            ("numbytes", "4"),
        ]);
        let one = read(&[("size", "40"), ("map", "1,2,30,4")]);
        for got in [zero, one] {
            assert_eq!(got.unwrap().unwrap().map, want);
        }
        let mut data = MapInData::default();
        assert_eq!(data.block(b"2\n1\n2\n3").unwrap(), None);
        assert_eq!(data.block(b"0\n4\n\0\0").unwrap(), Some(want));
        for bad in [
            &[("size", "40"), ("offset", "1"), ("offset", "2")][..],
            &[("size", "40"), ("numbytes", "1")],
            &[("size", "40"), ("offset", "1")],
            &[("size", "40"), ("map", "1,2,3")],
            &[("size", "40"), ("map", "")],
            &[("major", "0")],
            &[("major", "1"), ("minor", "0")],
            &[("major", "2"), ("minor", "0")],
        ] {
            assert_eq!(read(bad).unwrap_err().kind(), ErrorKind::Damaged, "{bad:?}");
        }
    }

    #[test]
    fn map_with_too_many_segments_is_refused_early() {
        let mut data = MapInData::default();
        let error = data.block(b"18446744073709551615\n").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Limit);
        let mut records = Records::default();
        let map = "0,0,".repeat(limits::SEGMENTS) + "0,0";
        let error = records.record(b"map", map.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Limit);
    }
}
