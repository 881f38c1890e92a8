//! Compression of archives.
//!
//! A reader detects the compression by the first bytes, a writer derives it from the suffix of the file name. The
//! module does not depend on the content of the archive.

use std::fmt;
use std::io::{self, BufRead, BufReader, Chain, Cursor, Read, Write};

use super::limits;
use super::member::has_valid_checksum;
use super::rest::{LimitedInput, RestLimit};
use crate::tree::error::{ErrorKind, Result, TreeError};

/// The compression of an archive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// No compression.
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
    /// Returns the compression that the suffix of a file name implies, or `None` for an unknown suffix.
    ///
    /// Known are `.tar`, `.tar.gz`, `.tgz`, `.tar.zst`, `.tzst`, `.tar.xz` and `.txz`.
    pub fn from_file_name(name: &[u8]) -> Option<Self> {
        let has_suffix = |suffix: &str| {
            name.len() > suffix.len()
                && name
                    .get(name.len() - suffix.len()..)
                    .is_some_and(|tail| tail.eq_ignore_ascii_case(suffix.as_bytes()))
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
        .find_map(|(suffix, compression)| has_suffix(suffix).then_some(compression))
    }
}

/// The magic numbers of known but unsupported formats.
const UNSUPPORTED: [(&[u8], &str); 11] = [
    (b"BZh", "bzip2"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x9d", "compress (.Z)"),
    (b"LZIP", "lzip"),
    (b"hsqs", "a squashfs image"),
    (b"!<arch>\n", "an ar archive or Debian package"),
    (b"070701", "a cpio archive"),
    (b"070702", "a cpio archive"),
    (b"070707", "a cpio archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
];

type Peeked<R> = BufReader<Chain<Cursor<Vec<u8>>, R>>;

/// The end of an archive's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StreamEnd {
    /// A compressed stream marks its end, so that a truncation is an error of the decoder.
    Marked,
    /// A plain file ends anywhere.
    Unmarked,
}

/// A reader of the uncompressed archive.
pub(super) struct Decoded<'a> {
    pub(super) input: Box<dyn Read + 'a>,
    pub(super) end: StreamEnd,
    /// The limit on what is read after the end of the archive.
    pub(super) rest: RestLimit,
}

/// Returns a reader of the uncompressed archive.
pub(super) fn decode<'a>(mut input: impl Read + 'a) -> Result<Decoded<'a>> {
    let mut head = Vec::new();
    input
        .by_ref()
        .take(HEADER)
        .read_to_end(&mut head)
        .map_err(|error| TreeError::io("cannot read the archive", error))?;
    if head.is_empty() {
        return Err(TreeError::new(ErrorKind::Empty, "the archive is empty"));
    }
    // The name at the start of a tar archive can equal the magic number of another format.
    let is_tar = has_tar_header(&head);
    let unsupported = UNSUPPORTED
        .iter()
        .find(|(magic, _)| !is_tar && head.starts_with(magic));
    if let Some((_, name)) = unsupported {
        return Err(TreeError::new(
            ErrorKind::NotAnArchive,
            format!(
                "this is {name}, not a tar archive (plain or compressed with gzip, zstd or xz)"
            ),
        ));
    }
    let kind = match is_tar {
        true => Compression::None,
        false => detect(&head),
    };
    let rest = RestLimit::default();
    let input = LimitedInput {
        input,
        limit: rest.clone(),
    };
    let input: Peeked<_> = BufReader::with_capacity(256 << 10, Cursor::new(head).chain(input));
    let end = match kind {
        Compression::None => StreamEnd::Unmarked,
        Compression::Gzip | Compression::Zstd | Compression::Xz => StreamEnd::Marked,
    };
    let input: Box<dyn Read + 'a> = match kind {
        Compression::None => Box::new(input),
        Compression::Gzip => Box::new(Gzip::Member(flate2::bufread::GzDecoder::new(input))),
        Compression::Zstd => Box::new(MemoryLimited(zstd_decoder(input)?)),
        Compression::Xz => Box::new(MemoryLimited(xz_decoder(input)?)),
    };
    Ok(Decoded { input, end, rest })
}

