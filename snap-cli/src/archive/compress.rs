//! Which compression an archive has, told by its first bytes when it is read and by the end of its
//! name when it is written. Must not know what is inside.

use std::io::{self, BufRead, BufReader, Chain, Cursor, Read, Write};

use crate::delta::error::{ErrorKind, Result, TreeError};

/// How an archive is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
    /// xz.
    Xz,
}

impl Compression {
    /// What the end of a file name asks for: `.tar`, `.tar.gz`, `.tgz`, `.tar.zst`, `.tzst`,
    /// `.tar.xz`, `.txz`. `None` for any other end.
    pub fn of_name(name: &[u8]) -> Option<Self> {
        let ends = |end: &str| {
            name.len() > end.len()
                && name
                    .get(name.len() - end.len()..)
                    .is_some_and(|tail| tail.eq_ignore_ascii_case(end.as_bytes()))
        };
        [
            (".tar", Self::None),
            (".tar.gz", Self::Gzip),
            (".tgz", Self::Gzip),
            (".tar.zst", Self::Zstd),
            (".tzst", Self::Zstd),
            (".tar.xz", Self::Xz),
            (".txz", Self::Xz),
        ]
        .into_iter()
        .find_map(|(end, compression)| ends(end).then_some(compression))
    }
}

/// What is known but not read here, with the first bytes that tell it.
const FOREIGN: [(&[u8], &str); 7] = [
    (b"BZh", "bzip2"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x9d", "compress (.Z)"),
    (b"LZIP", "lzip"),
    (b"hsqs", "a squashfs image"),
    (b"!<arch>\n", "an ar archive or Debian package"),
];

type Peeked<R> = BufReader<Chain<Cursor<Vec<u8>>, R>>;

/// A reader of the uncompressed archive.
pub(super) fn decode<'a>(mut input: impl Read + 'a) -> Result<Box<dyn Read + 'a>> {
    let mut head = Vec::new();
    input
        .by_ref()
        .take(8)
        .read_to_end(&mut head)
        .map_err(|error| TreeError::io("can't read the archive", error))?;
    if head.is_empty() {
        return Err(TreeError::new(ErrorKind::Empty, "the archive is empty"));
    }
    if let Some((_, name)) = FOREIGN.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(TreeError::new(
            ErrorKind::NotAnArchive,
            format!("this is {name}, not a tar that is plain or compressed with gzip, zstd or xz"),
        ));
    }
    let kind = detect(&head);
    let input: Peeked<_> = BufReader::with_capacity(256 << 10, Cursor::new(head).chain(input));
    Ok(match kind {
        Compression::None => Box::new(input),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Compression::Zstd => Box::new(zstd_decoder(input)?),
        Compression::Xz => Box::new(liblzma::bufread::XzDecoder::new_multi_decoder(input)),
    })
}

fn detect(head: &[u8]) -> Compression {
    if head.starts_with(&[0x1f, 0x8b]) {
        Compression::Gzip
    } else if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
        || matches!(head, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
    {
        Compression::Zstd
    } else if head.starts_with(b"\xfd7zXZ\0") {
        Compression::Xz
    } else {
        Compression::None
    }
}

fn zstd_decoder<'a>(input: impl BufRead + 'a) -> Result<impl Read + 'a> {
    let fail = |error| TreeError::io("can't start the zstd decoder", error);
    let mut decoder = zstd::stream::read::Decoder::with_buffer(input).map_err(fail)?;
    // The largest window that `zstd --long=31` makes.
    decoder.window_log_max(31).map_err(fail)?;
    Ok(decoder)
}

/// A writer that compresses; [`Encoder::finish`] must be called, or the archive is cut short.
pub(super) enum Encoder<W: Write> {
    Plain(W),
    Gzip(flate2::write::GzEncoder<W>),
    Zstd(zstd::stream::write::Encoder<'static, W>),
    Xz(liblzma::write::XzEncoder<W>),
}

impl<W: Write> Encoder<W> {
    pub(super) fn new(output: W, compression: Compression) -> io::Result<Self> {
        Ok(match compression {
            Compression::None => Self::Plain(output),
            Compression::Gzip => Self::Gzip(flate2::write::GzEncoder::new(
                output,
                flate2::Compression::default(),
            )),
            Compression::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(output, 3)?;
                encoder.include_checksum(true)?;
                Self::Zstd(encoder)
            }
            Compression::Xz => Self::Xz(liblzma::write::XzEncoder::new(output, 6)),
        })
    }

    pub(super) fn finish(self) -> io::Result<W> {
        match self {
            Self::Plain(output) => Ok(output),
            Self::Gzip(encoder) => encoder.finish(),
            Self::Zstd(encoder) => encoder.finish(),
            Self::Xz(encoder) => encoder.finish(),
        }
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(output) => output.write(data),
            Self::Gzip(encoder) => encoder.write(data),
            Self::Zstd(encoder) => encoder.write(data),
            Self::Xz(encoder) => encoder.write(data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(output) => output.flush(),
            Self::Gzip(encoder) => encoder.flush(),
            Self::Zstd(encoder) => encoder.flush(),
            Self::Xz(encoder) => encoder.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_the_compression() {
        for (name, want) in [
            (&b"a.tar"[..], Some(Compression::None)),
            (b"a.tar.gz", Some(Compression::Gzip)),
            (b"A.TGZ", Some(Compression::Gzip)),
            (b"x.tar.zst", Some(Compression::Zstd)),
            (b"x.txz", Some(Compression::Xz)),
            (b".tar", None),
            (b"x.zip", None),
            (b"x", None),
        ] {
            assert_eq!(Compression::of_name(name), want);
        }
    }

    #[test]
    fn what_was_encoded_is_decoded_and_a_cut_is_seen() {
        let data: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
        for compression in [Compression::Gzip, Compression::Zstd, Compression::Xz] {
            let mut encoder = Encoder::new(Vec::new(), compression).unwrap();
            encoder.write_all(&data).unwrap();
            let packed = encoder.finish().unwrap();
            let mut back = Vec::new();
            decode(&packed[..]).unwrap().read_to_end(&mut back).unwrap();
            assert_eq!(back, data);
            let cut = &packed[..packed.len() - 5];
            let got = decode(cut).unwrap().read_to_end(&mut Vec::new());
            assert!(got.is_err(), "{compression:?}: a cut was not seen");
        }
    }

    #[test]
    fn empty_and_foreign_inputs_are_refused() {
        assert_eq!(decode(&b""[..]).err().unwrap().kind(), ErrorKind::Empty);
        let zip = decode(&b"PK\x03\x04 and more"[..]).err().unwrap();
        assert_eq!(zip.kind(), ErrorKind::NotAnArchive);
        assert!(zip.what().contains("zip"));
    }
}
