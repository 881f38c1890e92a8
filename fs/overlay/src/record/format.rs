//! The encoding of the record: a magic number, a version, a checksum, and the fields in the encoding of postcard.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::RecordError;
use crate::content::FileRecord;
use crate::inode::{InodeRecord, Place, TableRecord};
use crate::ledger::FoundSlot;
use crate::listing::CookiesRecord;

const MAGIC: &[u8; 8] = b"cowlrec\0";
/// Must be incremented with each change of the fields, their types or their meaning.
const VERSION: u32 = 3;
/// The size of the checksum, SHA-256.
const CHECKSUM_SIZE: usize = 32;

/// The record of state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The ids of the layers, in the order of [`super::Handover::layers`].
    pub(super) layers: Vec<u64>,
    /// The number of layers in the stack.
    pub(super) stack: usize,
    /// The number of data-only layers.
    pub(super) data_only: usize,
    /// Whether the topmost layer is written.
    pub(super) has_upper: bool,
    /// The generation of the stack: the number of pushed layers.
    pub(super) pushes: u32,
    /// The number of files that the kernel may write to without a request.
    pub(super) passthrough_writers: u32,
    /// All inodes, by number.
    pub(super) inodes: Vec<InodeRecord>,
    /// The location of each inode's object.
    pub(super) places: Vec<Place>,
    pub(super) table: TableRecord,
    pub(super) cookies: CookiesRecord,
    /// The inodes of renamed directories, and whether those from before this mount are among them.
    pub(super) moved: (Vec<u64>, bool),
    /// The open files, by handle number.
    pub(super) files: Vec<(u64, FileRecord)>,
    /// The last writeback error of an inode: its number, the error number, and the number of errors so far.
    pub(super) writeback_errors: Vec<(u64, i32, u32)>,
    /// The requests that a killed predecessor did not answer, and that the kernel has not sent again yet.
    pub(super) unanswered: Vec<FoundSlot>,
}

impl Record {
    pub(super) fn encode(&self) -> Result<Vec<u8>, RecordError> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; CHECKSUM_SIZE]);
        let mut bytes = postcard::to_extend(self, bytes)
            .map_err(|_| RecordError::Damaged("it cannot be encoded"))?;
        // A large record grew by doubling, and is held next to the inodes.
        bytes.shrink_to_fit();
        let header = MAGIC.len() + size_of_val(&VERSION);
        if let Some((_, rest)) = bytes.split_at_mut_checked(header)
            && let Some((checksum, body)) = rest.split_first_chunk_mut()
        {
            *checksum = compute_checksum(VERSION.to_le_bytes(), body);
        }
        Ok(bytes)
    }

    /// Decodes a record. Neither the version nor any other byte is trusted.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let header = bytes
            .split_at_checked(MAGIC.len())
            .filter(|(magic, _)| magic == MAGIC)
            .and_then(|(_, rest)| rest.split_first_chunk());
        let Some((version, rest)) = header else {
            return Err(RecordError::Damaged(
                "it does not begin with the magic number",
            ));
        };
        let found = u32::from_le_bytes(*version);
        if found != VERSION {
            let known = VERSION;
            return Err(RecordError::Version { found, known });
        }
        let body = rest
            .split_first_chunk()
            .filter(|(checksum, body)| **checksum == compute_checksum(*version, body))
            .map(|(_, body)| body)
            .ok_or(RecordError::Damaged("its checksum is wrong"))?;
        let (record, rest) = postcard::take_from_bytes::<Self>(body)
            .map_err(|_| RecordError::Damaged("its fields cannot be decoded"))?;
        let layers = record.stack.checked_add(record.data_only);
        if !rest.is_empty()
            || record.inodes.len() != record.places.len()
            || layers.is_none_or(|count| count > record.layers.len())
        {
            return Err(RecordError::Damaged("its fields contradict each other"));
        }
        Ok(record)
    }
}

/// Computes the checksum of the version and the encoded fields.
fn compute_checksum(version: [u8; 4], body: &[u8]) -> [u8; CHECKSUM_SIZE] {
    let hasher = Sha256::new().chain_update(version);
    hasher.chain_update(body).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            layers: vec![1, 2, 3],
            stack: 2,
            data_only: 1,
            has_upper: true,
            pushes: 7,
            passthrough_writers: 1,
            inodes: Vec::new(),
            places: Vec::new(),
            table: TableRecord::default(),
            cookies: CookiesRecord::default(),
            moved: (vec![5], true),
            files: Vec::new(),
            writeback_errors: vec![(9, 5, 2)],
            unanswered: vec![FoundSlot::default()],
        }
    }

    #[test]
    fn record_survives_encoding() {
        let bytes = record().encode().unwrap();
        assert_eq!(Record::decode(&bytes).unwrap(), record());
    }

    #[test]
    fn damaged_records_are_refused() {
        let is_damaged =
            |bytes: &[u8]| matches!(Record::decode(bytes), Err(RecordError::Damaged(_)));
        let bytes = record().encode().unwrap();
        for length in 0..bytes.len() {
            assert!(is_damaged(&bytes[..length]), "{length} bytes");
        }
        assert!(is_damaged(&[&bytes[..], b"x"].concat()));
        let too_many = Record {
            stack: usize::MAX,
            ..record()
        };
        assert!(is_damaged(&too_many.encode().unwrap()));
    }

    #[test]
    fn every_changed_byte_is_refused() {
        let bytes = record().encode().unwrap();
        for at in 0..bytes.len() {
            for change in 1..=u8::MAX {
                let mut other = bytes.clone();
                other[at] ^= change;
                let refused = Record::decode(&other).unwrap_err();
                let is_version = (MAGIC.len()..MAGIC.len() + 4).contains(&at);
                match refused {
                    RecordError::Version { .. } => assert!(is_version, "byte {at}"),
                    RecordError::Damaged(_) => assert!(!is_version, "byte {at}"),
                    other => panic!("byte {at}: {other}"),
                }
            }
        }
    }

    #[test]
    fn fields_that_do_not_match_are_refused_with_a_valid_checksum() {
        let bytes = record().encode().unwrap();
        let (header, _) = bytes.split_at(MAGIC.len() + 4);
        let body = b"\xff\xff\xff";
        let checksum = compute_checksum(VERSION.to_le_bytes(), body);
        let forged = [header, &checksum, body].concat();
        let refused = Record::decode(&forged).unwrap_err().to_string();
        assert_eq!(
            refused,
            "the record of state is damaged: its fields cannot be decoded"
        );
    }

    #[test]
    fn another_version_is_refused_with_both_numbers() {
        let mut bytes = record().encode().unwrap();
        bytes[MAGIC.len()] += 1;
        let refused = Record::decode(&bytes).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "the record of state has version 4; this program reads version 3"
        );
    }
}
