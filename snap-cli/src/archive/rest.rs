//! A limit on what follows the end of an archive, counted before it is decoded: a decoder skips any number of empty
//! frames, empty members and padding, and yields nothing meanwhile.

use std::cell::Cell;
use std::fmt;
use std::io::{self, Read};
use std::rc::Rc;

/// The number of bytes that may still be read from the input of a decoder, which is not limited at first.
#[derive(Clone, Debug, Default)]
pub(super) struct RestLimit(Rc<Cell<Option<Budget>>>);

#[derive(Clone, Copy, Debug)]
struct Budget {
    limit: u64,
    left: u64,
}

impl RestLimit {
    /// Limits what is read from now on.
    pub(super) fn set(&self, limit: u64) {
        let left = limit;
        self.0.set(Some(Budget { limit, left }));
    }

    fn count(&self, bytes: usize) -> io::Result<()> {
        let Some(Budget { limit, left }) = self.0.get() else {
            return Ok(());
        };
        let left = left
            .checked_sub(bytes as u64)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, EndlessRest(limit)))?;
        self.0.set(Some(Budget { limit, left }));
        Ok(())
    }
}

/// The input of a decoder, which ends with the error [`EndlessRest`] at the limit.
pub(super) struct LimitedInput<R> {
    pub(super) input: R,
    pub(super) limit: RestLimit,
}

impl<R: Read> Read for LimitedInput<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.input.read(buffer)?;
        self.limit.count(got)?;
        Ok(got)
    }
}

/// The error for an archive that is followed by more bytes than this limit.
#[derive(Debug)]
pub(super) struct EndlessRest(pub(super) u64);

impl fmt::Display for EndlessRest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "more than {} bytes follow the end of the archive",
            self.0
        )
    }
}

impl std::error::Error for EndlessRest {}
