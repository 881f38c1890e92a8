//! Relative paths as bytes, without a leading slash. The path of the root is empty.

pub(crate) use cowl_layers::name::split;
pub(crate) use cowl_layers::view::resolve::join;

/// Returns the length of the common prefix of two paths in bytes.
pub(crate) fn common_prefix(one: &[u8], two: &[u8]) -> usize {
    const BLOCK: usize = 256;
    let blocks = one.chunks_exact(BLOCK).zip(two.chunks_exact(BLOCK));
    let same = BLOCK * blocks.take_while(|(a, b)| a == b).count();
    let rest = one.iter().zip(two).skip(same);
    same + rest.take_while(|(a, b)| a == b).count()
}

/// Returns whether `path` is `top` or below it.
pub(crate) fn is_within(path: &[u8], top: &[u8]) -> bool {
    top.is_empty()
        || path
            .strip_prefix(top)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}

/// Returns the first name of a path, and the rest with its leading slash.
pub(crate) fn split_first(path: &[u8]) -> (&[u8], &[u8]) {
    let path = path.strip_prefix(b"/").unwrap_or(path);
    match path.iter().position(|&byte| byte == b'/') {
        Some(at) => path.split_at(at),
        None => (path, b""),
    }
}
