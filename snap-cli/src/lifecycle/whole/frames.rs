//! Frames around an archive in a connection that stays open: each is its length, in 4 bytes, big endian, and its data. An
//! empty frame is the end.

use std::io::{self, Read, Write};

/// The largest frame. A reader needs no memory for a frame, so the limit only detects other data.
const LARGEST: usize = 1 << 20;

/// The most data after the archive's end: a compressor and tar write a few KiB there.
const MAX_REST: u64 = 1 << 20;

/// Writes frames.
pub(super) struct FrameWriter<W>(pub(super) W);

impl<W: Write> FrameWriter<W> {
    /// Writes the end.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.0.write_all(&[0; 4])?;
        self.0.flush()?;
        Ok(self.0)
    }
}

impl<W: Write> Write for FrameWriter<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let frame = data.get(..data.len().min(LARGEST)).unwrap_or_default();
        if frame.is_empty() {
            return Ok(0);
        }
        let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
        self.0.write_all(&length.to_be_bytes())?;
        self.0.write_all(frame)?;
        Ok(frame.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Reads the data of frames, up to the end.
pub(super) struct FrameReader<'r, R> {
    input: &'r mut R,
    /// The number of bytes of the current frame that were not read yet.
    left: usize,
    ended: bool,
}

impl<'r, R: Read> FrameReader<'r, R> {
    pub(super) fn new(input: &'r mut R) -> Self {
        Self {
            input,
            left: 0,
            ended: false,
        }
    }

    /// Reads the rest of the frames, which is short: an endless one would retain the locks.
    pub(super) fn skip_rest(&mut self) -> io::Result<()> {
        let rest = io::copy(&mut self.by_ref().take(MAX_REST + 1), &mut io::sink())?;
        if rest > MAX_REST {
            let what = "more data follows the end of the archive";
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        Ok(())
    }
}

impl<R: Read> Read for FrameReader<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 && !self.ended {
            let mut length = [0; 4];
            self.input.read_exact(&mut length).map_err(cut_off)?;
            let length = u32::from_be_bytes(length) as usize;
            if length > LARGEST {
                let what = "the connection does not contain the data of cowl send";
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            (self.left, self.ended) = (length, length == 0);
        }
        let want = self.left.min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        let got = self
            .input
            .read(buffer.get_mut(..want).unwrap_or_default())?;
        if got == 0 {
            return Err(cut_off(io::ErrorKind::UnexpectedEof.into()));
        }
        self.left -= got;
        Ok(got)
    }
}

/// Describes the end of the connection within the frames.
fn cut_off(error: io::Error) -> io::Error {
    match error.kind() {
        kind @ io::ErrorKind::UnexpectedEof => io::Error::new(kind, "the connection was cut"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_passes_through_frames_and_ends_before_what_follows() {
        let data: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let mut writer = FrameWriter(Vec::new());
        writer.write_all(&data).unwrap();
        let mut framed = writer.finish().unwrap();
        let length = framed.len();
        framed.extend_from_slice(b"rest");
        let mut input = framed.as_slice();
        let mut read = Vec::new();
        let mut reader = FrameReader::new(&mut input);
        reader.read_to_end(&mut read).unwrap();
        assert_eq!(reader.read(&mut [0; 8]).unwrap(), 0);
        assert!(read == data);
        assert_eq!(input, b"rest");
        for cut in [0, 3, 4, 1000, length - 4, length - 1] {
            let mut input = &framed[..cut];
            let read = FrameReader::new(&mut input).read_to_end(&mut Vec::new());
            let cut_off = read.unwrap_err();
            assert_eq!(cut_off.kind(), io::ErrorKind::UnexpectedEof, "{cut}");
        }
        let endless = FrameReader::new(&mut framed.as_slice()).skip_rest();
        assert_eq!(endless.unwrap_err().kind(), io::ErrorKind::InvalidData);
        let mut other = &b"Last login: Mon\n"[..];
        let refused = FrameReader::new(&mut other).skip_rest().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
    }
}
