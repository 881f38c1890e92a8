//! A reader that verifies the size and the digest of a blob.

use std::io::{self, Read};

use sha2::{Digest as _, Sha256};

use super::digest::Digest;
use crate::archive::checksum::hex;
use crate::tree::error::{ErrorKind, Result, TreeError};

/// A reader of a blob, of which at most `size` bytes are read.
pub struct VerifiedBlob<R> {
    input: R,
    sum: Sha256,
    left: u64,
}

impl<R: Read> VerifiedBlob<R> {
    /// Creates a reader of a blob with this size.
    pub fn new(input: R, size: u64) -> Self {
        Self {
            input,
            sum: Sha256::new(),
            left: size,
        }
    }

    /// Reads the rest, and fails unless the blob has this digest and the size.
    pub fn finish(mut self, expected: &Digest) -> Result<()> {
        let failed = |error| TreeError::io(format!("cannot read the blob {expected}"), error);
        io::copy(&mut self, &mut io::sink()).map_err(failed)?;
        let extra = self.input.read(&mut [0]).map_err(failed)?;
        let what = if self.left > 0 {
            "is shorter than its size in the manifest".to_owned()
        } else if extra > 0 {
            "is longer than its size in the manifest".to_owned()
        } else {
            let found = Digest::from_hex(&hex(self.sum));
            if found == *expected {
                return Ok(());
            }
            format!("has another digest: {found}")
        };
        let what = format!("the blob {expected} of the image {what}");
        Err(TreeError::new(ErrorKind::Damaged, what))
    }
}

impl<R: Read> Read for VerifiedBlob<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        let length = buffer.len().min(most);
        let part = buffer.get_mut(..length).unwrap_or_default();
        let got = self.input.read(part)?;
        self.sum.update(part.get(..got).unwrap_or_default());
        self.left -= got as u64;
        Ok(got)
    }
}

impl<R> std::fmt::Debug for VerifiedBlob<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerifiedBlob").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_of_another_size_or_digest_is_refused() {
        let digest = Digest::of(b"content");
        let verify = |data: &[u8], size| VerifiedBlob::new(data, size).finish(&digest);
        verify(b"content", 7).unwrap();
        for (data, size, message) in [
            (&b"conten"[..], 7, "shorter"),
            (b"content!", 7, "longer"),
            (b"content", 8, "shorter"),
            (b"Content", 7, "another digest"),
            (b"", 0, "another digest"),
        ] {
            let error = verify(data, size).unwrap_err();
            assert!(error.message().contains(message), "{error}");
        }
    }
}
