//! SHA-256 checksums of archives, computed while they are read or written.

use std::io::{self, Read};

use sha2::{Digest as _, Sha256};

/// A reader that computes the checksum of the bytes that pass through it.
pub(super) struct ChecksumReader<'a> {
    input: Box<dyn Read + 'a>,
    /// The checksum so far; `None` if no checksum is computed.
    pub(super) sum: Option<Sha256>,
}

impl<'a> ChecksumReader<'a> {
    pub(super) fn new(input: Box<dyn Read + 'a>) -> Self {
        Self {
            input,
            sum: Some(Sha256::new()),
        }
    }
}

impl Read for ChecksumReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.input.read(buffer)?;
        if let Some(sum) = &mut self.sum {
            sum.update(buffer.get(..got).unwrap_or_default());
        }
        Ok(got)
    }
}

/// Returns a checksum in hexadecimal digits.
pub(super) fn hex(sum: Sha256) -> String {
    sum.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