/// The size of a tar header.
const HEADER: u64 = 512;

fn has_tar_header(head: &[u8]) -> bool {
    head.len() as u64 == HEADER && has_valid_checksum(tar::Header::from_byte_slice(head))
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
    let fail = |error| TreeError::io("cannot start the zstd decoder", error);
    let mut decoder = zstd::stream::read::Decoder::with_buffer(input).map_err(fail)?;
    decoder.window_log_max(limits::WINDOW_LOG).map_err(fail)?;
    Ok(decoder)
}

fn xz_decoder<'a>(input: impl BufRead + 'a) -> Result<impl Read + 'a> {
    let flags = liblzma::stream::CONCATENATED;
    let stream = liblzma::stream::Stream::new_stream_decoder(limits::XZ_MEMORY, flags)
        .map_err(|error| TreeError::io("cannot start the xz decoder", error.into()))?;
    Ok(liblzma::bufread::XzDecoder::new_stream(input, stream))
}

/// The error of a decoder that needs more memory than the limit, because of a very large window or dictionary.
#[derive(Debug)]
pub(super) struct NeedsMemory;

impl fmt::Display for NeedsMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = (1_u64 << limits::WINDOW_LOG) >> 20;
        write!(
            f,
            "it was compressed with a window larger than the limit of {mib} MiB"
        )
    }
}

impl std::error::Error for NeedsMemory {}

/// The message of libzstd for a window that exceeds the limit. The error has no code that could be compared.
const ZSTD_WINDOW_TOO_LARGE: &str = "Frame requires too much memory for decoding";

/// A decoder that reports an exceeded memory limit as [`NeedsMemory`].
struct MemoryLimited<R>(R);

impl<R: Read> Read for MemoryLimited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| {
            let inner = error.get_ref();
            let xz = inner.and_then(|inner| inner.downcast_ref::<liblzma::stream::Error>());
            let is_zstd_limit =
                || inner.is_some_and(|inner| inner.to_string() == ZSTD_WINDOW_TOO_LARGE);
            if xz == Some(&liblzma::stream::Error::MemLimit) || is_zstd_limit() {
                return io::Error::new(io::ErrorKind::OutOfMemory, NeedsMemory);
            }
            error
        })
    }
}

/// A reader of concatenated gzip members. Zeros may follow the last member, as gzip(1) permits.
enum Gzip<R> {
    Member(flate2::bufread::GzDecoder<R>),
    Ended,
}

impl<R: BufRead> Read for Gzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let Self::Member(decoder) = self else {
                return Ok(0);
            };
            let got = decoder.read(buffer)?;
            if got > 0 || buffer.is_empty() {
                return Ok(got);
            }
            let Self::Member(decoder) = std::mem::replace(self, Self::Ended) else {
                return Ok(0);
            };
            let mut input = decoder.into_inner();
            let mut zeros = false;
            loop {
                let rest = input.fill_buf()?;
                let Some(first) = rest.iter().position(|&byte| byte != 0) else {
                    let length = rest.len();
                    if length == 0 {
                        return Ok(0);
                    }
                    zeros = true;
                    input.consume(length);
                    continue;
                };
                if zeros || first > 0 {
                    let what = "unexpected data after the padding at the end of the gzip stream";
                    return Err(io::Error::new(io::ErrorKind::InvalidData, what));
                }
                break;
            }
            *self = Self::Member(flate2::bufread::GzDecoder::new(input));
        }
    }
}

