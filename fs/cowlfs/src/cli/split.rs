//! Separators and escapes in option strings.

/// Splits at each separator that has no backslash before it.
///
/// Escapes remain for [`unescape`], except those of the separator, unless `keep` is true.
pub(super) fn split(text: &[u8], separator: u8, keep: bool) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.iter().copied();
    while let Some(byte) = bytes.next() {
        let Some(last) = parts.last_mut() else { break };
        match byte {
            b'\\' => match bytes.next() {
                Some(next) if next == separator && !keep => last.push(next),
                Some(next) => last.extend([b'\\', next]),
                None => last.push(b'\\'),
            },
            _ if byte == separator => parts.push(Vec::new()),
            _ => last.push(byte),
        }
    }
    parts
}

/// Removes the backslashes of escapes.
pub(super) fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut bytes = text.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => plain.extend(bytes.next().or(Some(b'\\'))),
            _ => plain.push(byte),
        }
    }
    plain
}