/// A compressing writer. Without a call of [`Encoder::finish`] the archive is truncated.
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
    fn file_name_suffix_selects_compression() {
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
            assert_eq!(Compression::from_file_name(name), want);
        }
    }

    #[test]
    fn compression_round_trips_and_truncation_is_detected() {
        let data: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
        for compression in [Compression::Gzip, Compression::Zstd, Compression::Xz] {
            let mut encoder = Encoder::new(Vec::new(), compression).unwrap();
            encoder.write_all(&data).unwrap();
            let packed = encoder.finish().unwrap();
            let mut back = Vec::new();
            decode(&packed[..])
                .unwrap()
                .input
                .read_to_end(&mut back)
                .unwrap();
            assert_eq!(back, data);
            let cut = &packed[..packed.len() - 5];
            let got = decode(cut).unwrap().input.read_to_end(&mut Vec::new());
            assert!(got.is_err(), "{compression:?}: truncation was not detected");
        }
    }

    #[test]
    fn concatenated_gzip_members_and_trailing_zeros_are_accepted() {
        let pack = |data: &[u8]| {
            let mut encoder = Encoder::new(Vec::new(), Compression::Gzip).unwrap();
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        };
        let read = |packed: &[u8]| {
            let mut back = Vec::new();
            let got = decode(packed).unwrap().input.read_to_end(&mut back);
            got.map(|_| back)
        };
        let two = [pack(b"one"), pack(b"two")].concat();
        assert_eq!(read(&two).unwrap(), b"onetwo");
        let mut padded = two.clone();
        padded.resize(1 << 20, 0);
        assert_eq!(read(&padded).unwrap(), b"onetwo");
        for rest in [&b"garbage"[..], &[0, 0, 1]] {
            assert!(read(&[two.as_slice(), rest].concat()).is_err());
        }
    }

    #[test]
    fn window_or_dictionary_above_the_limit_is_refused() {
        let needs_memory = |packed: &[u8]| {
            let got = decode(packed).unwrap().input.read_to_end(&mut Vec::new());
            got.is_err_and(|error| {
                error
                    .get_ref()
                    .is_some_and(|inner| inner.is::<NeedsMemory>())
            })
        };
        let zstd = |log: u32| {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
            encoder.window_log(log).unwrap();
            encoder.write_all(b"data").unwrap();
            encoder.finish().unwrap()
        };
        assert!(!needs_memory(&zstd(limits::WINDOW_LOG)));
        assert!(needs_memory(&zstd(limits::WINDOW_LOG + 1)));
        // One byte of the block header encodes the dictionary size; 40 means 4 GiB.
        let mut encoder = Encoder::new(Vec::new(), Compression::Xz).unwrap();
        encoder.write_all(b"data").unwrap();
        let mut packed = encoder.finish().unwrap();
        assert!(!needs_memory(&packed));
        let header = 12..12 + (usize::from(packed[12]) + 1) * 4;
        let properties = packed[header.clone()]
            .windows(2)
            .position(|pair| pair == [0x21, 1])
            .unwrap();
        packed[header.start + properties + 2] = 40;
        let mut crc = flate2::Crc::new();
        crc.update(&packed[header.start..header.end - 4]);
        packed[header.end - 4..header.end].copy_from_slice(&crc.sum().to_le_bytes());
        assert!(needs_memory(&packed));
    }

    #[test]
    fn empty_and_unsupported_inputs_are_refused() {
        assert_eq!(decode(&b""[..]).err().unwrap().kind(), ErrorKind::Empty);
        let mut cpio = b"070701".to_vec();
        cpio.resize(4096, b'0');
        assert!(decode(&cpio[..]).err().unwrap().message().contains("cpio"));
        let zip = decode(&b"PK\x03\x04 and more"[..]).err().unwrap();
        assert_eq!(zip.kind(), ErrorKind::NotAnArchive);
        assert!(zip.message().contains("zip"));
    }

    #[test]
    fn first_name_of_a_tar_archive_is_not_a_magic_number() {
        for (magic, _) in UNSUPPORTED.iter().chain([&(&b"\x1f\x8bx"[..], "gzip")]) {
            let mut header = tar::Header::new_gnu();
            header.as_old_mut().name[..magic.len()].copy_from_slice(magic);
            header.set_cksum();
            let mut back = Vec::new();
            let archive = header.as_bytes();
            let mut decoded = decode(&archive[..]).unwrap();
            decoded.input.read_to_end(&mut back).unwrap();
            assert_eq!(back, archive, "{}", magic.escape_ascii());
        }
    }
}
